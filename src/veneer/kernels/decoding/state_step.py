"""Passes the states of texts on by one token, each read in one slot and written to another.

    window   the last values of a short convolution, with what is multiplied before and behind it
    space    S' = exp(-exp(log_rate) t) S + t x b^T, y = S' c + skip x, t = softplus(step + bias): a
             state space (Dao and Gu 2024, arXiv:2405.21060)
    delta    S' = d S + k (b (v - k^T d S))^T, y = q^T S', d = exp(-exp(log_rate) t): a gated delta
             rule (Yang et al. 2024, arXiv:2412.06464)

Compiled for bf16 and float32 (native/layers/states.c); plain torch takes everything else and
defines the result. Shapes: N rows, S slots, C channels, L values of a window, K taps, H heads, G
groups of heads, P size and W width of a head's state.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings import state_calls
from veneer.kernels.bindings.arguments import available

TYPES = (torch.float32, torch.bfloat16)
EPSILON = 1e-6
"""Added to the squared lengths of q and k, so that no zero divides them."""


class SlotStates(NamedTuple):
    """The states of N rows: `stored` (S, ...), read in the slots `read` (N), and to be written to
    the slots `written` (N), which are others."""

    stored: Tensor
    read: Tensor
    written: Tensor

    def values(self) -> Tensor:
        """Returns a copy of what is read, (N, ...)."""
        return self.stored[self.read]

    def put(self, values: Tensor) -> None:
        self.stored[self.written] = values.to(self.stored.dtype)


class HeadRates(NamedTuple):
    """Values of each head of a state space, (H): the logarithm of its rate, the factor of x that is
    added to y, and the bias of its step."""

    log_rate: Tensor
    skip: Tensor
    bias: Tensor


def window(
    states: SlotStates,
    x_NC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    before_NC: Tensor | None = None,
    behind_NC: Tensor | None = None,
    has_silu: bool = False,
) -> Tensor:
    """Returns behind * silu(bias + sums of the weights times the last K values) (N, C), of which
    before * x is the newest. states (S, C, at least K - 1). Without has_silu there is no silu."""
    beside = before_NC, behind_NC
    rest = [t for t in (states.stored, weight_CK, bias_C) if t is not None]
    if not _fit(x_NC, *beside) or not all(
        t.dtype is x_NC.dtype and t.is_contiguous() for t in rest
    ):
        return window_reference(
            states,
            x_NC,
            weight_CK,
            bias_C,
            before_NC=before_NC,
            behind_NC=behind_NC,
            has_silu=has_silu,
        )
    out = x_NC.new_empty(x_NC.shape)
    state_calls.state_window(x_NC, *beside, weight_CK, bias_C, *states, out, has_silu)
    return out


def window_reference(
    states: SlotStates,
    x_NC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None = None,
    *,
    before_NC: Tensor | None = None,
    behind_NC: Tensor | None = None,
    has_silu: bool = False,
) -> Tensor:
    """Defines window, in plain torch."""
    newest = x_NC if before_NC is None else x_NC * before_NC
    values = torch.cat([states.values(), newest[..., None].to(states.stored.dtype)], dim=-1)
    states.put(values[..., 1:])
    sums = (values[..., -weight_CK.shape[1] :].float() * weight_CK.float()).sum(-1)
    y = (sums if bias_C is None else sums + bias_C.float()).to(x_NC.dtype)
    y = F.silu(y) if has_silu else y
    return y if behind_NC is None else y * behind_NC


def space(
    states: SlotStates,
    x_NHP: Tensor,
    b_NGW: Tensor,
    c_NGW: Tensor,
    step_NH: Tensor,
    rates: HeadRates,
    gate_NHP: Tensor | None = None,
    *,
    groups: int,
) -> Tensor:
    """Returns y (N, H P), times silu(gate) if there is a gate; states (S, H, P, W) float32. The
    heads of a row lie side by side, and so do its groups."""
    rows, types = (x_NHP, b_NGW, c_NGW, step_NH, gate_NHP), {values.dtype for values in rates}
    stored = states.stored
    fit = stored.dtype is torch.float32 and stored.shape[-1] <= state_calls.MOST_WIDTH
    if not fit or len(types) > 1 or not types <= {*TYPES} or not _fit(*rows):
        return space_reference(states, *rows[:4], rates, gate_NHP, groups=groups)
    out = x_NHP.new_empty(x_NHP.shape)
    read, written = states.read, states.written
    state_calls.state_space(stored, *rows, *rates, read, written, out, groups)
    return out


def space_reference(
    states: SlotStates,
    x_NHP: Tensor,
    b_NGW: Tensor,
    c_NGW: Tensor,
    step_NH: Tensor,
    rates: HeadRates,
    gate_NHP: Tensor | None = None,
    *,
    groups: int,
) -> Tensor:
    """Defines space, in plain torch."""
    heads = step_NH.shape[1]
    x = x_NHP.float().unflatten(1, (heads, -1))
    b, c = (
        rows.float().unflatten(1, (groups, -1)).repeat_interleave(heads // groups, dim=1)
        for rows in (b_NGW, c_NGW)
    )
    step = F.softplus((step_NH.float() + rates.bias.float()).to(step_NH.dtype).float())
    decay = (-rates.log_rate.float().exp() * step).exp()
    added = x[..., None] * (step[..., None] * b)[:, :, None]
    state = states.values() * decay[..., None, None] + added
    states.put(state)
    y = (state @ c[..., None])[..., 0] + x * rates.skip.float()[:, None]
    y = y.flatten(1)
    return (y if gate_NHP is None else y * F.silu(gate_NHP.float())).to(x_NHP.dtype)


def delta(
    states: SlotStates,
    qkv_NC: Tensor,
    step_NGR: Tensor,
    strength_NGR: Tensor,
    log_rate_H: Tensor,
    bias_H: Tensor,
    *,
    most_strength: float = 1.0,
) -> Tensor:
    """Returns y (N, H W); states (S, H, P, W) float32. qkv is q and k of each of G groups, then v
    of each of H heads, of which H / G share a group; q and k are brought to length 1, and q is
    divided by sqrt(P). t = softplus(step + bias), b = most_strength * sigmoid(strength)."""
    stored, (_, heads, size, width) = states.stored, states.stored.shape
    rows, types = (qkv_NC, step_NGR, strength_NGR), {log_rate_H.dtype, bias_H.dtype}
    fit = stored.dtype is torch.float32 and size <= state_calls.MOST_WIDTH
    if not fit or len(types) > 1 or not types <= {*TYPES} or not _fit(*rows):
        rates = log_rate_H, bias_H
        return delta_reference(states, *rows, *rates, most_strength=most_strength)
    out = qkv_NC.new_empty(len(qkv_NC), heads * width)
    given = step_NGR, strength_NGR, qkv_NC, log_rate_H, bias_H
    state_calls.state_delta(
        stored, *given, states.read, states.written, out, most_strength, EPSILON
    )
    return out


def delta_reference(
    states: SlotStates,
    qkv_NC: Tensor,
    step_NGR: Tensor,
    strength_NGR: Tensor,
    log_rate_H: Tensor,
    bias_H: Tensor,
    *,
    most_strength: float = 1.0,
) -> Tensor:
    """Defines delta, in plain torch."""
    _, heads, size, width = states.stored.shape
    groups = step_NGR.shape[1]
    q, k, v = qkv_NC.float().split((groups * size, groups * size, heads * width), dim=1)
    q, k = (
        (x * (x.square().sum(-1, keepdim=True) + EPSILON).rsqrt()).repeat_interleave(
            heads // groups, dim=1
        )
        for x in (q.unflatten(1, (groups, size)), k.unflatten(1, (groups, size)))
    )
    decay = (-log_rate_H.float().exp() * F.softplus(step_NGR.flatten(1).float() + bias_H)).exp()
    strength = strength_NGR.flatten(1).sigmoid().float() * most_strength
    state = states.values() * decay[..., None, None]
    missing = v.unflatten(1, (heads, width)) - (state * k[..., None]).sum(-2)
    state = state + k[..., None] * (missing * strength[..., None])[:, :, None]
    states.put(state)
    return (state * q[..., None]).sum(-2).div(size**0.5).flatten(1).to(qkv_NC.dtype)


def _fit(x: Tensor, *rows: Tensor | None) -> bool:
    """True if the kernels take these: rows of one type on the CPU, with gaps between them or
    without."""
    present = [t for t in (x, *rows) if t is not None]
    fit = all(t.dtype is x.dtype and t.is_cpu and t.stride(-1) == 1 for t in present)
    return fit and x.dtype in TYPES and available("veneer_state_window")
