"""One matrix of a 4-bit weight as a FrozenLinear: a whole weight, or one expert of a stack.

Few rows use the fused product, which reads the packed bytes once. More rows use a decoded copy in a
buffer that all layers share and autograd never sees. Shapes: M rows, I in_features, O out_features.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.dense.frozen import DivisibleLinear
from veneer.kernels.packed import nf4
from veneer.kernels.packed.nf4 import NF4Blocks
from veneer.linear import times
from veneer.quant.scratch import scratch


@dataclass(eq=False)
class PackedMatrix(DivisibleLinear):
    """The elements of W from `start` on, as (O, I), or as (I, O) if `transposed`."""

    blocks: NF4Blocks
    in_features: int
    out_features: int
    dtype: torch.dtype
    start: int = 0
    transposed: bool = False

    def output_rows(self, rows: slice) -> "PackedMatrix | None":
        """Returns these rows of W; None if W is stored as (I, O)."""
        if self.transposed:
            return None
        first, stop, _ = rows.indices(self.out_features)
        start = self.start + first * self.in_features
        return replace(self, start=start, out_features=stop - first)

    @property
    def device(self) -> torch.device:
        return self.blocks.packed.device

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Returns W (O, I), decoded into the shared buffer."""
        O, I = self.out_features, self.in_features
        rows, columns = (I, O) if self.transposed else (O, I)
        stored = scratch(rows, columns, dtype=dtype, device=self.device)
        nf4.dequantize(self.blocks, stored, start=self.start)
        return stored.T if self.transposed else stored

    @torch.no_grad()
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x_MI = x.reshape(-1, self.in_features)
        if not self.transposed and nf4.has_product(self.blocks, x_MI, start=self.start):
            y_MO = nf4.product(self.blocks, x_MI, self.out_features, bias, start=self.start)
            return y_MO.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.decoded(x.dtype), bias)

    @torch.no_grad()
    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        return times(grad, self.decoded(grad.dtype), so_far)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        O, I = self.out_features, self.in_features
        out = torch.empty((I, O) if self.transposed else (O, I), dtype=dtype, device=self.device)
        nf4.dequantize(self.blocks, out, start=self.start)
        return out.T if self.transposed else out

    def own_bias(self) -> Tensor | None:
        return None
