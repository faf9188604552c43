"""Adapters of a text's own class on the class that the checkpoint names, which holds the same
language model within.

    model.layers.0.mlp.up_proj   ->   model.language_model.layers.0.mlp.up_proj

So are those named that were trained while Qwen3.5's checkpoints of texts and images were read by
their text's class. Whether it is the same base the fingerprint says, not a name.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from veneer.formats.peft.config import PeftLoRA
from veneer.formats.peft.tensors import Modules, adapted_modules, slot_of

_TEXT, _WITHIN = "model.", "model.language_model."


def within_language_model(
    config: PeftLoRA, tensors: Mapping[str, Tensor], modules: Modules
) -> tuple[PeftLoRA, Mapping[str, Tensor]]:
    """The same adapter by this model's names; unchanged unless all of its modules stand there, and
    none as it says."""
    adapted = [re.sub(r"(\.base_layer)+$", "", path) for path in adapted_modules(tensors)]
    of_text = [path for path in adapted if path.startswith(_TEXT)]
    if not of_text or any(path in modules or _moved(path) not in modules for path in of_text):
        return config, tensors
    update = {
        "target_modules": [
            path for path in map(_moved, adapted) if slot_of(path, modules) is not None
        ],
        "exclude_modules": (
            None
        ),  # exact names need nothing beside them, and a tower may bear the others
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_parameters": _entries(config.target_parameters),
        "modules_to_save": _entries(config.modules_to_save),
        "rank_pattern": _patterns(config.rank_pattern),
        "alpha_pattern": _patterns(config.alpha_pattern),
    }
    return config.model_copy(update=update), {
        _moved(name): tensor for name, tensor in tensors.items()
    }


def recorded_within(recorded: Mapping[str, float], paths: Collection[str]) -> dict[str, float]:
    """What was recorded by module, by those of `paths` that stand within the language model."""
    return {
        _moved(p) if p not in paths and _moved(p) in paths else p: value
        for p, value in recorded.items()
    }


def _moved(name: str) -> str:
    return _WITHIN + name.removeprefix(_TEXT) if name.startswith(_TEXT) else name


def _entries(names: Sequence[str] | str | None) -> list[str] | str | None:
    return names if names is None or isinstance(names, str) else [_moved(name) for name in names]


def _patterns(values: Mapping[str, float] | None) -> dict[str, float] | None:
    """Of whole paths, as they are written here; what matches the end of a path holds as it
    stands."""
    if values is None:
        return None
    begins = f"^{re.escape(_TEXT)}"
    within = f"^{re.escape(_WITHIN)}"
    moved = {
        key: within + key.removeprefix(begins) if key.startswith(begins) else _moved(key)
        for key in values
    }
    return {moved[key]: value for key, value in values.items()}
