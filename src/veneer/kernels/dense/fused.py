"""Chains of elementwise operations, each as one node of the graph that saves only what it needs.

    rms_norm       y = (weight + offset) * (x / sqrt(mean(x^2) + epsilon))
                                                                   saves x and one float32 a row
    layer_norm     y = (weight + offset) * (x - mean) / deviation + bias
                                                                   saves x and one float32 a row
    gated          y = activation(gate) * up, or without up: silu, gelu by the formula with tanh, or
                   gelu by the definition with erf                 saves gate and up
    rotary         y = x cos + rotate_half(x) sin, for q and k     saves cos and sin

Plain torch makes six to eight passes over memory for each, and its norm saves two float32 copies of
x. The chains are compiled for bf16 on processors that have its arithmetic (native/layers/fused.c)
and for float32 on any (native/layers/fused_float.c). On CUDA liger-kernel computes them
(cuda/liger_kernels.py). Elsewhere the same steps run in torch. Values are rounded where the models
round: after the normalisation (unless a norm is wide) and after the activation. Shapes: M rows, D
width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings import block_calls, row_calls
from veneer.kernels.bindings.library import has_bf16, has_floats, on_cpu
from veneer.kernels.bindings.rank_calls import PAIR_BYTES
from veneer.kernels.bindings.row_calls import GELU_ERF, GELU_TANH, RELU, RELU_SQUARED, SIGMOID, SILU
from veneer.kernels.cuda import launch
from veneer.kernels.rules import Norm

MAX_WIDTH = 2**16
"""Largest row of a norm or a gate that liger-kernel takes."""


def compiled(*tensors: Tensor) -> bool:
    """True if the bf16 kernels take these: contiguous bf16, pairs in one word, and a processor with
    bf16 arithmetic."""
    for t in tensors:
        if t.dtype is not torch.bfloat16 or not on_cpu(t) or not t.is_contiguous():
            return False
        if t.data_ptr() % PAIR_BYTES:
            return False
    return has_bf16()


def in_one_pass(*tensors: Tensor) -> bool:
    """True if kernels compute norms, gates and rotations of these: `compiled`, or all float32."""
    if tensors[0].dtype is not torch.float32:
        return compiled(*tensors)
    return has_floats() and all(
        t.dtype is torch.float32 and on_cpu(t) and t.is_contiguous() for t in tensors
    )


def are_compiled_angles(cos: Tensor, sin: Tensor, heads: torch.dtype) -> bool:
    """True if the kernels rotate heads of this type by these angles: of the same type, or float32.
    The kernels must take the heads (`in_one_pass`)."""
    return cos.dtype in (heads, torch.float32) and in_one_pass(cos, sin)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float, is_wide: bool
    ) -> Tensor:
        x = x.contiguous()
        rows = x.numel() // x.shape[-1]
        if weight.shape == x.shape[-1:] and in_one_pass(x, weight):
            out, scale = (
                torch.empty_like(x),
                torch.empty(rows, dtype=torch.float32, device=x.device),
            )
            row_calls.rms_norm_forward(x, weight, out, scale, epsilon, offset, is_wide)
        elif not is_wide and (liger := _liger_norms(x, weight)) is not None:
            out, scale = liger.norm_forward(x, weight, epsilon)
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            out, scale = _weighted(wide * inverse, x, weight, offset, is_wide), inverse.view(rows)
        ctx.save_for_backward(x, weight, scale)
        ctx.offset, ctx.is_wide = offset, is_wide
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, width = grad.contiguous(), x.shape[-1]
        needs_weight = ctx.needs_input_grad[1]
        if not ctx.is_wide and (liger := _liger_norms(x, weight, grad)) is not None:
            own = liger.norm_backward(x, weight, grad, scale, needs_weight=needs_weight)
            return *own, None, None, None
        grad_weight = None
        if needs_weight:
            normal = x.view(-1, width) * scale[:, None]
            normal = normal if ctx.is_wide else normal.to(x.dtype)
            grad_weight = (grad.view(-1, width) * normal).sum(0, dtype=scale.dtype).to(weight.dtype)
        if weight.shape == x.shape[-1:] and in_one_pass(x, weight, grad):
            out = torch.empty_like(x)
            row_calls.rms_norm_backward(x, weight, grad, out, scale, ctx.offset)
            return out, grad_weight, None, None, None
        inverse = scale.view(*x.shape[:-1], 1)
        normal = x.to(scale.dtype) * inverse
        inner = grad.to(scale.dtype) * (weight.to(scale.dtype) + ctx.offset)
        out = inverse * (inner - normal * (inner * normal).mean(-1, keepdim=True))
        return out.to(x.dtype), grad_weight, None, None, None


def _weighted(normal: Tensor, x: Tensor, weight: Tensor, offset: float, is_wide: bool) -> Tensor:
    """normal: x normalised, in float32 at least -> the norm's output in x's type."""
    if is_wide:
        return (normal * (offset + weight.to(normal.dtype))).to(x.dtype)
    return weight * normal.to(x.dtype)


def _liger_norms(x: Tensor, weight: Tensor, *gradients: Tensor) -> Any:
    """Returns liger-kernel's functions if its norms take these tensors, else None."""
    fits = weight.shape == x.shape[-1:] and weight.numel() <= MAX_WIDTH
    return launch.kernels_for("liger_kernels", x, weight, *gradients) if fits else None


