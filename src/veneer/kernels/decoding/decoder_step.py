"""The operations between the products of a decoder layer, one call each, rounded as in the models.

    add_norm   h' = h + delta, x = weight * h' / sqrt(mean(h'^2) + epsilon)
    rotate     each head (a, b) becomes (a cos - b sin, b cos + a sin), in place
    gate       silu(gate) * up

For forwards without a gradient; compiled for float32 and bf16 on any processor
(native/layers/decoder_step.c). Shapes: N rows, D width, H heads, E head size.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings import step_calls
from veneer.kernels.bindings.arguments import available

TYPES = (torch.float32, torch.bfloat16)


def usable(*tensors: Tensor | None) -> bool:
    """True if the kernels take these: contiguous tensors of one type, on the CPU."""
    present = [t for t in tensors if t is not None]
    dtype = present[0].dtype
    fit = all(t.dtype is dtype and t.is_cpu and t.is_contiguous() for t in present)
    return fit and dtype in TYPES and available("veneer_step_norm")


def add_norm(
    h_ND: Tensor, delta_ND: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Returns (h', x); h' is h if there is no delta.

    Source of the norm: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if not usable(h_ND, delta_ND, weight):
        return add_norm_reference(h_ND, delta_ND, weight, epsilon)
    out = torch.empty_like(h_ND)
    added = None if delta_ND is None else torch.empty_like(h_ND)
    step_calls.step_norm(h_ND, delta_ND, weight, added, out, epsilon)
    return h_ND if added is None else added, out


def add_norm_reference(
    h_ND: Tensor, delta_ND: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Defines add_norm, in plain torch."""
    h = h_ND if delta_ND is None else h_ND + delta_ND
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return h, weight * normal.to(h.dtype)


def rotate(q_NX: Tensor, k_NX: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> None:
    """Turns q (N, H E) and k (N, K E) in place. Source: Su et al. 2021, arXiv:2104.09864."""
    if usable(q_NX, k_NX, cos_NE, sin_NE):
        step_calls.step_rotate(q_NX, k_NX, cos_NE, sin_NE)
    else:
        rotate_reference(q_NX, k_NX, cos_NE, sin_NE)


def rotate_reference(q_NX: Tensor, k_NX: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> None:
    """Defines rotate, in plain torch."""
    for x in (q_NX, k_NX):
        heads = x.unflatten(1, (-1, cos_NE.shape[1]))
        first, second = heads.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        x.copy_((heads * cos_NE[:, None] + turned * sin_NE[:, None]).flatten(1))


def gate(gate_ND: Tensor, up_ND: Tensor) -> Tensor:
    """Returns silu(gate) * up. Source: Shazeer 2020, arXiv:2002.05202, SwiGLU."""
    if not usable(gate_ND, up_ND):
        return F.silu(gate_ND) * up_ND
    out = torch.empty_like(gate_ND)
    step_calls.step_gate(gate_ND, up_ND, out)
    return out
