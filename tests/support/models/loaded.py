"""How a base that Veneer loads differs from the model that transformers loads from the same folder.

Modelling code asks for attributes by name, sometimes only whether they exist. So everything is
compared: the classes of all modules, their attributes, the configs with their private fields,
values, types and strides of all tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightTransform

from veneer.linear import FewRowsLinear

ALLOWED: Mapping[str, str] = {
    r"requires_grad of .*": "a base is frozen",
    r"stride of .*\.(c_attn|c_proj|c_fc)\.weight": "compiled products read a Conv1D by rows",
    "_veneer_record": "what is known of the model",
    r".*\.recurrent_states": "the state that a layer keeps of the last text it read",
    r"generation_config\.eos_token_id": (
        "tokens that end a turn of the chat template end an answer too"
    ),
}
"""Regular expression of a difference -> why a loaded base has it."""

_HELD_APART = ("_parameters", "_buffers", "_modules")
_HOOKS = re.compile(r"_\w*hooks(_\w+)?")


def differences(ours: PreTrainedModel, theirs: PreTrainedModel) -> list[str]:
    """Every difference that ALLOWED does not name: place, our value, transformers' value.

    Both have computed something before: RWKV divides weights in its first forward.
    """
    return [
        text
        for place, text in _all(ours, theirs)
        if not any(re.fullmatch(p, place) for p in ALLOWED)
    ]


def _all(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[str, str]]:
    own, other = (dict(model.named_modules(remove_duplicate=False)) for model in (ours, theirs))
    for path in sorted(own.keys() ^ other.keys()):
        yield path, f"module {path} is in one alone"
    for path in sorted(own.keys() & other.keys()):
        yield from _of_module(own[path], other[path], path)


def _of_module(ours: nn.Module, theirs: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    kind: type[nn.Module] = nn.Linear if type(ours) is FewRowsLinear else type(ours)
    if kind is not type(theirs):
        yield path, f"class of {path}: {type(ours).__name__} against {type(theirs).__name__}"
    yield from _of_values(_attributes(ours), _attributes(theirs), path)
    for kind in ("_parameters", "_buffers"):
        yield from _of_tensors(getattr(ours, kind), getattr(theirs, kind), path)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside tensors and modules; hooks, whose keys count up within a process,
    as a list."""
    found = {name: value for name, value in vars(module).items() if name not in _HELD_APART}
    return {
        name: list(value.values()) if _HOOKS.fullmatch(name) and value else value
        for name, value in found.items()
    }


def _of_tensors(
    ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None], path: str
) -> Iterator[tuple[str, str]]:
    for name in sorted(ours.keys() | theirs.keys()):
        pair = ours.get(name), theirs.get(name)
        if pair[0] is None or pair[1] is None:
            if pair[0] is not pair[1]:
                yield f"{path}.{name}", f"{path}.{name} is in one alone"
            continue
        for what, describe in _TENSOR.items():
            if describe(pair[0]) != describe(pair[1]):
                place = f"{what} of {path}.{name}"
                yield place, f"{place}: {describe(pair[0])} against {describe(pair[1])}"
        if pair[0].shape == pair[1].shape and not torch.equal(pair[0], pair[1].to(pair[0].dtype)):
            yield f"values of {path}.{name}", f"values of {path}.{name}"


_TENSOR: Mapping[str, Any] = {
    "type": lambda t: t.dtype,
    "shape": lambda t: tuple(t.shape),
    "stride": lambda t: t.stride(),
    "requires_grad": lambda t: t.requires_grad,
    "class": type,
    "attributes": vars,
}


def _of_values(ours: Any, theirs: Any, place: str) -> Iterator[tuple[str, str]]:
    pair = _opened(ours), _opened(theirs)
    if isinstance(pair[0], dict) and isinstance(pair[1], dict):
        for key in sorted(pair[0].keys() | pair[1].keys(), key=str):
            below = f"{place}.{key}".lstrip(".")
            sides = [side.get(key, "absent") for side in pair]
            if key in pair[0] and key in pair[1]:
                yield from _of_values(sides[0], sides[1], below)
            else:
                yield below, f"{below}: {sides[0]!r:.80} against {sides[1]!r:.80}"
    elif pair[0] != pair[1]:
        yield place, f"{place}: {pair[0]!r:.80} against {pair[1]!r:.80}"


def _opened(value: Any) -> Any:
    """Something with an equality of its own, or a dict of what the value holds."""
    if isinstance(value, PreTrainedConfig | GenerationConfig):
        return vars(value)
    if isinstance(value, WeightTransform):
        return repr(value)
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, dict):
        return value
    if isinstance(value, partial):
        return {"function": value.func, "arguments": value.args, **value.keywords}
    if isinstance(value, Tensor):
        return value.tolist()
    known = (
        str,
        bytes,
        int,
        float,
        set,
        frozenset,
        type,
        torch.dtype,
        torch.device,
        re.Pattern,
        type(None),
    )
    return value if isinstance(value, known) else type(value).__qualname__
