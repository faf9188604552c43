"""A packed matrix as a FrozenLinear that decodes, then multiplies, for formats without a product.

The decoded weight is not kept. Shapes: M rows, I in_features, O out_features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels.dense import products
from veneer.linear import times
from veneer.quant.scratch import scratch


@dataclass(eq=False)
class DecodedMatrix:
    """A matrix W that `decode` writes into a contiguous (O, I) tensor of any floating type."""

    decode: Callable[[Tensor], object]
    in_features: int
    out_features: int
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return products.linear(x, self.decoded(x.dtype), bias)

    @torch.no_grad()
    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        return times(grad, self.decoded(grad.dtype), so_far)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)
        self.decode(out)
        return out

    def own_bias(self) -> Tensor | None:
        return None

    def decoded(self, dtype: torch.dtype) -> Tensor:
        out = scratch(self.out_features, self.in_features, dtype=dtype, device=self.device)
        self.decode(out)
        return out
