"""MXFP4: 4-bit floating values (E2M1) with one exponent for 32 neighbours, as gpt-oss stores its
experts.

    weight = E2M1[code] * 2^(exponent - 127)        exact in float32 and bf16

Held so that the kernels for 4-bit code books (kernels/packed/nf4.py) read it: the table of 16, the
exponents as scales that are looked up in a table of 256. Only the order of the two values in a byte
is another one than in the files. Source: OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4;
transformers, integrations/mxfp4.py. Shapes: E experts, I in_features, O out_features; in the model
these experts are (E, I, O), in the files (E, O, I).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from veneer.kernels.packed.nf4 import NestedScales, NF4Blocks
from veneer.quant.config import Quantize
from veneer.quant.matrix import PackedMatrix

GROUP = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MOST_EXPONENT = 252
"""As it is stored: the last at which 6 * 2^(exponent - 127) is a float32."""
_NESTED_BLOCK = 2**20


@dataclass(frozen=True, eq=False, kw_only=True)
class MXFP4:
    """A stack: tensors "" uint8 (E, O, I / 2), the first of two values in the high half; exponents
    uint8 (E, O, I / 32)."""

    format: Quantize = field(default="mxfp4", init=False)
    tensors: Mapping[str, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        E, O, half = self.tensors[""].shape
        return E, 2 * half, O

    @property
    def numbers(self) -> dict[str, float]:
        return {}

    def holding(self, tensors: Mapping[str, Tensor]) -> "MXFP4":
        return MXFP4(tensors=dict(tensors))

    def matrix(
        self, dtype: torch.dtype, *, number: int | None = None, transposed: bool = False
    ) -> PackedMatrix:
        assert transposed and number is not None
        _, I, O = self.shape
        codes, exponents = (
            self.tensors[""][number].view(-1),
            self.tensors["exponents"][number].view(-1),
        )
        ones = torch.ones(-(-exponents.numel() // _NESTED_BLOCK), device=codes.device)
        nested = NestedScales(_powers().to(codes.device), ones, _NESTED_BLOCK, 0.0)
        table = torch.tensor(VALUES, device=codes.device)
        return PackedMatrix(NF4Blocks(codes, exponents, table, GROUP, O * I, nested), I, O, dtype)


def high_first(codes: Tensor) -> Tensor:
    """Exchanges the two values of each byte."""
    return codes >> 4 | codes << 4


@cache
@torch.inference_mode(mode=False)
def _powers() -> Tensor:
    """Returns (256) float32: 2^(i - 127); the last stands for no number and is not used."""
    powers = torch.ldexp(torch.ones(256, device="cpu"), torch.arange(256, device="cpu") - 127)
    powers[255] = 0.0
    return powers
