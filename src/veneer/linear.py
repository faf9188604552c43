"""A frozen linear layer, whatever its weights are stored as.

    product(x) = x W^T + bias        input_gradient(g) = g W        (W never changes, no gradient of W exists)

An adapter needs nothing else of its base layer, so methods and weight formats do not know each other.
Shapes: M rows (batch times tokens), I in_features, O out_features.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenLinear(Protocol):
    in_features: int
    out_features: int

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Type that x and the products are computed in."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., I) -> (..., O), a fresh tensor the caller may write to; `bias` replaces the layer's own."""

    def input_gradient(self, grad: Tensor) -> Tensor:
        """(M, O) -> (M, I), a fresh tensor."""

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W as (O, I) in `dtype`; not to be written to."""

    def own_bias(self) -> Tensor | None: ...


class DenseLinear:
    """nn.Linear, W stored as (O, I)."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.in_features, self.out_features = module.in_features, module.out_features

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.weight.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.module.weight, bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.module.weight

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.module.weight.detach().to(dtype)

    def own_bias(self) -> Tensor | None:
        return self.module.bias


class TransposedLinear:
    """GPT-2's Conv1D, W stored as (I, O)."""

    def __init__(self, module: nn.Module) -> None:
        self.weight: Tensor = module.get_parameter("weight")
        self.bias: Tensor | None = module.get_parameter("bias")
        self.in_features, self.out_features = self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x_MI = x.reshape(-1, self.in_features)
        y_MO = x_MI @ self.weight if bias is None else torch.addmm(bias, x_MI, self.weight)
        return y_MO.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.weight.T

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return self.weight.detach().T.to(dtype)

    def own_bias(self) -> Tensor | None:
        return self.bias


class SliceLinear:
    """One expert of a fused stack: W is a matrix of a 3-D parameter, (O, I) or, transposed, (I, O)."""

    def __init__(self, matrix: Tensor, *, transposed: bool) -> None:
        self.matrix, self.transposed = matrix, transposed
        out_features, in_features = reversed(matrix.shape) if transposed else matrix.shape
        self.in_features, self.out_features = in_features, out_features

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.matrix.T if self.transposed else self.matrix, bias)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ (self.matrix.T if self.transposed else self.matrix)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        return (self.matrix.T if self.transposed else self.matrix).detach().to(dtype)

    def own_bias(self) -> Tensor | None:
        return None


def is_transposed_linear(module: nn.Module) -> bool:
    """True for GPT-2's Conv1D, told by its shape of attributes: this layer knows torch alone."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def frozen_linear(module: nn.Module) -> FrozenLinear | None:
    """The frozen view of a module, or None where it is no linear layer."""
    if isinstance(module, nn.Linear):
        return DenseLinear(module)
    return TransposedLinear(module) if is_transposed_linear(module) else None
