"""Reads what a stack of experts is, and the operands of its products, from modules and adapters."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from veneer.adapters.methods.lora import LoRALayer
from veneer.kernels.bindings.row_calls import GELU_ERF, GELU_TANH, SILU
from veneer.kernels.dense.fused import gated_reference
from veneer.kernels.layers.expert_operands import (
    Experts,
    ExpertUpdate,
    Matrices,
    PackedStack,
    StackFactors,
)
from veneer.linear import FrozenLinear, PackedExperts, SliceLinear
from veneer.private.transformers import gate_of

STACKS = "gate_up_proj", "down_proj"
"""Parameters of a gated stack, in the order in which they are multiplied."""


def stack_key(key: str, name: str) -> str:
    """Returns the key of an adapter's factors of one parameter, from that of the stack's
    wrapper."""
    return f"{key}.{name}"


def stack_update(rows: slice, layers: Mapping[str, LoRALayer], weight: float) -> ExpertUpdate:
    """Returns what the layers of an adapter add to a gated stack, on these rows."""

    def factors(name: str) -> StackFactors | None:
        layer = layers.get(name)
        return None if layer is None else StackFactors(*layer.factors(), layer.scaling * weight)

    return ExpertUpdate(rows, factors("gate_up_proj"), factors("down_proj"))


def frozen_experts(stack: nn.Module) -> Experts:
    """Returns the frozen part of a gated stack."""

    def matrices(name: str) -> Matrices:
        bias: Tensor | None = getattr(stack, f"{name}_bias", None)
        weight: Tensor | PackedStack
        if isinstance(stack, PackedExperts):
            shape = stack.packed_shapes()[name]
            decode, blocks = partial(stack.decoded, name), stack.nf4_blocks(name)
            weight = PackedStack(shape, stack.dtype, decode, blocks)
        else:
            weight = stack.get_parameter(name).detach()
        return Matrices(weight, None if bias is None else bias.detach(), is_transposed(stack))

    gate = gate_of(stack)
    assert gate is not None
    return Experts(matrices("gate_up_proj"), matrices("down_proj"), gate, _known(stack, gate))


_ACTIVATIONS: WeakKeyDictionary[nn.Module, tuple[Any, int | None]] = WeakKeyDictionary()
"""Activation modules of stacks, and what was found of their gates."""


def _known(stack: nn.Module, gate: Callable[[Tensor], Tensor]) -> int | None:
    own = getattr(stack, "act_fn", None)
    known = _ACTIVATIONS.get(stack)
    if known is None or known[0] is not own:
        known = _ACTIVATIONS[stack] = own, activation_of(gate)
    return known[1]


def activation_of(gate: Callable[[Tensor], Tensor]) -> int | None:
    """Returns the activation of a gate that computes activation(first half) * second half, by its
    values. Returns None for another gate, for instance one with bounds or with neighbours as
    pairs."""
    values = torch.linspace(-3, 3, 32, device="cpu")
    x = torch.stack([values, 1000 * values.flip(0), values.roll(5) ** 3])
    try:
        y = gate(x)
    except (RuntimeError, ValueError):
        return None
    first, second = x.chunk(2, dim=-1)
    for activation in (SILU, GELU_TANH, GELU_ERF):
        expected = gated_reference(first, second, activation)
        if y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-5, atol=1e-6):
            return activation
    return None


def expert_linear(experts: nn.Module, name: str, expert: int) -> FrozenLinear:
    if isinstance(experts, PackedExperts):
        return experts.expert(name, expert)
    return SliceLinear(experts.get_parameter(name)[expert], transposed=is_transposed(experts))


def expert_bias(experts: nn.Module, name: str, expert: int) -> Tensor | None:
    bias: Tensor | None = getattr(experts, f"{name}_bias", None)
    return None if bias is None else bias[expert]


def step_experts(stack: nn.Module) -> Experts | None:
    """Returns the frozen part of a gated stack, or None."""
    return frozen_experts(stack) if is_gated_stack(stack) else None


def is_transposed(experts: nn.Module) -> bool:
    return bool(getattr(experts, "is_transposed", False))


def is_expert_stack(module: nn.Module) -> bool:
    """Recognised by the attributes of transformers' decorator, or a class name ending in
    Experts."""
    decorated = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    return decorated or type(module).__name__.endswith("Experts")


def is_gated_stack(experts: nn.Module) -> bool:
    names = {name for name, _ in experts.named_parameters(recurse=False)}
    gated = {"gate_up_proj", "down_proj"} <= names and gate_of(experts) is not None
    return gated and not getattr(experts, "has_post_expert_norm", False)


def expert_parameters(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """name -> (E, O, I) of every 3-D floating (or packed) parameter of a stack of experts.

    Empty for other modules: a convolution or a recurrent gate may have three axes too.
    """
    if isinstance(module, PackedExperts):
        shapes = module.packed_shapes().items()
        return {n: (E, I, O) if is_transposed(module) else (E, O, I) for n, (E, O, I) in shapes}
    shapes_by_name: dict[str, tuple[int, int, int]] = {}
    if not is_expert_stack(module):
        return shapes_by_name
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and parameter.is_floating_point():
            E, O, I = parameter.shape
            shapes_by_name[name] = (E, I, O) if is_transposed(module) else (E, O, I)
    return shapes_by_name
