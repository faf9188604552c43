"""Private parts of transformers. Tried with transformers 5.25.

It imports nothing of it, so that folders which do not know transformers may use it.
"""

import sys
from collections.abc import Callable
from typing import Any

from veneer.private.torch import hooks_of


def attention_of(config: Any) -> Any:
    """Returns the name of the attention that a config chooses; None if it chooses none."""
    return getattr(config, "_attn_implementation", None)


def forget_attention(config: Any) -> None:
    config._attn_implementation = None


def experts_of(config: Any) -> Any:
    """Returns the name of the computation of stacked experts that a config chooses, or None."""
    return getattr(config, "_experts_implementation", None)


def offers_experts(model: Any) -> bool:
    """Whether the code of a model looks the computation of experts up by its registered name."""
    return bool(model._can_set_experts_implementation())


def offers_attention(module: Any) -> bool:
    """Whether the code of a model, or of a block, looks attention up by its registered name."""
    if (of_model := getattr(module, "_can_set_attn_implementation", None)) is not None:
        return bool(of_model())
    files = (sys.modules.get(own.__module__) for own in type(module).__mro__)
    return any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files)


def adds_distances(decoder: Any) -> bool:
    """Whether a decoder makes biases by distance for the scores of attention (ALiBi): it has a
    method for them, or a switch that is on."""
    return any("alibi" in name and getattr(decoder, name) for name in dir(decoder))


def calls_hooks(module: Any) -> bool:
    """True if a forward of the module, or its backward, calls hooks, other than those by which
    transformers captures outputs: once added they stay, and do nothing where none are captured."""
    hooks = (hook for of_module in hooks_of(module) for hook in of_module.values())
    places = [str(getattr(hook, "__module__", "")) for hook in hooks]
    return any(not place.startswith("transformers.") for place in places)


def offers_sdpa(model: Any) -> bool:
    return bool(getattr(model, "_supports_sdpa", False))


def constructor_of(kind: Any) -> Callable[..., Any]:
    """Returns the function that builds a model class from a config without weights."""
    return kind._from_config


def gate_of(experts: Any) -> Callable[..., Any] | None:
    """Returns the function that gates what stacked experts compute; None if they have none."""
    return getattr(experts, "_apply_gate", None)


def conversions_of(model: Any) -> Any:
    """Returns how the checkpoint's tensors were renamed, for save_pretrained; None if unknown."""
    return getattr(model, "_weight_conversions", None)


def keep_conversions(model: Any, conversions: Any) -> None:
    model._weight_conversions = conversions


def mark_initialized(tensor: Any) -> None:
    """Tells transformers' loader that a tensor has its values."""
    tensor._is_hf_initialized = True


def decodes_alike(kind: Any, other: Any) -> bool:
    """True if a tokenizer class decodes by the same methods as another."""
    return (kind.decode, kind._decode) == (other.decode, other._decode)
