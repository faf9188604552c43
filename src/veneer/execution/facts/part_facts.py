"""Finds what norms and gated feed-forward blocks compute, by running them on small random
projections (layer_facts.py)."""

from collections.abc import Container
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.placement.wrapping import unwrapped
from veneer.execution.agreement import EXACT, PART, agrees
from veneer.execution.facts.layer_facts import (
    ACTIVATIONS,
    DOWN,
    GATE_UP,
    JOINED_GATE_UP,
    NUMBERED_GATE_UP,
    FeedForward,
    Norm,
)
from veneer.execution.facts.small_modules import (
    WIDTH,
    passes_values_on,
    random_rows,
    small_linear,
    with_children,
    with_small_weight,
)
from veneer.kernels.dense.fused import gated, layer_norm_reference, rms_norm, rms_norm_reference
from veneer.linear import frozen_linear
from veneer.private.torch import children_of, parameters_of, replace_parameters

NORM_KINDS = ((0.0, False), (0.0, True), (1.0, True))
"""(offset, is_wide) of the kinds of norms that find_norm tries; all LayerNorms are wide."""
EPSILONS = (1e-5, 1e-6)
"""Epsilons that are tried of a norm whose module does not say its own."""
INNER = 12
"""Inner size of the small feed-forward block that is tried."""
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
"""Names of the activation in a feed-forward block."""
SCALES = ("gate_multiplier", "down_multiplier")
"""Names of what the outputs of gate and of down are multiplied by."""


@torch.no_grad()
def find_norm(module: nn.Module, name: str = "", row: Tensor | None = None) -> Norm | None:
    """Returns the facts of an RMS norm or a LayerNorm; None for any other module.

    row: values (D) that the norm takes, for a LayerNorm without a weight.
    """
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters(recurse=False)]
    is_layer_norm = "LayerNorm" in type(module).__name__
    if any(module.children()):
        return None
    if is_layer_norm and not names and row is not None:
        epsilons = EPSILONS if epsilon is None else (epsilon,)
        found = (_find_bare_norm(module, own, name, row) for own in epsilons)
        return next((norm for norm in found if norm is not None), None)
    if not isinstance(epsilon, float):
        return None
    if is_layer_norm and names in (["weight"], ["weight", "bias"]):
        return _find_layer_norm(module, epsilon, name)
    if names != ["weight"] or not type(module).__name__.endswith("RMSNorm"):
        return None
    small, weight = with_small_weight(module)
    x = random_rows(weight.shape[-1], weight.dtype).to(weight.device)
    for tolerance in (EXACT, PART):
        for offset, is_wide in NORM_KINDS:
            kind: dict[str, Any] = {"offset": offset, "is_wide": is_wide}
            norm = rms_norm_reference if tolerance is EXACT else rms_norm
            if agrees(
                partial(norm, weight=weight, epsilon=epsilon, **kind), small, (x,), tolerance
            ):
                return Norm(module, epsilon, offset, is_wide, name)
    return None


def _find_layer_norm(module: nn.Module, epsilon: float, name: str) -> Norm | None:
    small, weight = with_small_weight(module)
    x, own_bias = random_rows(weight.shape[-1], weight.dtype).to(weight.device), None
    if weight.dim() != 1:
        return None
    if parameters_of(module).get("bias") is not None:
        own_bias = weight.flip(0)
        bias = nn.Parameter(own_bias, requires_grad=False)
        replace_parameters(small, {"weight": small.get_parameter("weight"), "bias": bias})

    for offset in dict.fromkeys(offset for offset, _ in NORM_KINDS):
        own = weight, own_bias, epsilon, offset
        if agrees(lambda x, own=own: layer_norm_reference(x, *own), small, (x,), PART):
            return Norm(module, epsilon, offset, is_wide=True, name=name, is_centred=True)
    return None


def _find_bare_norm(module: nn.Module, epsilon: float, name: str, row: Tensor) -> Norm | None:
    """Returns the facts of a LayerNorm without weight and bias."""
    x = random_rows(len(row), row.dtype).to("cpu" if row.is_meta else row.device)
    ones = torch.ones_like(row)
    norm = partial(layer_norm_reference, weight=torch.ones_like(x[0]), bias=None, epsilon=epsilon)
    if not agrees(norm, module, (x,), PART):
        return None
    return Norm(module, epsilon, is_wide=True, name=name, is_centred=True, ones=ones)


def names_in_gate(children: Container[str]) -> tuple[tuple[str, ...], str]:
    """Returns the names of the modules that compute gate and up, and of the one that computes
    down."""
    known: list[tuple[str, ...]] = [(name,) for name in JOINED_GATE_UP if name in children]
    known += [NUMBERED_GATE_UP] if NUMBERED_GATE_UP[0] in children else []
    return known[0] if known else GATE_UP, next((d for d in DOWN if d in children), DOWN[0])


@torch.no_grad()
def find_feed_forward(module: nn.Module) -> FeedForward | None:
    """Returns the facts of a feed-forward block, gated or plain; None for any other module, for
    instance one that clips its values."""
    children = children_of(module)
    activation_name = next((name for name in ACTIVATION_NAMES if name in children), "")
    activation = children.get(activation_name)
    names = [name for name, part in children.items() if not passes_values_on(part)]
    inputs, output = names_in_gate(names)
    if activation is None and ({*names} != {*inputs, output} or parameters_of(module)):
        return None
    if activation is not None:
        if any(True for _ in activation.parameters()):
            return None
        names.remove(activation_name)
    layers = 2  # gate and up, or gate alone
    if {*names} != {*inputs, output}:
        if len(names) != 2:
            return None
        inputs, output, layers = (names[0],), names[1], 1
    views = [frozen_linear(unwrapped(module.get_submodule(name))) for name in (*inputs, output)]
    linears = [view for view in views if view is not None]
    if len(linears) != len(views):
        return None
    width = sum(view.out_features for view in linears[:-1]) // layers
    # A function that is no module is seen in the results alone, which float32 tells apart.
    dtype = torch.float32 if activation is None else linears[0].dtype
    sizes = [*((WIDTH, layers // len(inputs) * INNER) for _ in inputs), (INNER, WIDTH)]
    *projections, down = (small_linear(*size, dtype, seed) for seed, size in enumerate(sizes))
    small = with_children(module, dict(zip((*inputs, output), (*projections, down), strict=True)))

    def computed(x: Tensor, kind: int) -> Tensor:
        outputs = torch.cat([project(x) for project in projections], dim=-1)
        gate, up = (outputs, None) if layers == 1 else outputs.chunk(2, dim=-1)
        return down(gated(gate * gate_scale, up, kind)) * scale

    x = torch.linspace(-4, 4, 64, device="cpu")[None]
    gate_scale, scale = (float(getattr(module, own, 1.0)) for own in SCALES)
    for kind in ACTIVATIONS:
        ours = partial(gated, up=torch.ones_like(x), activation=kind)
        rows = random_rows(WIDTH, dtype)
        alike = activation is None or agrees(ours, activation, (x,), PART)
        if alike and agrees(partial(computed, kind=kind), small, (rows,), PART):
            return FeedForward(module, kind, width, inputs, output, gate_scale, scale)
    return None
