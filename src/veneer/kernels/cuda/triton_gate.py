"""Gates of feed-forward blocks on CUDA, each way in one pass, float32 inside, rounded where models
round.

    silu    y = silu(gate) * up
    gelu    y = gelu(gate) * up, by its formula with tanh

As native/layers/fused.c. Bandwidth is all they cost: 6 bytes a value forward and 10 backward, in
bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.cuda.triton_numbers import DeviceKernel, as_rounded, rounded

_VALUES = 1024


@triton.jit
def _activation(gate, gelu: tl.constexpr):
    """The activation and its slope."""
    if gelu:
        # tanh(z) = 2 sigmoid(2 z) - 1
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        share = tl.sigmoid(inner)
        turn = 1.5957691216057308 * (1.0 + 0.134145 * gate * gate)
    else:
        share = tl.sigmoid(gate)
        turn = gate * 0.0 + 1.0
    return gate * share, share + gate * share * (1.0 - share) * turn


@triton.jit
def _values(tensor, place, inside):
    return tl.load(tensor + place, mask=inside, other=0.0).to(tl.float32)


@DeviceKernel
@triton.jit
def _forward(gate, up, out, count, gelu: tl.constexpr, size: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < count
    value = _values(gate, place, inside)
    beside = _values(up, place, inside)
    active, _ = _activation(value, gelu)
    found = as_rounded(active, out.dtype.element_ty) * beside
    tl.store(out + place, rounded(found, out.dtype.element_ty), mask=inside)


@DeviceKernel
@triton.jit
def _backward(gate, up, grad, grad_gate, grad_up, count, gelu: tl.constexpr, size: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < count
    value = _values(gate, place, inside)
    beside = _values(up, place, inside)
    given = _values(grad, place, inside)
    active, slope = _activation(value, gelu)
    tl.store(grad_gate + place, rounded(given * beside * slope, gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + place, rounded(given * active, gate.dtype.element_ty), mask=inside)


def gate_forward(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """gate and up of one shape and type, contiguous, as everything here."""
    out, count = torch.empty_like(gate), gate.numel()
    _forward[(triton.cdiv(count, _VALUES),)](
        gate, up, out, count, gelu=gelu, size=_VALUES, enable_fp_fusion=False
    )
    return out


def gate_backward(gate: Tensor, up: Tensor, grad: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad_gate, grad_up, count = torch.empty_like(gate), torch.empty_like(gate), gate.numel()
    grid = (triton.cdiv(count, _VALUES),)
    _backward[grid](
        gate, up, grad, grad_gate, grad_up, count, gelu=gelu, size=_VALUES, enable_fp_fusion=False
    )
    return grad_gate, grad_up
