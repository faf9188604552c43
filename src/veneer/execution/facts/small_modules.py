"""Small copies of modules and random rows, on which facts about modules are tried."""

import copy
from collections.abc import Container, Iterator, Mapping
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.placement.wrapping import unwrapped
from veneer.linear import frozen_linear
from veneer.private.torch import children_of, parameters_of, replace_children, replace_parameters

WIDTH, ROWS = 8, 5
"""Sizes of the rows that parts are tried on."""


def small_linear(ins: int, outs: int, dtype: torch.dtype, seed: int) -> nn.Linear:
    linear = nn.Linear(ins, outs, bias=False, device="meta")
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(outs, ins, generator=draw).to(dtype)
    linear.weight = nn.Parameter(values, requires_grad=False)
    return linear


def with_children(module: nn.Module, children: Mapping[str, nn.Module]) -> Any:
    """Returns a copy of a module in which these children replace its own of the same names."""
    small = object.__new__(type(module))  # FSDP2's class calls __init__ where it is copied
    vars(small).update(vars(module))
    replace_children(small, {**children_of(module), **children})
    return small


def with_small_weight(module: nn.Module, device: str | None = None) -> tuple[nn.Module, Tensor]:
    """Returns a copy of a norm with a random weight near 1, and this weight. They are on the norm's
    own device, on the CPU if it has no values."""
    own = module.get_parameter("weight")
    draw = torch.Generator().manual_seed(0)
    target = device or ("cpu" if own.is_meta else own.device)
    weight = torch.rand(own.shape, generator=draw).add_(0.5).to(own.dtype).to(target)
    small = copy.copy(module)
    missing = {name: None for name, value in parameters_of(module).items() if value is None}
    replace_parameters(small, {**missing, "weight": nn.Parameter(weight, requires_grad=False)})
    return small, weight


def first_of(outputs: Any) -> Tensor:
    """Returns what a layer or a block gives: a tensor, or the first of (x,) or (x, None)."""
    if not isinstance(outputs, tuple):
        return outputs
    x, *others = outputs
    if others not in ([], [None]):
        raise ValueError("its second output is used")
    return x


def unset_arguments(module: nn.Module, given: Container[str]) -> dict[str, None]:
    """Returns None for each argument of a module's forward behind its input that has no default and
    is not given: the biases of positions of models that may have none."""
    _, *beside = signature(module.forward).parameters.values()
    kinds = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
    return {
        own.name: None
        for own in beside
        if own.kind in kinds and own.default is Parameter.empty and own.name not in given
    }


def beside_linears(module: nn.Module) -> Iterator[nn.Module]:
    """Yields a module and its parts, but for linear layers and what lies within these."""
    if frozen_linear(unwrapped(module)) is None:
        yield module
        for child in module.children():
            yield from beside_linears(child)


def passes_values_on(module: nn.Module) -> bool:
    """Whether it is the identity, or a dropout that drops nothing, now or ever: models stay in eval
    mode."""
    if type(module) is nn.Identity:
        return True
    return type(module) is nn.Dropout and not (module.training and module.p)


def random_rows(width: int, dtype: torch.dtype) -> Tensor:
    """Returns (ROWS, width) random values, from small to large rows, so that a part that clips
    values or adds a small one gives another result. In float16 all rows have one scale."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.finfo(dtype).max > 1e30
    scale = torch.logspace(-2, 6, ROWS) if wide else torch.full((ROWS,), 3.0)
    return (torch.randn(ROWS, width, generator=draw) * scale[:, None]).to(dtype)
