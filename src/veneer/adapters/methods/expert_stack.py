"""Reads the operands of a mixture's node (kernels/layers/experts.py) from modules and adapters."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from veneer.adapters.methods.lora import LoRALayer
from veneer.kernels.bindings.row_calls import GELU_ERF, GELU_TANH, SILU
from veneer.kernels.dense.fused import gated_reference
from veneer.kernels.layers.expert_operands import Experts, ExpertUpdate, Matrices, StackFactors
from veneer.private.transformers import gate_of


def stack_update(rows: slice, layers: Mapping[str, LoRALayer], weight: float) -> ExpertUpdate:
    """Returns what the layers of an adapter add to a gated stack, on these rows."""

    def factors(name: str) -> StackFactors | None:
        layer = layers.get(name)
        return None if layer is None else StackFactors(*layer.factors(), layer.scaling * weight)

    return ExpertUpdate(rows, factors("gate_up_proj"), factors("down_proj"))


def frozen_experts(stack: nn.Module, *, transposed: bool) -> Experts:
    """Returns the frozen part of a gated stack that is not packed."""

    def matrices(name: str) -> Matrices:
        bias: Tensor | None = getattr(stack, f"{name}_bias", None)
        weight = stack.get_parameter(name).detach()
        return Matrices(weight, None if bias is None else bias.detach(), transposed)

    gate = gate_of(stack)
    assert gate is not None
    return Experts(matrices("gate_up_proj"), matrices("down_proj"), gate, activation_of(gate))


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
