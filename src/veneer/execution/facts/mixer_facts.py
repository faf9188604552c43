"""Finds what mixers compute that pass a state from token to token (layer_facts.Mixer).

They are known by the names and sizes of their parts. Whether they compute what these lead to expect
is proven with the model, on a small copy first (decode_step.py)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer.adapters.placement.wrapping import unwrapped
from veneer.execution.agreement import PART, agrees
from veneer.execution.facts.layer_facts import (
    IN_PROJECTION,
    OUT_PROJECTION,
    Mixer,
    Norm,
    ShortConvolution,
    StateSpace,
)
from veneer.execution.facts.part_facts import NORM_KINDS
from veneer.execution.facts.small_modules import passes_values_on, random_rows, with_small_weight
from veneer.kernels.dense.fused import rms_norm
from veneer.linear import frozen_linear
from veneer.private.torch import parameters_of

CONVOLUTIONS = ("conv", "conv1d")
RATES = ("A_log", "D", "dt_bias")
"""Parameters of a state space, one number a head: rates, skip and bias (state_step.HeadRates)."""
SIZES = ("num_heads", "head_dim", "n_groups", "ssm_state_size")


@torch.no_grad()
def find_mixer(module: nn.Module) -> Mixer | None:
    """Returns the facts of a mixer; None for any other module."""
    parts = {
        name: unwrapped(child)
        for name, child in module.named_children()
        if not passes_values_on(child)
    }
    name = next((name for name in CONVOLUTIONS if name in parts), "")
    convolution, number = parts.pop(name, None), getattr(module, "layer_idx", None)
    views = [parts.pop(part, None) for part in (IN_PROJECTION, OUT_PROJECTION)]
    linears = [view for part in views if part and (view := frozen_linear(part)) is not None]
    if not isinstance(convolution, nn.Conv1d) or not isinstance(number, int) or len(linears) != 2:
        return None
    channels, joined, width = (
        convolution.in_channels,
        linears[0].out_features,
        linears[1].in_features,
    )
    by_channel = convolution.groups == convolution.out_channels == channels
    if not by_channel or (convolution.stride, convolution.dilation) != ((1,), (1,)):
        return None
    own = {name for name, value in parameters_of(module).items() if value is not None}
    if not parts and not own and width == channels and joined == 3 * channels:
        return ShortConvolution(module, number, name)
    sizes: list[Any] = [getattr(module, size, None) for size in SIZES]
    if own != {*RATES} or not all(isinstance(size, int) for size in sizes):
        return None
    heads, size, groups, state = sizes
    beside = 2 * groups * state
    fits = (width, channels, joined) == (heads * size, width + beside, 2 * width + beside + heads)
    activation, norm = parts.pop("act", None), parts.pop("norm", None)
    is_silu = getattr(module, "activation", None) == "silu" and isinstance(activation, nn.Module)
    if not fits or not is_silu or norm is None or parts:
        return None
    if (found := _find_gated_norm(norm)) is None:
        return None
    return StateSpace(module, number, name, heads, size, groups, state, *found)


def _find_gated_norm(module: nn.Module) -> tuple[Norm, bool] | None:
    """Returns the norm of a module, and whether it multiplies its input by silu(gate), not its
    output."""
    epsilon, names = getattr(module, "variance_epsilon", None), [*parameters_of(module)]
    if not isinstance(epsilon, float) or names != ["weight"] or any(module.children()):
        return None
    small, weight = with_small_weight(module)
    x = random_rows(weight.shape[-1], weight.dtype).to(weight.device)
    gate = x.roll(1, -1).clamp(-4, 4)

    def computed(x: Tensor, norm: Any, gate_first: bool) -> Tensor:
        times = F.silu(gate.float())
        return norm((x * times).to(x.dtype)) if gate_first else (norm(x) * times).to(x.dtype)

    for gate_first in (True, False):
        for offset, is_wide in NORM_KINDS:
            kind: dict[str, Any] = {"offset": offset, "is_wide": is_wide}
            norm = partial(rms_norm, weight=weight, epsilon=epsilon, **kind)
            ours = partial(computed, norm=norm, gate_first=gate_first)
            if agrees(ours, partial(small, gate=gate), (x,), PART):
                return Norm(module, epsilon, offset, is_wide, "norm"), gate_first
    return None
