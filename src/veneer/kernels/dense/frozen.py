"""A frozen linear layer, whatever its weights are stored as.

    product(x) = x W^T + bias        input_gradient(g) = g W        (W never changes, no gradient of
                                     W exists)

An adapter needs nothing else of its base layer, so methods and weight formats do not know each
other. Shapes: M rows (batch times tokens), I in_features, O out_features.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer.kernels.dense import products


class FrozenLinear(Protocol):
    in_features: int
    out_features: int

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Type that x and the products are computed in."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., I) -> (..., O), a fresh tensor the caller may write to; `bias` replaces the layer's
        own."""

    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        """(M, O) -> (M, I), a fresh tensor, or added to `so_far` in place."""

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W as (O, I) in `dtype`; not to be written to."""

    def own_bias(self) -> Tensor | None: ...


class DenseLinear:
    """nn.Linear, W stored as (O, I)."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.in_features, self.out_features = module.in_features, module.out_features

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return products.linear(x, self.module.weight, bias)

    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        return times(grad, self.module.weight, so_far)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.module.weight.detach().to(dtype)

    def own_bias(self) -> Tensor | None:
        return self.module.bias


def times(grad: Tensor, weight: Tensor, so_far: Tensor | None) -> Tensor:
    """so_far (M, I) + grad (M, O) W (O, I), in place and rounded once; None: nothing was found so
    far."""
    if products.times_usable(grad, weight, so_far):
        return products.times(grad, weight, so_far)
    return grad @ weight if so_far is None else torch.addmm(so_far, grad, weight, out=so_far)


def writable(y: Tensor) -> Tensor:
    """A fresh y as a function of its own hands it out: models add into what a linear layer gave
    them, which torch forbids where that is a view made within such a function (products of three
    axes are views of one of two)."""
    return y.detach()


def bias_gradient(g_MO: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, O) -> (O)."""
    return g_MO.sum(0, dtype=torch.promote_types(g_MO.dtype, torch.float32)).to(dtype)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, base: FrozenLinear) -> Tensor:
        ctx.base, ctx.shape = base, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return writable(base.product(x, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g_MO = grad.reshape(-1, ctx.base.out_features)
        grad_x = ctx.base.input_gradient(g_MO).view(ctx.shape) if ctx.needs_input_grad[0] else None
        grad_bias = bias_gradient(g_MO, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None


def frozen_product(x: Tensor, bias: Tensor | None, base: FrozenLinear) -> Tensor:
    """base.product with gradients to x and bias; nothing is saved: neither x nor a decoded
    weight."""
    apply: Any = _FrozenProduct.apply
    return apply(x, bias, base)
