"""4-bit whole numbers with a scale and a zero for each group of a row's columns: what GPTQ and AWQ
weights are.

    weight[o, i] = (code[o, i] - zero[o, g]) * scale[o, g],    g the group of column i

Groups are runs of columns, or, with GPTQ's act-order, told for each column. The two lay the same
numbers out in other orders (bases/packed/int4_files.py); held is one order: rows of codes, two
columns a byte, the first in the low half. The product is exact in float32 (4 bits of difference, 11
of a float16 scale), then rounded once to the output type. Source: Frantar et al. 2022,
arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from veneer.quant.in_files import FileWeight, scaled, shifted

MOST_VALUE = 15.0
"""Of a code less its zero."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Int4(FileWeight):
    """tensors: "" uint8 (..., O, I / 2); scales (..., O, groups) of a floating type; zeros uint8
    (..., O, groups); groups int32 (..., I), or not there: columns belong to groups of `width` in
    their order."""

    by_rows: ClassVar[tuple[str, ...]] = ("", "scales", "zeros")
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        *front, half = self.tensors[""].shape
        return (*front, 2 * half)

    def decode(self, tensors: Mapping[str, Tensor], out: Tensor) -> None:
        codes, scales, zeros = tensors[""], tensors["scales"], tensors["zeros"]
        groups, width = tensors.get("groups"), self.width
        for start in range(0, len(out), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            part, scale, zero = out[some], scales[some], zeros[some]
            pairs = part.view(len(part), -1, 2)
            pairs[..., 0].copy_(codes[some] & 15)
            pairs[..., 1].copy_(codes[some] >> 4)
            if groups is not None:
                scale, zero, width = scale.index_select(1, groups), zero.index_select(1, groups), 1
            shifted(part, zero, width)
            scaled(part, scale, width)


def packed_columns(codes_OI: Tensor) -> Tensor:
    """Packs uint8 (..., O, I) of 0 to 15 -> (..., O, I / 2)."""
    pairs = codes_OI.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4
