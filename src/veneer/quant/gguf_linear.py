"""A linear layer over the blocks of a .gguf file, as they lie in it: nothing is rounded a second
time.

The weight is a byte matrix (O, bytes of a row), perhaps a view of the file itself. For a product it
is decoded into the scratch buffer in x's type; few rows of x are multiplied straight from the
blocks. Shapes: M rows, I in_features, O out_features.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from veneer.kernels.dense import products
from veneer.kernels.packed.gguf import FORMATS, Kind, dequantise, has_product, in_features, product
from veneer.linear import PackedLinear, times
from veneer.quant.scratch import scratch


class GGUFLinear(PackedLinear):
    """y = x W^T + bias with W held as blocks of `kind`; dtype: what x and the products are computed
    in."""

    packed_format = "gguf"

    def __init__(
        self, blocks: Tensor, kind: Kind, *, dtype: torch.dtype, bias: Tensor | None
    ) -> None:
        super().__init__()
        assert blocks.shape[1] % FORMATS[kind].bytes == 0
        self.weight = nn.Parameter(blocks, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.kind = kind
        self.out_features, self.in_features = len(blocks), in_features(blocks, kind)
        self._dtype = dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GGUFLinear":
        """Products follow the model to another type; the blocks are bytes and stay."""
        super()._apply(fn, recurse)
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self.device)).dtype
        return self

    def packed_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.out_features, self.in_features)}

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def own_bias(self) -> Tensor | None:
        return self.bias

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x_MI = x.reshape(-1, self.in_features)
        if has_product(x_MI, bias):
            y_MO = product(x_MI, self.weight, self.kind, bias)
        else:
            y_MO = products.linear(x_MI, self._decoded(x.dtype), bias)
        return y_MO.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        return times(grad, self._decoded(grad.dtype), so_far)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        out = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.device)
        return dequantise(self.weight, self.kind, out)

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        out = scratch(self.out_features, self.in_features, dtype=dtype, device=self.device)
        return dequantise(self.weight, self.kind, out)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"
