"""Finds parts of a model that text does not reach: vision and audio towers and their projections.

When only text is trained, they get no adapter, do not train, and are saved as they were read.
"""

from collections.abc import Collection, Iterator

from torch import nn
from transformers import PreTrainedModel

from veneer.adapters.placement.idle import in_any_layer
from veneer.execution.attention import decoder


def left_out(model: PreTrainedModel, idle: Collection[str]) -> tuple[str, ...]:
    """Returns the paths of the largest modules in which every weight is idle. idle: modules that no
    gradient reaches."""
    language_parts = {
        id(part) for part in (decoder(model), model.get_output_embeddings()) if part is not None
    }

    def parts(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            child_path = f"{path}.{name}" if path else name
            with_weights = [
                f"{child_path}.{below}" if below else child_path
                for below, module_below in child.named_modules()
                if any(True for _ in module_below.parameters(recurse=False))
            ]
            if with_weights and all(in_any_layer(module) in idle for module in with_weights):
                yield child_path
            elif id(child) not in language_parts:
                yield from parts(child, child_path)

    return tuple(parts(model, ""))


def reached_weights(model: nn.Module, parts_left_out: Collection[str]) -> dict[str, nn.Parameter]:
    """Returns the weights that full fine-tuning trains, by path: all but those of parts left
    out."""
    return {
        path: weight
        for path, weight in model.named_parameters()
        if not any(path.startswith(f"{part}.") for part in parts_left_out)
    }
