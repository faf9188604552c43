"""Finds what the router and the block of a mixture of experts compute, by running them on random
rows (layer_facts.py)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.methods.expert_stack import is_gated_stack
from veneer.adapters.placement.wrapping import unwrapped
from veneer.execution.facts.layer_facts import FeedForwardBlock, Mixture
from veneer.execution.facts.part_facts import find_feed_forward
from veneer.execution.facts.small_modules import ROWS, passes_values_on, with_children
from veneer.kernels.decoding.expert_step import route_reference
from veneer.linear import PackedExperts, frozen_linear
from veneer.private.torch import buffers_of, children_of, parameters_of, replace_parameters


@torch.no_grad()
def find_mixture(module: nn.Module) -> Mixture | None:
    """Returns the facts of a block whose router takes the largest logits and weights them by their
    softmax, beside which there may be a shared expert; None for any other module."""
    parts = {
        name: unwrapped(child)
        for name, child in children_of(module).items()
        if child is not None and not passes_values_on(child)
    }
    stacks = [name for name, part in parts.items() if _is_stack(part)]
    shared = [
        FeedForwardBlock(name, facts)
        for name, part in parts.items()
        if name not in stacks and (facts := find_feed_forward(part)) is not None
    ]
    known = {*stacks, *(block.name for block in shared)}
    gates = [name for name, part in parts.items() if name not in known and _is_gate(part)]
    routers = [name for name in parts if name not in {*known, *gates}]
    if len(shared) > 1 or len(gates) > len(shared):
        return None
    if len(stacks) != 1 or len(routers) != 1 or _own_parameters(module):
        return None
    router = parts[routers[0]]
    if _own_parameters(router) not in ({"weight"}, {"weight", "bias"}) or any(router.children()):
        return None
    if buffers_of(router) or router.get_parameter("weight").dim() != 2:
        return None
    small, weight, bias = _with_random_parameters(router)
    x = torch.randn(ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    outputs = _outputs(small, x)
    beside = shared[0] if shared else None, gates[0] if gates else ""
    if outputs is None or not _gives(module, routers[0], stacks[0], *beside, x):
        return None
    index, weights = outputs
    chosen = index.shape[1]
    for is_normal in (True, False):
        own_index, own = route_reference(
            F.linear(x, weight, bias), chosen, is_normal=is_normal, weight_type=torch.float32
        )
        if torch.equal(own_index, index) and torch.allclose(own, weights, rtol=1e-4, atol=1e-7):
            is_wide = _weight_type(small) is torch.float32
            kind = chosen, is_normal, is_wide
            return Mixture(
                module, routers[0], stacks[0], *kind, shared=beside[0], shared_gate=beside[1]
            )
    return None


def _own_parameters(module: nn.Module) -> set[str]:
    return {name for name, own in parameters_of(module).items() if own is not None}


def _is_stack(module: nn.Module) -> bool:
    return isinstance(module, PackedExperts) or is_gated_stack(module)


def _is_gate(module: nn.Module) -> bool:
    """Whether it is a linear layer with one output."""
    linear = frozen_linear(module)
    return linear is not None and linear.out_features == 1


def _with_random_parameters(router: nn.Module) -> tuple[nn.Module, Tensor, Tensor | None]:
    """Returns a copy of a router in float32, with its weight and its bias."""
    draw, small = torch.Generator().manual_seed(1), copy.copy(router)
    values = {
        name: torch.randn(own.shape, generator=draw)
        for name, own in parameters_of(router).items()
        if own is not None
    }
    _replace(small, values)
    return small, values["weight"], values.get("bias")


def _replace(router: nn.Module, values: dict[str, Tensor]) -> None:
    parameters: dict[str, nn.Parameter | None] = dict.fromkeys(parameters_of(router))
    parameters |= {name: nn.Parameter(own, requires_grad=False) for name, own in values.items()}
    replace_parameters(router, parameters)


def _outputs(router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns the numbers and the weights of the experts of x, if the router gives logits, weights
    and numbers."""
    try:
        outputs: Any = router(x)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return None
    if not isinstance(outputs, tuple) or len(outputs) != 3:
        return None
    _, weights, index = outputs
    if index.dtype is not torch.int64 or index.dim() != 2 or weights.shape != index.shape:
        return None
    return index, weights


def _weight_type(router: nn.Module) -> torch.dtype | None:
    """Returns the type of the weights that a router gives rows in bf16."""
    half = copy.copy(router)
    own = {
        name: value.bfloat16() for name, value in parameters_of(router).items() if value is not None
    }
    _replace(half, own)
    outputs = _outputs(half, torch.ones(1, own["weight"].shape[1], dtype=torch.bfloat16))
    return None if outputs is None else outputs[1].dtype


class _Router(nn.Module):
    """Gives each row experts 2 and 0, with weights of its own."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = x[:, :2].abs()
        return x, weights, torch.tensor([[2, 0]]).expand(len(x), 2)


class _Stack(nn.Module):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x * (index * weights).sum(1, keepdim=True) + weights[:, :1]


class _SharedExpert(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


class _Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :1]


def _gives(
    module: nn.Module,
    router: str,
    experts: str,
    shared: FeedForwardBlock | None,
    gate: str,
    x: Tensor,
) -> bool:
    """Whether a block gives what its experts give by the router's numbers and weights, and in sum
    with it what its shared expert gives."""
    places: dict[str, nn.Module] = {router: _Router(), experts: _Stack()}
    places |= {} if shared is None else {shared.name: _SharedExpert()}
    places |= {gate: _Gate()} if gate else {}
    try:
        y = with_children(module, places)(x[None])
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    _, weights, index = _Router()(x)
    expected = _Stack()(x, index, weights)
    if shared is not None:
        of_shared = _SharedExpert()(x)
        expected = expected + (of_shared * _Gate()(x).sigmoid() if gate else of_shared)
    y = y[0] if isinstance(y, tuple) else y
    return (
        isinstance(y, Tensor) and y.numel() == x.numel() and torch.equal(y.view(x.shape), expected)
    )
