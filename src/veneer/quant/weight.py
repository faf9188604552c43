"""A weight that is held packed, whatever its format: what the modules over it (layers.py) ask of
it.

The first of its tensors stands under the weight's own name and says nothing of the dense shape; the
others are scales, tables, orders. Formats: nf4.py (made here), fp8.py, mxfp4.py and int4.py (as
files of others hold them).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from veneer.linear import FrozenLinear
from veneer.quant.config import Quantize


@dataclass(frozen=True)
class PackedSize:
    """What one takes in memory. name: in its files or in its model; shape: of the dense weight."""

    name: str
    shape: tuple[int, ...]
    bytes: int


class PackedWeight(Protocol):
    @property
    def format(self) -> Quantize: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight, as the dense module has it: (O, I), or of a stack (E, O, I) or (E,
        I, O)."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By the ending of their names: "" for the packed bytes, a parameter; the others become
        buffers."""

    def holding(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same weight in other memory."""

    @property
    def numbers(self) -> Mapping[str, float]:
        """What decides values beside the tensors."""

    def matrix(
        self, dtype: torch.dtype, *, number: int | None = None, transposed: bool = False
    ) -> FrozenLinear:
        """number: of an expert of a stack, which the dense module has `transposed`, as (E, I, O);
        None: no stack."""
