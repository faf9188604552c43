"""8-bit floating weights (E4M3) with a scale for each block of rows and columns, as DeepSeek, Qwen3
and compressed-tensors store them.

    weight[o, i] = value[o, i] * scale[o // rows, i // columns]
        in float32, one rounding to the output type

One scale a row is blocks of (1, I), one for all blocks of (O, I). Weights alone: what serves such a
model may round its inputs to 8 bits too (`activation_scheme`); here they are what they are. Source:
transformers, integrations/finegrained_fp8.py (_dequantize_fp8_weight); E4M3: Micikevicius et al.
2022, arXiv:2209.05433, table 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from veneer.quant.config import Quantize
from veneer.quant.in_files import FileWeight, scaled

MOST_VALUE = 448.0
ROWS_AT_ONCE = 256
_NAN = 0x7F


@dataclass(frozen=True, eq=False, kw_only=True)
class FP8(FileWeight):
    """tensors: "" uint8 (..., O, I), the bits of the values; scale float32 (..., ceil(O / rows),
    ceil(I / columns))."""

    by_rows: ClassVar[tuple[str, ...]] = ("", "scale")
    format: Quantize = field(default="fp8", init=False)
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensors[""].shape)

    def decode(self, tensors: Mapping[str, Tensor], out: Tensor) -> None:
        rows, columns = self.block
        # 2^8: what the exponents of E4M3 and float16 lie apart.
        scales = (tensors["scale"] * 256).repeat_interleave(rows, dim=0)
        for start in range(0, len(out), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            out[some].copy_(_as_half(tensors[""][some]))
            scaled(out[some], scales[some][: len(out[some])], columns)

    @classmethod
    def joined(cls, weights: Sequence[Self]) -> Self:
        """Blocks that would lie across two of them are cut into smaller ones of the same scale."""
        if len({weight.block[1] for weight in weights}) > 1:
            raise ValueError(
                "weights that the model holds as one have scales for other numbers of columns"
            )
        return super().joined(
            [weight._of_rows(math.gcd(*(w.shape[-2] for w in weights))) for weight in weights]
        )

    def _of_rows(self, rows: int) -> Self:
        rows = math.gcd(rows, self.block[0])
        scale = self.tensors["scale"].repeat_interleave(self.block[0] // rows, dim=-2)
        held = {"": self.tensors[""], "scale": scale[..., : self.shape[-2] // rows, :].contiguous()}
        return replace(self, tensors=held, block=(rows, self.block[1]))


def _as_half(bits: Tensor) -> Tensor:
    """Returns float16 with the values times 2^-8: sign, exponent and fraction in their places, zero
    bits behind; exact, for numbers below the normal ones too. Ten times as fast as torch's
    conversion on a CPU without AVX-512."""
    wide = bits.view(torch.int8).to(torch.int16)  # the sign above all
    return wide.bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)


def first_nan(bits: Tensor) -> list[int] | None:
    """Returns the place of the first value that is no number; E4M3 has no infinities."""
    bad = (bits & _NAN) == _NAN
    return bad.nonzero()[0].tolist() if bad.any() else None
