"""Parts of a model that no text reaches: its towers for images or sound, and what projects from
them to its tokens.

Where text alone is trained they get no adapter, train in no run, and are written as they were read.
"""

from collections.abc import Collection, Iterator

from torch import nn
from transformers import PreTrainedModel

from veneer.adapters.placement.idle import in_any_layer
from veneer.execution.attention import decoder


def left_out(model: PreTrainedModel, idle: Collection[str]) -> tuple[str, ...]:
    """Their paths, each as far up as the whole of it is one; idle: places that no gradient
    reaches."""
    whole = {
        id(part) for part in (decoder(model), model.get_output_embeddings()) if part is not None
    }

    def parts(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            own = f"{path}.{name}" if path else name
            held = [
                f"{own}.{below}" if below else own
                for below, each in child.named_modules()
                if any(True for _ in each.parameters(recurse=False))
            ]
            if held and all(in_any_layer(each) in idle for each in held):
                yield own
            elif id(child) not in whole:
                yield from parts(child, own)

    return tuple(parts(model, ""))


def reached_weights(model: nn.Module, beside: Collection[str]) -> dict[str, nn.Parameter]:
    """By path, all weights but those of the parts that are left out: what full fine-tuning
    trains."""
    return {
        path: weight
        for path, weight in model.named_parameters()
        if not any(path.startswith(f"{part}.") for part in beside)
    }