def _liger_gates(gate: Tensor, up: Tensor, activation: int, *gradients: Tensor) -> Any:
    """Returns liger-kernel's functions if its gates take these tensors, else None."""
    fits = gate.shape == up.shape and gate.shape[-1] <= MAX_WIDTH and activation < GELU_ERF
    return launch.kernels_for("liger_kernels", gate, up, *gradients) if fits else None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, offset: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kind = epsilon, offset
        rows, out = x.view(-1, x.shape[-1]), torch.empty_like(x)
        norm = _centred(rows, weight, bias, *ctx.kind)
        block_calls.norm_forward(rows, norm=norm, out=out.view(rows.shape))
        ctx.scale = norm.scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, weight = ctx.saved_tensors
        rows, out = x.view(-1, x.shape[-1]), torch.empty_like(x)
        norm = _centred(rows, weight, None, *ctx.kind)._replace(scale=ctx.scale)
        block_calls.norm_backward(
            grad.contiguous().view(rows.shape), norm=norm, normed=rows, out=out.view(rows.shape)
        )
        return out, None, None, None, None


def _centred(
    rows: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, offset: float
) -> block_calls.NormOperands:
    scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    norm = Norm(weight, epsilon, offset, is_wide=True, is_centred=True, bias=bias)
    return block_calls.NormOperands(norm, scale)


def activated(gate: Tensor, activation: int) -> Tensor:
    """Returns the activation of gate, by torch. activation: a number of bindings/row_calls.py."""
    if activation in (SILU, SIGMOID):
        return F.silu(gate) if activation == SILU else gate.sigmoid()
    if activation in (RELU, RELU_SQUARED):
        return F.relu(gate) if activation == RELU else F.relu(gate).square()
    return F.gelu(gate, approximate="tanh" if activation == GELU_TANH else "none")


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
        gate, up = gate.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        if up is not None and (liger := _liger_gates(gate, up, activation)) is not None:
            return liger.gate_forward(gate, up, activation == GELU_TANH)
        if not _is_compiled_gate(gate, up, activation):
            return gated_reference(gate, up, activation)
        out = torch.empty_like(gate)
        row_calls.gate_forward(gate, up, out, activation)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gate, up), activation = ctx.saved_tensors, ctx.activation
        grad = grad.contiguous()
        if up is not None and (liger := _liger_gates(gate, up, activation, grad)) is not None:
            return *liger.gate_backward(gate, up, grad, activation == GELU_TANH), None
        if _is_compiled_gate(gate, up, activation, grad):
            grad_gate = torch.empty_like(gate)
            grad_up = None if up is None else torch.empty_like(up)
            row_calls.gate_backward(gate, up, grad, grad_gate, grad_up, activation)
            return grad_gate, grad_up, None
        grad_activated = grad if up is None else grad * up
        if activation == SILU:
            share = torch.sigmoid(gate)
            grad_up = None if up is None else grad * gate * share
            return grad_activated * share * (1 + gate * (1 - share)), grad_up, None
        if activation in (RELU, RELU_SQUARED):
            slope = (gate > 0).to(gate.dtype) if activation == RELU else 2 * F.relu(gate)
            grad_gate = grad_activated * slope
        else:
            kind = "tanh" if activation == GELU_TANH else "none"
            grad_gate = torch.ops.aten.gelu_backward(grad_activated, gate, approximate=kind)
        return grad_gate, None if up is None else grad * activated(gate, activation), None


