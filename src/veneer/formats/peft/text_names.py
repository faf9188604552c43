"""Renames adapters of a text-only class for a model of texts and images with the same language
model.

model.layers.0.mlp.up_proj   ->   model.language_model.layers.0.mlp.up_proj

Adapters have such names if they were trained while Qwen3.5's checkpoints of texts and images were
loaded as text. The fingerprint decides whether it is the same base, not a name.
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
    """Renames the adapter's modules for this model.

    Unchanged unless all of its modules exist under the new names, and none under the old ones.
    """
    adapted = [re.sub(r"(\.base_layer)+$", "", path) for path in adapted_modules(tensors)]
    of_text = [path for path in adapted if path.startswith(_TEXT)]
    if not of_text or any(path in modules or _renamed(path) not in modules for path in of_text):
        return config, tensors
    update = {
        "target_modules": [
            path for path in map(_renamed, adapted) if slot_of(path, modules) is not None
        ],
        # exact names need no exclusions, which could match the tower
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_parameters": _rename_entries(config.target_parameters),
        "modules_to_save": _rename_entries(config.modules_to_save),
        "rank_pattern": _rename_patterns(config.rank_pattern),
        "alpha_pattern": _rename_patterns(config.alpha_pattern),
    }
    return config.model_copy(update=update), {
        _renamed(name): tensor for name, tensor in tensors.items()
    }


def recorded_within(recorded: Mapping[str, float], paths: Collection[str]) -> dict[str, float]:
    """Renames recorded values for those of `paths` that lie in the language model."""
    return {
        _renamed(p) if p not in paths and _renamed(p) in paths else p: value
        for p, value in recorded.items()
    }


def _renamed(name: str) -> str:
    return _WITHIN + name.removeprefix(_TEXT) if name.startswith(_TEXT) else name


def _rename_entries(names: Sequence[str] | str | None) -> list[str] | str | None:
    return names if names is None or isinstance(names, str) else [_renamed(name) for name in names]


def _rename_patterns(values: Mapping[str, float] | None) -> dict[str, float] | None:
    """Renames patterns of whole paths; patterns of the end of a path stay."""
    if values is None:
        return None
    begins = f"^{re.escape(_TEXT)}"
    within = f"^{re.escape(_WITHIN)}"
    new_keys = {
        key: within + key.removeprefix(begins) if key.startswith(begins) else _renamed(key)
        for key in values
    }
    return {new_keys[key]: value for key, value in values.items()}
