"""A frozen linear layer, in whatever format its weights are stored.

    product(x) = x W^T + bias        input_gradient(g) = g W

W never changes and has no gradient. An adapter needs nothing else of its base layer, so methods and
weight formats do not know each other. Shapes: M rows (batch times tokens), I in_features, O
out_features.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer.kernels.dense import few_rows, products


class FrozenLinear(Protocol):
    in_features: int
    out_features: int

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of x and of the products."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Computes x W^T + bias, (..., O), a fresh tensor that the caller may write to.

        `bias` replaces the layer's own.
        """

    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        """Computes dy W, (M, I): a fresh tensor, or `so_far` after adding to it in place."""

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns W as (O, I) in `dtype`. The caller must not write to it."""

    def own_bias(self) -> Tensor | None: ...


class DivisibleLinear:
    """A frozen linear layer whose weight has views of some of its rows.

    It is no Protocol, which every training step would check member by member.
    """

    def output_rows(self, rows: slice) -> FrozenLinear | None:
        """Returns the layer that computes these outputs alone. Returns None if it has no view."""
        raise NotImplementedError


class DenseLinear(DivisibleLinear):
    """A frozen linear layer with a dense W, or these rows of its W.

    is_transposed  the module's parameter is (I, O), as GPT-2's Conv1D has it; otherwise (O, I)
    """

    def __init__(
        self, module: nn.Module, rows: slice | None = None, *, is_transposed: bool = False
    ) -> None:
        self.module: Any = module
        self.rows, self.is_transposed = rows, is_transposed
        shape: Sequence[int] = module.get_parameter("weight").shape
        self.out_features, self.in_features = shape[::-1] if is_transposed else shape
        if rows is not None:
            self.out_features = len(range(*rows.indices(self.out_features)))

    def output_rows(self, rows: slice) -> "DenseLinear":
        return type(self)(self.module, rows, is_transposed=self.is_transposed)

    @property
    def weight(self) -> Tensor:
        own: Tensor = self.module.weight
        weight = own.T if self.is_transposed else own
        return weight if self.rows is None else weight[self.rows]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return products.linear(x, self.weight, bias)

    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        return times(grad, self.weight, so_far)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.weight.detach().to(dtype)

    def own_bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.module, "bias", None)  # an embedding has none
        return bias if bias is None or self.rows is None else bias[self.rows]


class WidenedDense(DenseLinear):
    """A frozen linear layer that is multiplied in float32 where its weight is bf16."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.module.weight.dtype, torch.float32)


def times(grad: Tensor, weight: Tensor, so_far: Tensor | None) -> Tensor:
    """Returns so_far (M, I) + grad (M, O) W (O, I), added in place and rounded once.

    Without `so_far` the result is a fresh tensor.
    """
    if products.times_usable(grad, weight, so_far):
        return products.times(grad, weight, so_far)
    weight = few_rows.widened(weight, grad)
    return grad @ weight if so_far is None else torch.addmm(so_far, grad, weight, out=so_far)


def writable(y: Tensor) -> Tensor:
    """Returns a fresh y that callers of an autograd Function may write to.

    Models add into the output of a linear layer. torch forbids that for a view that was made within
    a Function, and products of three axes are views of a product of two.
    """
    return y.detach()


def bias_gradient(g_MO: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums a gradient over its rows: (M, O) -> (O)."""
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
    """Computes base.product with gradients of x and bias; saves neither x nor a decoded weight."""
    return _FrozenProduct.apply(x, bias, base)
