"""Segments of rows with adapters of their own on CUDA: a bundle (segments.py) whose products are
one launch each.

Stands in a Bundle's place. What is a stack of segments there are here the rows themselves, where
they lie: nothing is gathered or filled up, however unlike the segments are. Shapes: M rows, n
updates, K width, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import TYPES
from veneer.kernels.cuda import launch
from veneer.kernels.upload import sent


@dataclass(frozen=True)
class CudaBundle:
    """numbers: of its updates, whose rows lie apart. tiles, spans: as cuda/triton_grouped.py takes
    them."""

    numbers: tuple[int, ...]
    rows: tuple[slice, ...]
    tiles: Tensor
    spans: Tensor
    kernels: Any

    @classmethod
    def of(
        cls, numbers: Sequence[int], rows: Sequence[slice], dtype: torch.dtype, device: torch.device
    ) -> Any:
        """None where there are no such kernels."""
        kernels = (
            launch.module_on("grouped", device)
            if device.type == "cuda" and dtype in TYPES
            else None
        )
        if kernels is None:
            return None
        tiles = [
            (place, first, min(kernels.ROWS, each.stop - first))
            for place, each in enumerate(rows)
            for first in range(each.start, each.stop, kernels.ROWS)
        ]
        spans = [(each.start, each.stop - each.start) for each in rows]
        tables = [sent(torch.tensor(each), device) for each in (tiles, spans)]
        return cls(tuple(numbers), tuple(rows), tables[0], tables[1], kernels)

    def stacked(self, x: Tensor) -> Tensor:
        """(M, K), a row's values side by side."""
        return x if x.stride(1) == 1 else x.contiguous()

    def seen(self, x: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """x with other values in the rows of each update."""
        found = x.clone(memory_format=torch.contiguous_format)
        for rows, piece in zip(self.rows, pieces, strict=True):
            found[rows] = piece
        return found

    def down(self, x: Tensor, factor: Tensor) -> Tensor:
        """factor (n, R, K) -> (M, R)."""
        return self.kernels.down(x, factor, self.tiles)

    def hide_filling(self, narrow: Tensor) -> Tensor:
        return narrow

    def add_to(self, y: Tensor, narrow: Tensor, factor: Tensor) -> None:
        """factor (n, R, K)."""
        there = self.stacked(y)
        self.kernels.add_up(there, narrow, factor.mT, self.tiles)
        if there is not y:
            y.copy_(there)

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """left^T right of each update's rows: (n, columns of left, columns of right), float32."""
        if left.shape[1] <= right.shape[1]:
            return self.kernels.gradient(left, right, self.spans)
        return self.kernels.gradient(right, left, self.spans).mT

    def own(self, narrow: Tensor, place: int) -> Tensor:
        """The rows of one update."""
        return narrow[self.rows[place]]
