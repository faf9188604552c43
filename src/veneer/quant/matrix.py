"""One matrix of a 4-bit weight as a FrozenLinear: a whole weight, or one expert's run of a stack.

Few rows go through the fused product, which reads the packed bytes once; more go through a decoded
copy in a buffer that is reused by every layer and never seen by autograd. Shapes: M rows, I
in_features, O out_features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.packed import nf4
from veneer.kernels.packed.nf4 import NF4Blocks
from veneer.linear import times
from veneer.quant.scratch import scratch


@dataclass(eq=False)
class PackedMatrix:
    """W: the elements from `start` on, as (O, I), or as (I, O) where `transposed`."""

    blocks: NF4Blocks
    in_features: int
    out_features: int
    dtype: torch.dtype
    start: int = 0
    transposed: bool = False

    @property
    def device(self) -> torch.device:
        return self.blocks.packed.device

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        """(O, I) in the reused buffer."""
        O, I = self.out_features, self.in_features
        rows, columns = (I, O) if self.transposed else (O, I)
        stored = scratch(rows, columns, dtype=dtype, device=self.device)
        nf4.dequantize(self.blocks, stored, start=self.start)
        return stored.T if self.transposed else stored

    @torch.no_grad()
    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x_MI = x.reshape(-1, self.in_features)
        if not self.transposed and nf4.has_product(self.blocks, x_MI):
            y_MO = nf4.product(self.blocks, x_MI, self.out_features, start=self.start)
            y_MO = y_MO if bias is None else y_MO.add_(bias)
            return y_MO.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self._decoded(x.dtype), bias)

    @torch.no_grad()
    def input_gradient(self, grad: Tensor, so_far: Tensor | None = None) -> Tensor:
        return times(grad, self._decoded(grad.dtype), so_far)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        O, I = self.out_features, self.in_features
        out = torch.empty((I, O) if self.transposed else (O, I), dtype=dtype, device=self.device)
        nf4.dequantize(self.blocks, out, start=self.start)
        return out.T if self.transposed else out

    def own_bias(self) -> Tensor | None:
        return None
