"""NF4 and FP4: code books, blockwise quantisation, double quantisation, with the bytes of
bitsandbytes' files.

    code    number of thresholds strictly below x / absmax, absmax the largest magnitude of the
            block
    weight  book[code] * absmax, in float32, one rounding to the output type

Blocks are consecutive elements of the FLAT weight, so they straddle rows where the width is no
multiple of the block. Double quantisation stores absmax - mean(absmax) in 8 bits, 256 residuals a
block: 0.516 byte a weight in all. Where bitsandbytes is wrong (widths that are multiples of 16 and
not of 64, values that are not finite) this is right or refuses. Source: Dettmers et al. 2023,
arXiv:2305.14314; the numbers are those of the released code.
"""

import itertools
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

from veneer.errors import CorruptFileError
from veneer.kernels.packed import nf4 as kernels
from veneer.kernels.packed.nf4 import NestedScales, NF4Blocks
from veneer.kernels.wide import wide
from veneer.quant.matrix import PackedMatrix

BookName = Literal["nf4", "fp4"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256

_NF4 = (
    "BF800000 BF3239B1 BF066B30 BECA32A0 BE91A24D BE3D353F BDBA7871 00000000 "
    "3DA2FAFF 3E24CAE3 3E7C04DD 3EAD033A 3EE1A4B8 3F1007AB 3F3913B3 3F800000"
)
"""Quantiles of a normal distribution, divided by the largest. Computing them again would change the
last bit of 10 of the 16."""
_FP4 = (
    "00000000 3BAAAAAB 3F2AAAAB 3F800000 3EAAAAAB 3F000000 3E2AAAAB 3E800000 "
    "80000000 BBAAAAAB BF2AAAAB BF800000 BEAAAAAB BF000000 BE2AAAAB BE800000"
)

BOOKS: dict[BookName, str] = {"nf4": _NF4, "fp4": _FP4}


def _floats(bits: str) -> Tensor:
    words = bytes.fromhex("".join(bits.split()))
    return torch.tensor(
        struct.unpack(f">{len(words) // 4}f", words), dtype=torch.float32, device="cpu"
    )


@dataclass(frozen=True, eq=False)
class CodeBook:
    """A 4-bit code: values (16) by code, ascending thresholds (15), and codes (16) by the number of
    thresholds below."""

    name: BookName
    values: Tensor
    thresholds: Tensor
    codes: Tensor


@cache
@torch.inference_mode(mode=False)
def code_book(name: BookName) -> CodeBook:
    values = _floats(BOOKS[name])
    order = torch.argsort(values, stable=True)  # the identity for NF4
    ascending = values[order]
    return CodeBook(name, values, (ascending[:-1] + ascending[1:]) / 2, order.to(torch.int32))


@cache
@torch.inference_mode(mode=False)
def nested_map() -> Tensor:
    """Returns the 256 ascending float32 values of the 8-bit code that scales are stored in: for i =
    0..6 the midpoints of 2^i + 1 points from 0.1 to 1, times 10^(i - 6), both signs; 0 and 1. Each
    point is rounded once."""

    def fl(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float64, device="cpu").to(torch.float32))

    tenth = fl(0.1)
    values = [0.0, 1.0]
    for i in range(7):
        count = 2**i
        step = fl(fl(1.0 - tenth) / count)
        points = [
            fl(tenth + step * j) if j < (count + 1) // 2 else fl(1.0 - step * (count - j))
            for j in range(count + 1)
        ]
        power = fl(10.0 ** (i - 6))
        for low, high in itertools.pairwise(points):
            middle = fl(power * fl(fl(low + high) / 2))
            values += [middle, -middle]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight in 4 bits.

    packed   uint8 (ceil(n / 2)); absmax float32 (blocks), or uint8 where `nested`
    shape    of the dense weight; dtype: of the weight that was quantised
    """

    book: BookName
    packed: Tensor
    absmax: Tensor
    table: Tensor
    block: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested: NestedScales | None = None

    @cached_property
    def blocks(self) -> NF4Blocks:
        count, book = math.prod(self.shape), code_book(self.book).values
        known = self.table.is_meta or torch.equal(self.table.cpu(), book)
        return NF4Blocks(
            self.packed,
            self.absmax,
            self.table,
            self.block,
            count,
            self.nested,
            self.book if known else None,
        )

    @property
    def format(self) -> BookName:
        return self.book

    @property
    def tensors(self) -> dict[str, Tensor]:
        tensors = {"": self.packed, "absmax": self.absmax, "quant_map": self.table}
        if self.nested is not None:
            tensors |= {"nested_absmax": self.nested.scales, "nested_quant_map": self.nested.table}
        return tensors

    def holding(self, tensors: Mapping[str, Tensor]) -> "Packed":
        nested = self.nested
        if nested is not None:
            nested = replace(
                nested, table=tensors["nested_quant_map"], scales=tensors["nested_absmax"]
            )
        return replace(
            self,
            packed=tensors[""],
            absmax=tensors["absmax"],
            table=tensors["quant_map"],
            nested=nested,
        )

    @property
    def numbers(self) -> dict[str, float]:
        return {} if self.nested is None else {"nested_offset": self.nested.offset}

    def matrix(
        self, dtype: torch.dtype, *, number: int | None = None, transposed: bool = False
    ) -> PackedMatrix:
        rows, columns = self.shape[-2:]
        O, I = (columns, rows) if transposed else (rows, columns)
        start = (number or 0) * rows * columns
        return PackedMatrix(self.blocks, I, O, dtype, start=start, transposed=transposed)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


def quantize(
    weight: Tensor,
    *,
    book: BookName = "nf4",
    block: int = 64,
    double: bool = True,
    name: str = "the weight",
) -> Packed:
    """Quantises a weight of any shape, float32, bf16 or fp16, on any device.

    double: also quantises the scales, to 8 bits. name: the weight's name in errors. Raises
    CorruptFileError, with the first place, for values that are not finite.
    """
    assert block in BLOCK_SIZES and weight.is_floating_point() and weight.numel()
    code = code_book(book)
    device = weight.device
    packed, absmax = kernels.quantize(
        weight, code.thresholds.to(device), code.codes.to(device), block
    )
    if not torch.isfinite(absmax).all():
        raise _not_finite(weight, absmax, block, name)
    nested = None
    if double:
        absmax, nested = _quantize_scales(absmax)
    table = code.values.to(device)
    return Packed(book, packed, absmax, table, block, tuple(weight.shape), weight.dtype, nested)


def dequantize(weight: Packed, dtype: torch.dtype | None = None) -> Tensor:
    """Returns the dense weight, a new tensor in `dtype` (default: the type that was quantised)."""
    out = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=weight.packed.device)
    return kernels.dequantize(weight.blocks, out)


def _quantize_scales(absmax: Tensor) -> tuple[Tensor, NestedScales]:
    """Quantises scales to the nearest of 256 values of (absmax - mean) / largest residual. Returns
    uint8 indices, and what decodes them.

    A block of scales that all equal the mean has largest residual 0 and index 127, the value 0.
    """
    offset = absmax.mean()
    residual = absmax - offset
    count = residual.numel()
    padded = torch.nn.functional.pad(residual, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    outer = padded.abs().amax(1)
    scaled = (padded / outer.clamp(min=1e-38).unsqueeze(1)).view(-1)[:count].clamp(-1, 1)
    table, values = nested_map(), wide(scaled)
    middles = (table[:-1].double() + table[1:].double()) / 2  # exact
    index = torch.bucketize(values, middles.to(values.device)).to(absmax.device, torch.uint8)
    return index, NestedScales(table.to(absmax.device), outer, NESTED_BLOCK, float(offset))


def _not_finite(weight: Tensor, absmax: Tensor, block: int, name: str) -> CorruptFileError:
    bad = int((~torch.isfinite(absmax)).nonzero()[0])
    flat = weight.detach().reshape(-1)[bad * block : (bad + 1) * block]
    place = bad * block + int((~torch.isfinite(flat)).nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), weight.shape))
    return CorruptFileError(
        f"{name} holds values that are not finite and cannot be quantised",
        [f"the first: {float(weight[index])} at {list(index)}"],
        "Load the model again from its source; a 4-bit block with such a value would lose all its"
        " others.",
    )