def _is_compiled_gate(gate: Tensor, up: Tensor | None, activation: int, *gradients: Tensor) -> bool:
    """True if the kernels take these: in float32 no plain activation, and only SiLU and GELU by
    its formula with tanh."""
    if (up is None or activation >= GELU_ERF) and gate.dtype is not torch.bfloat16:
        return False
    others = gradients if up is None else (up, *gradients)
    alike = all(other.shape == gate.shape for other in others)
    return alike and gate.numel() % 16 == 0 and in_one_pass(gate, *others)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.neighbours = neighbours
        return _rotate_both(q, k, cos, sin, neighbours, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotate_both(grad_q, grad_k, cos, sin, ctx.neighbours, back=True), None, None, None


def _rotate_both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, *, back: bool
) -> tuple[Tensor, Tensor]:
    q, k = q.contiguous(), k.contiguous()
    whole_heads = not neighbours and cos.shape[-1] == q.shape[-1]
    liger = launch.kernels_for("liger_kernels", q, k, cos, sin) if whole_heads else None
    if liger is not None:
        return liger.rotate(q, k, cos, sin, back=back)
    return _rotate(q, cos, sin, neighbours, back), _rotate(k, cos, sin, neighbours, back)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, back: bool) -> Tensor:
    is_compiled = in_one_pass(x) and are_compiled_angles(cos, sin, x.dtype)
    if x.shape[-1] % 16 == 0 and is_compiled:
        out = torch.empty_like(x)
        row_calls.rotary(x, cos, sin, out, neighbours=neighbours, back=back)
        return out
    return _rotate_reference(x, cos, sin, neighbours, back)


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool, back: bool) -> Tensor:
    cos, sin, turned = cos[:, None], sin[:, None], cos.shape[-1]
    heads = x[..., :turned].to(torch.promote_types(x.dtype, cos.dtype))
    if neighbours:  # as halves
        heads = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    sines = _rotate_half(heads * sin).neg() if back else _rotate_half(heads) * sin
    heads = heads * cos + sines
    if neighbours:
        heads = heads.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    rotated = heads.to(x.dtype)
    return rotated if turned == x.shape[-1] else torch.cat((rotated, x[..., turned:]), dim=-1)


def _rotate_half(x: Tensor) -> Tensor:
    """Turns (a, b) into (-b, a), a and b being the halves of a head."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotates: q (M, H, D), k (M, K, D), cos and sin (M, R), which get no gradient -> q and k, the
    first R dimensions of each head rotated.

    Dimension i is rotated with R / 2 + i, or 2 i with 2 i + 1 (neighbours). Both halves of a row of
    cos, and of sin, are equal; on CUDA the first is read for both. By angles in float32 values are
    rounded once, not after each product. Source: Su et al. 2021, arXiv:2104.09864.
    """
    return _Rotary.apply(q, k, cos, sin, neighbours)


def rotary_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool = False
) -> tuple[Tensor, Tensor]:
    """Defines rotary, under torch's own autograd."""
    rotated_q, rotated_k = (_rotate_reference(x, cos, sin, neighbours, False) for x in (q, k))
    return rotated_q, rotated_k


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, is_wide: bool = False
) -> Tensor:
    """Normalises: x (..., D), weight (D) -> (..., D) in x's type.

    A wide norm is multiplied by the weight in float32 and rounded once; an offset is of such norms
    alone. Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    assert is_wide or not offset
    return _RMSNorm.apply(x, weight, epsilon, offset, is_wide)


def rms_norm_reference(
    x: Tensor, weight: Tensor, epsilon: float, *, offset: float = 0.0, is_wide: bool = False
) -> Tensor:
    """Defines rms_norm, under torch's own autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return _weighted(normal, x, weight, offset, is_wide)


def takes_layer_norm(x: Tensor, *values: Tensor) -> bool:
    """True if the kernels compute a LayerNorm of x with these frozen weight and bias."""
    frozen = not any(value.requires_grad for value in values)
    return frozen and x.shape[-1] % 16 == 0 and compiled(x, *values)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, offset: float = 0.0
) -> Tensor:
    """Normalises: x (..., D), weight and bias (D), which are frozen -> (weight + offset) *
    (x - mean) / deviation + bias, rounded once. The kernels must take them (`takes_layer_norm`).

    Source: Ba et al. 2016, arXiv:1607.06450.
    """
    return _LayerNorm.apply(x, weight, bias, epsilon, offset)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, offset: float = 0.0
) -> Tensor:
    """Defines layer_norm, under torch's own autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = weight.to(wide) + offset, None if bias is None else bias.to(wide)
    return F.layer_norm(x.to(wide), weight.shape, *values, epsilon).to(x.dtype)


def gated(gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
    """Multiplies: gate and up of one shape -> activation(gate) * up; without up, activation(gate).

    activation: a number of bindings/row_calls.py. Source: Shazeer 2020, arXiv:2002.05202.
    """
    return _Gate.apply(gate, up, activation)


def gated_reference(gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
    """Defines gated, under torch's own autograd."""
    return activated(gate, activation) if up is None else activated(gate, activation) * up
