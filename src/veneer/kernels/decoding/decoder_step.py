"""The operations between the products of a decoder layer, one call each, rounded as in the models.

    add_norm   h' = h + scale * after(delta), x = norm(h'); each norm may be missing
    rotate     each pair (a, b) of a head becomes (a cos - b sin, b cos + a sin), in place
    gate       activation(gate) * up
    compact    copies without gaps, side by side
    cap        softcap * tanh(scale * factors * x / softcap), in place

For forwards without a gradient; compiled for float32 and bf16 on any processor
(native/layers/decoder_step.c). Shapes: N rows, D width, H heads, E head size, R its
rotated part.
"""

import torch
from torch import Tensor

from veneer.kernels.bindings import step_calls
from veneer.kernels.bindings.arguments import available
from veneer.kernels.bindings.row_calls import SILU
from veneer.kernels.dense.fused import (
    gated_reference,
    layer_norm_reference,
    rms_norm_reference,
    rotary_reference,
)
from veneer.kernels.rules import Norm

TYPES = (torch.float32, torch.bfloat16)


_NO_NORM = (None, 0.0, 0.0, False, False, None)


def usable(*tensors: Tensor | None) -> bool:
    """True if the kernels take these: contiguous tensors of one type, on the CPU."""
    present = [t for t in tensors if t is not None]
    dtype = present[0].dtype
    fit = all(t.dtype is dtype and t.is_cpu and t.is_contiguous() for t in present)
    return fit and dtype in TYPES and available("veneer_step_norm")


def add_norm(
    h_ND: Tensor,
    delta_ND: Tensor | None,
    norm: Norm | None,
    after: Norm | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Returns (h', x). h' is h if there is no delta; x is h' if there is no norm."""
    if delta_ND is None and norm is None:
        return h_ND, h_ND
    norms = [present for present in (norm, after) if present is not None]
    values = [value for present in norms for value in (present.weight, present.bias)]
    if not usable(h_ND, delta_ND, *values):
        return add_norm_reference(h_ND, delta_ND, norm, after, scale)
    added = None if delta_ND is None else torch.empty_like(h_ND)
    out = None if norm is None else torch.empty_like(h_ND)
    step_calls.step_norm(
        h_ND, delta_ND, added, out, scale, *(norm or _NO_NORM), *(after or _NO_NORM)
    )
    h = h_ND if added is None else added
    return h, h if out is None else out


def add_norm_reference(
    h_ND: Tensor,
    delta_ND: Tensor | None,
    norm: Norm | None,
    after: Norm | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Defines add_norm, in plain torch."""
    h = h_ND if delta_ND is None else h_ND + _normed(delta_ND, after) * scale
    return h, _normed(h, norm)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return x
    weight, epsilon, offset, is_wide, is_centred, bias = norm
    if is_centred:
        return layer_norm_reference(x, weight, bias, epsilon, offset)
    return rms_norm_reference(x, weight, epsilon, offset=offset, is_wide=is_wide)


def _have_rows(x: Tensor, other: Tensor | None) -> bool:
    """True if the kernels take these: as `usable`, with gaps between their rows or without."""
    tensors = (x,) if other is None else (x, other)
    fit = all(t.dtype is x.dtype and t.is_cpu and t.stride(-1) == 1 for t in tensors)
    return fit and x.dtype in TYPES and available("veneer_step_norm")


def rotate(
    q_NHE: Tensor, k_NHE: Tensor, cos_NR: Tensor, sin_NR: Tensor, *, neighbours: bool = False
) -> None:
    """Rotates the first R of the E values of each head of q and k, in place.

    cos_NR, sin_NR  of the firsts of the pairs, then of their seconds; by float32 angles values are
                    rounded once, not after each product
    neighbours      a pair is 2 i and 2 i + 1; otherwise i and R / 2 + i
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    types = (q_NHE.dtype, torch.float32)
    if _have_rows(q_NHE, k_NHE) and usable(cos_NR, sin_NR) and cos_NR.dtype in types:
        step_calls.step_rotate(q_NHE, k_NHE, cos_NR, sin_NR, neighbours)
    else:
        rotate_reference(q_NHE, k_NHE, cos_NR, sin_NR, neighbours=neighbours)


def rotate_reference(
    q_NHE: Tensor, k_NHE: Tensor, cos_NR: Tensor, sin_NR: Tensor, *, neighbours: bool = False
) -> None:
    """Defines rotate, in plain torch."""
    rotated = rotary_reference(q_NHE, k_NHE, cos_NR, sin_NR, neighbours=neighbours)
    for x, values in zip((q_NHE, k_NHE), rotated, strict=True):
        x.copy_(values)


def gate(gate_ND: Tensor, up_ND: Tensor | None, activation: int = SILU) -> Tensor:
    """Returns activation(gate) * up, or without up activation(gate). gate (N, D), or beside up
    (N, 1). Source: Shazeer 2020, arXiv:2002.05202, SwiGLU and GEGLU.

    activation: a number of bindings/row_calls.py
    """
    if not _have_rows(gate_ND, up_ND):
        return gated_reference(gate_ND, up_ND, activation)
    out = gate_ND.new_empty((gate_ND if up_ND is None else up_ND).shape)
    step_calls.step_gate(gate_ND, up_ND, out, activation)
    return out


def compact(*parts_NKW: Tensor) -> Tensor:
    """Returns copies of parts of rows (N, K W + ...), without gaps between groups of a part and
    side by side."""
    if not all(_have_rows(part, parts_NKW[0]) for part in parts_NKW):
        return torch.cat([part.flatten(1) for part in parts_NKW], dim=1)
    widths = [part.shape[1] * part.shape[2] for part in parts_NKW]
    out = parts_NKW[0].new_empty(len(parts_NKW[0]), sum(widths))
    for part, own in zip(parts_NKW, out.split(widths, dim=1), strict=True):
        strides = out.stride(0), part.shape[2], 1
        step_calls.step_copy(part, own.as_strided(part.shape, strides))
    return out


def cap(
    x_NV: Tensor, scale: float, softcap: float | None = None, factors_V: Tensor | None = None
) -> Tensor:
    """Changes x to scale * factors * x, and then to softcap * tanh(x / softcap) if there is a
    softcap, in place; returns x."""
    if scale == 1.0 and softcap is None and factors_V is None:
        return x_NV
    if usable(x_NV, factors_V):
        step_calls.step_cap(x_NV, factors_V, scale, softcap or 0.0)
        return x_NV
    return x_NV.copy_(cap_reference(x_NV, scale, softcap, factors_V))


def cap_reference(
    x_NV: Tensor, scale: float, softcap: float | None = None, factors_V: Tensor | None = None
) -> Tensor:
    """Defines cap, in plain torch, in another tensor."""
    x = (x_NV if factors_V is None else x_NV * factors_V) * scale
    return x if softcap is None else torch.tanh(x / softcap) * softcap
