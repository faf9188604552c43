"""Two chains of elementwise operations, each as one node of the graph that keeps no more than it needs.

    rms_norm     y = weight * (x / sqrt(mean(x^2) + epsilon))          keeps x and one float32 a row
    silu_gate    y = silu(gate) * up                                   keeps gate and up

Plain torch makes six to eight passes over memory for each, and the norm keeps two float32 copies of x. Compiled
for bf16 on processors that have it (native/fused.c); elsewhere the same steps in torch. Values are rounded where the
models round: after the normalisation, after the activation. Shapes: M rows, D width.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.native import library, on_cpu


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "grad", "out", "scale")),
        ("width", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
    ]


class _Gate(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("gate", "up", "grad", "out", "grad_gate", "grad_up")]


def compiled(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where it computes these tensors: contiguous bf16 on a processor that has bf16 arithmetic."""
    if any(t.dtype != torch.bfloat16 or not on_cpu(t) or not t.is_contiguous() for t in tensors):
        return None
    found = library()
    if found is None or not hasattr(found, "veneer_entropy") or not found.veneer_has_bf16():
        return None
    return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        rows = x.numel() // x.shape[-1]
        native = compiled(x, weight) if weight.shape == x.shape[-1:] else None
        if native is not None:
            out, scale = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
            given = _Norm(
                x.data_ptr(), weight.data_ptr(), None, out.data_ptr(), scale.data_ptr(), x.shape[-1], epsilon
            )
            native.veneer_rms_norm_forward(ctypes.byref(given), ctypes.c_int64(rows))
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            out, scale = weight * (wide * inverse).to(x.dtype), inverse.view(rows)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad, width = grad.contiguous(), x.shape[-1]
        grad_weight = None
        if ctx.needs_input_grad[1]:
            normal = (x.view(-1, width) * scale[:, None]).to(x.dtype)
            grad_weight = (grad.view(-1, width) * normal).sum(0, dtype=scale.dtype).to(weight.dtype)
        native = compiled(x, weight, grad) if weight.shape == x.shape[-1:] else None
        if native is not None:
            out = torch.empty_like(x)
            given = _Norm(
                x.data_ptr(), weight.data_ptr(), grad.data_ptr(), out.data_ptr(), scale.data_ptr(), width, 0.0
            )
            native.veneer_rms_norm_backward(ctypes.byref(given), ctypes.c_int64(len(scale)))
            return out, grad_weight, None
        inverse = scale.view(*x.shape[:-1], 1)
        normal = x.to(scale.dtype) * inverse
        inner = grad.to(scale.dtype) * weight.to(scale.dtype)
        out = inverse * (inner - normal * (inner * normal).mean(-1, keepdim=True))
        return out.to(x.dtype), grad_weight, None


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        native = compiled(gate, up) if gate.shape == up.shape and gate.numel() % 16 == 0 else None
        if native is None:
            return F.silu(gate) * up
        out = torch.empty_like(gate)
        given = _Gate(gate.data_ptr(), up.data_ptr(), None, out.data_ptr(), None, None)
        native.veneer_silu_gate_forward(ctypes.byref(given), ctypes.c_int64(gate.numel() // 16))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad = grad.contiguous()
        native = compiled(gate, up, grad) if gate.numel() % 16 == 0 else None
        if native is None:
            share = torch.sigmoid(gate)
            return grad * up * share * (1 + gate * (1 - share)), grad * gate * share
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(gate)
        given = _Gate(
            gate.data_ptr(), up.data_ptr(), grad.data_ptr(), None, grad_gate.data_ptr(), grad_up.data_ptr()
        )
        native.veneer_silu_gate_backward(ctypes.byref(given), ctypes.c_int64(gate.numel() // 16))
        return grad_gate, grad_up


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x (..., D), weight (D) -> (..., D) in x's type. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
    apply: Any = _RMSNorm.apply
    return apply(x, weight, epsilon)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The same under torch's own autograd: the meaning of rms_norm."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normal.to(x.dtype)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up of one shape -> silu(gate) * up. Source: Shazeer 2020, arXiv:2002.05202, SwiGLU."""
    apply: Any = _SiluGate.apply
    return apply(gate, up)


def silu_gate_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same under torch's own autograd: the meaning of silu_gate."""
    return F.silu(gate) * up
