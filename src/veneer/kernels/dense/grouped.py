"""A bundle of updates (bundles.py) on CUDA, with one launch per product.

It has the methods of Bundle, but instead of stacks it works on the rows in place: nothing is
gathered or padded, however different the segments are. Shapes: M rows, n updates, K width, R rank.
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
    """Updates whose rows do not overlap, by their numbers. tiles and spans are the tables of
    cuda/triton_grouped.py."""

    numbers: tuple[int, ...]
    rows: tuple[slice, ...]
    tiles: Tensor
    spans: Tensor
    kernels: Any

    @classmethod
    def of(
        cls, numbers: Sequence[int], rows: Sequence[slice], dtype: torch.dtype, device: torch.device
    ) -> Any:
        """Makes a bundle. Returns None without CUDA kernels for it."""
        kernels = (
            launch.module_on("triton_grouped", device)
            if device.type == "cuda" and dtype in TYPES
            else None
        )
        if kernels is None:
            return None
        tiles = [
            (place, first, min(kernels.ROWS, segment.stop - first))
            for place, segment in enumerate(rows)
            for first in range(segment.start, segment.stop, kernels.ROWS)
        ]
        spans = [(segment.start, segment.stop - segment.start) for segment in rows]
        tables = [sent(torch.tensor(table), device) for table in (tiles, spans)]
        return cls(tuple(numbers), tuple(rows), tables[0], tables[1], kernels)

    def stacked(self, x: Tensor) -> Tensor:
        """Returns x (M, K) with contiguous rows."""
        return x if x.stride(1) == 1 else x.contiguous()

    def padded(self, x: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """x with other values in the rows of each update."""
        changed = x.clone(memory_format=torch.contiguous_format)
        for rows, piece in zip(self.rows, pieces, strict=True):
            changed[rows] = piece
        return changed

    def down(self, x: Tensor, factor: Tensor) -> Tensor:
        """Multiplies x with factor (n, R, K): (M, R)."""
        return self.kernels.down(x, factor, self.tiles)

    def zero_padding(self, narrow: Tensor) -> Tensor:
        return narrow

    def add_to(self, y: Tensor, narrow: Tensor, factor: Tensor) -> None:
        """Adds the products with factor (n, R, K) to y."""
        rows = self.stacked(y)
        self.kernels.add_up(rows, narrow, factor.mT, self.tiles)
        if rows is not y:
            y.copy_(rows)

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """left^T right of each update's rows: (n, columns of left, columns of right), float32."""
        if left.shape[1] <= right.shape[1]:
            return self.kernels.gradient(left, right, self.spans)
        return self.kernels.gradient(right, left, self.spans).mT

    def rows_of(self, narrow: Tensor, place: int) -> Tensor:
        """Returns the rows of one update."""
        return narrow[self.rows[place]]
