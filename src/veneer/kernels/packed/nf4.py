"""4-bit weights: quantised, decoded, and multiplied with a few rows of x.

A weight is packed nibbles, a table of 16 values and one scale a block (see quant/nf4.py). The
compiled kernels (native/nf4) give the bits of nf4_reference.py, on every processor. CUDA tensors go
to bitsandbytes (cuda/bitsandbytes_nf4.py); tables and places that it cannot read go to
cuda/triton_nf4.py. Knows nothing of modules or shapes: a weight is flat, and a matrix is a range of
its elements.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings import packed_calls
from veneer.kernels.bindings.arguments import TYPES, available
from veneer.kernels.bindings.packed_calls import NF4Weights
from veneer.kernels.cuda import launch
from veneer.kernels.dense import few_rows
from veneer.kernels.packed import nf4_reference as reference

FUSED_ROWS = 6
"""Up to so many rows of x each nibble is looked up as it is multiplied. For more rows of x, a few
rows of W are decoded at a time."""
MAX_ROWS = 64
"""Up to so many rows of x `product` is faster than decoding W first; fewer in float16."""


@dataclass(frozen=True, eq=False)
class NestedScales:
    """Scales that are quantised: table[scale] * scales[number // block] + offset, in float32."""

    table: Tensor
    """(256) float32."""
    scales: Tensor
    """(blocks / block) float32: one for every `block` scales."""
    block: int
    offset: float

    @cached_property
    def offset_tensor(self) -> Tensor:
        """Returns the offset on the scales' device, () float32. It is kept for CUDA graphs that
        read it."""
        return torch.full((), self.offset, dtype=torch.float32, device=self.scales.device)


@dataclass(frozen=True, eq=False)
class NF4Blocks:
    """A flat weight of `count` values in 4 bits, contiguous and on one device.

    packed  (ceil(count / 2)) uint8
    scales  (ceil(count / block)) float32, or uint8 if `nested`
    table   (16) float32
    block   values that share a scale, a power of two, as is nested.block
    book    the name of the table, nf4 or fp4; None for another table
    """

    packed: Tensor
    scales: Tensor
    table: Tensor
    block: int
    count: int
    nested: NestedScales | None = None
    book: str | None = None

    def __post_init__(self) -> None:
        assert self.packed.dtype == torch.uint8 and self.packed.numel() == (self.count + 1) // 2
        assert self.scales.numel() == -(-self.count // self.block)
        tensors = [self.packed, self.scales, self.table]
        if (nested := self.nested) is not None:
            assert nested.scales.numel() == -(-self.scales.numel() // nested.block)
            tensors += [nested.table, nested.scales]
        assert all(t.is_contiguous() and t.device == self.packed.device for t in tensors)

    def float_scales(self) -> Tensor:
        """Returns the scales, (blocks) float32."""
        nested = self.nested
        return reference.scales_of(
            self.scales,
            None if nested is None else (nested.table, nested.scales, nested.block, nested.offset),
        )

    @property
    def checked(self) -> NF4Weights:
        """Returns the addresses, for C; found again after the tensors have moved, as those of
        sharded modules do."""
        nested = () if self.nested is None else (self.nested.table, self.nested.scales)
        tensors = (self.packed, self.scales, self.table, *nested)
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if (known := self._addresses.get(addresses)) is None:
            self._addresses.clear()
            known = self._addresses[addresses] = self._checked()
        return known

    @cached_property
    def _addresses(self) -> dict[tuple[int, ...], NF4Weights]:
        return {}

    def _checked(self) -> NF4Weights:
        inner = self.nested
        return packed_calls.nf4_weights(
            self.packed,
            self.scales,
            self.table,
            count=self.count,
            block=self.block,
            nested=None
            if inner is None
            else (inner.table, inner.scales, inner.block, inner.offset),
        )


def is_compiled() -> bool:
    return available("veneer_nf4_product")


def quantize(
    values: Tensor, thresholds: Tensor, codes: Tensor, block: int, *, level: int = -1
) -> tuple[Tensor, Tensor]:
    """Returns (packed uint8, absmax float32), both flat.

    The absmax of a block with a value that is not finite is not finite either.

    values      any shape, contiguous or not
    thresholds  (15), ascending; codes (16) int32
    level       highest instruction set to use: 3 AVX-512, 2 AVX2, 0 plain C; -1: any
    """
    if values.device.type != "cpu" or values.dtype not in TYPES or not is_compiled():
        return reference.quantize(values, thresholds, codes, block)
    flat = values.detach().reshape(-1).contiguous()
    count = flat.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(-(-count // block), dtype=torch.float32)
    limits = torch.cat([thresholds, thresholds.new_tensor([float("inf")])])
    packed_calls.nf4_quantize(flat, limits, codes.to(torch.int32), block, packed, absmax, level)
    return packed, absmax


def dequantize(weights: NF4Blocks, out: Tensor, *, start: int = 0, level: int = -1) -> Tensor:
    """Decodes the elements from `start` on into `out` (any shape, fp32, bf16 or fp16)."""
    count = out.numel()
    assert start >= 0 and start + count <= weights.count
    if not out.is_contiguous():
        out.copy_(
            dequantize(
                weights, torch.empty_like(out, memory_format=torch.contiguous_format), start=start
            )
        )
        return out
    if (kernels := _cuda_decoder(weights, out, start)) is not None:
        return kernels.dequantize(weights, out, start=start)
    if out.device.type != "cpu" or out.dtype not in TYPES or not is_compiled():
        flat = reference.dequantize(
            weights.packed,
            weights.float_scales(),
            weights.table,
            weights.block,
            start=start,
            count=count,
            dtype=out.dtype,
        )
        return out.copy_(flat.view(out.shape))
    packed_calls.nf4_dequantize(weights.checked, out, start=start, level=level)
    return out


def _cuda_decoder(weights: NF4Blocks, out: Tensor, start: int) -> Any:
    """Returns the kernels on CUDA that decode these elements into `out`; None if there are none."""
    bitsandbytes = launch.kernels_for("bitsandbytes_nf4", out)
    if bitsandbytes is not None and bitsandbytes.can_read(weights, start):
        return bitsandbytes
    return launch.kernels_for("triton_nf4", out)


def _cuda_product(weights: NF4Blocks, x: Tensor, start: int) -> Any:
    """Returns the kernels on CUDA that multiply x (M, I) with these; None if there are none."""
    if x.shape[0] > FUSED_ROWS or x.shape[1] % 2:
        return None
    bitsandbytes = launch.module_on("bitsandbytes_nf4", x.device)
    if bitsandbytes is not None and bitsandbytes.can_multiply(weights, x.shape[1], start):
        return bitsandbytes
    return launch.module_on("triton_nf4", x.device)


def has_product(weights: NF4Blocks, x: Tensor, *, start: int = 0) -> bool:
    """True if `product` is the fast path for x (M, I)."""
    if x.dtype not in TYPES:
        return False
    if x.is_cuda:
        return _cuda_product(weights, x, start) is not None
    if x.dtype is torch.float16:
        return (
            x.device.type == "cpu"
            and x.shape[0] <= packed_calls.MOST_PRODUCT_ROWS
            and is_compiled()
        )
    return x.device.type == "cpu" and few_rows.takes(len(x), MAX_ROWS) and is_compiled()


def product(
    weights: NF4Blocks,
    x: Tensor,
    outs: int,
    bias: Tensor | None = None,
    *,
    start: int = 0,
    level: int = few_rows.ANY_LEVEL,
) -> Tensor:
    """Computes x (M, I) -> x W^T + bias (M, outs) in x's type, W being `outs` rows of I elements
    from `start` on.

    Only where has_product says so. Weights are those that dequantize gives in x's type; products
    and sums are float32.
    """
    assert x.dim() == 2
    assert start >= 0 and start + outs * x.shape[1] <= weights.count
    x = x.detach().contiguous()
    y = torch.empty(x.shape[0], outs, dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        return y
    if x.is_cuda:
        y = _cuda_product(weights, x, start).product(weights, x, outs, start=start)
        return y if bias is None else y.add_(bias)
    if x.shape[0] <= FUSED_ROWS or x.dtype is torch.float16:
        packed_calls.nf4_product(weights.checked, x, y, bias, start=start, level=min(level, 4))
    else:
        packed_calls.nf4_rows(weights.checked, x, y, bias, start=start, level=level)
    return y
