"""The interface of a packed weight, for the modules of layers.py.

The first of its tensors has the weight's own name, and a shape that says nothing of the dense one.
The others are scales, tables and orders. Formats: nf4.py (packed by Veneer), fp8.py, mxfp4.py and
int4.py (read from files that others packed).
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
    """Memory of a packed weight. name: in its files or its model; shape: of the dense weight."""

    name: str
    shape: tuple[int, ...]
    bytes: int


class PackedWeight(Protocol):
    @property
    def format(self) -> Quantize: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight: (O, I), or of a stack (E, O, I) or (E, I, O)."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the tensors by the ending of their names: "" for the packed bytes, which are a
        parameter; the others become buffers."""

    def holding(self, tensors: Mapping[str, Tensor]) -> Self:
        """Returns the same weight with other tensors."""

    @property
    def numbers(self) -> Mapping[str, float]:
        """Returns the numbers that decoding needs besides the tensors."""

    def matrix(
        self, dtype: torch.dtype, *, number: int | None = None, transposed: bool = False
    ) -> FrozenLinear:
        """Returns one matrix of the weight. number: expert of a stack, None without a stack.
        transposed: the dense stack is (E, I, O)."""
