"""Bundles of short updates: their products are computed together, on stacks of factors and rows.

Shorter segments and smaller ranks are padded with zeros. On CUDA a bundle is one launch a product,
without padding (grouped.py). Shapes: M rows, I in_features, O out_features, R rank; of a bundle n
updates of L rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.dense.grouped import CudaBundle
from veneer.kernels.dense.row_updates import RowUpdate

LONG = 64
"""Segments of so many rows are computed alone: their products cost more than the calls."""
SPREAD = 2
"""Largest ratio of segment lengths in one bundle: padding is computed too."""


@dataclass(frozen=True)
class Bundle:
    """Updates whose segments are in order and do not overlap.

    numbers  numbers of the updates
    chosen   (n * L) rows that are computed, with a shorter segment's last row repeated; None: rows
             first to last
    real     (sum of m) which of them are not padding
    places   (sum of m) the rows of y that these belong to
    """

    numbers: tuple[int, ...]
    length: int
    first: int
    last: int
    chosen: Tensor | None
    real: Tensor | None
    places: Tensor | None
    lengths: tuple[int, ...]

    @staticmethod
    def of(
        updates: Sequence[RowUpdate],
        numbers: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Bundle | CudaBundle":
        members = [updates[n] for n in numbers]
        rows = [update.rows for update in members]
        on_cuda: CudaBundle | None = CudaBundle.of(numbers, rows, dtype, device)
        return _bundle(members, numbers, device) if on_cuda is None else on_cuda

    def stacked(self, x: Tensor) -> Tensor:
        """Stacks the rows of x: (M, K) -> (n, L, K)."""
        rows = x[self.first : self.last] if self.chosen is None else x.index_select(0, self.chosen)
        return rows.view(len(self.numbers), self.length, -1)

    def padded(self, x: Tensor, pieces: Sequence[Tensor]) -> Tensor:
        """Stacks other values of each update's rows: (n, L, K)."""
        return torch.stack([F.pad(piece, (0, 0, 0, self.length - len(piece))) for piece in pieces])

    def down(self, x: Tensor, factor: Tensor) -> Tensor:
        """x (n, L, K), factor (n, R, K) -> (n, L, R)."""
        return torch.bmm(x, factor.mT)

    def gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """left^T right of each update's rows: (n, columns of left, columns of right)."""
        return torch.bmm(left.mT, right)

    def rows_of(self, narrow: Tensor, place: int) -> Tensor:
        """Returns the rows of one update, without padding."""
        return narrow[place, : self.lengths[place]]

    def add_to(self, y: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds left (n, L, R) times right (n, R, K) to the rows of y."""
        if self.chosen is None:
            rows = y[self.first : self.last].view(*left.shape[:2], -1)
            rows.baddbmm_(left, right)
            return
        assert self.real is not None and self.places is not None
        y.index_add_(
            0, self.places, torch.bmm(left, right).flatten(0, 1).index_select(0, self.real)
        )

    def zero_padding(self, x: Tensor) -> Tensor:
        """Sets padding rows of (n, L, K) to zero, in place."""
        if self.real is not None:
            padding = torch.ones(x.shape[0] * x.shape[1], dtype=torch.bool, device=x.device)
            padding[self.real] = False
            x.view(-1, x.shape[-1])[padding] = 0
        return x


def stack_of(
    pairs: Sequence[tuple[Tensor, Tensor]], scalings: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stacks factors: A (n, R, I), and B (n, O, R) times scaling. Smaller ranks are padded with
    zeros."""
    most = max(len(A) for A, _ in pairs)
    A = torch.stack([F.pad(A, (0, 0, 0, most - len(A))) if len(A) < most else A for A, _ in pairs])
    B = torch.stack(
        [F.pad(B, (0, most - B.shape[1])) if B.shape[1] < most else B for _, B in pairs]
    )
    wide = torch.promote_types(dtype, B.dtype)  # scaled before it is rounded
    scale = torch.tensor(scalings, dtype=wide).to(B.device)
    return A.to(dtype), (B.to(wide) * scale[:, None, None]).to(dtype)


def make_bundles(
    updates: Sequence[RowUpdate], dtype: torch.dtype, device: torch.device
) -> list[Bundle | CudaBundle]:
    """Groups short segments of similar length. Segments that no bundle has are computed alone."""
    groups: list[list[int]] = []
    order = sorted(range(len(updates)), key=lambda n: updates[n].rows.start)
    for number in order:
        rows, count = updates[number].rows, updates[number].count
        if count >= LONG:
            continue
        for numbers in groups:
            sizes = [updates[n].count for n in numbers]
            if updates[numbers[-1]].rows.stop <= rows.start and max(*sizes, count) <= SPREAD * min(
                *sizes, count
            ):
                numbers.append(number)
                break
        else:
            groups.append([number])
    return [Bundle.of(updates, numbers, dtype, device) for numbers in groups if len(numbers) > 1]


def _bundle(updates: Sequence[RowUpdate], numbers: Sequence[int], device: torch.device) -> Bundle:
    rows = [update.rows for update in updates]
    first, last = rows[0].start, rows[-1].stop
    counts = tuple(update.count for update in updates)
    length, covered = max(counts), sum(counts)
    if covered == last - first == len(numbers) * length:  # equal lengths without gaps
        return Bundle(tuple(numbers), length, first, last, None, None, None, counts)
    starts, lengths = torch.tensor([segment.start for segment in rows]), torch.tensor(counts)
    within = torch.arange(length)
    chosen = starts[:, None] + torch.minimum(within[None], lengths[:, None] - 1)
    real = (within[None] < lengths[:, None]).flatten().nonzero()[:, 0]
    places = chosen.flatten()[real]
    moved = [indices.to(device) for indices in (chosen.flatten(), real, places)]
    return Bundle(tuple(numbers), length, first, last, moved[0], moved[1], moved[2], counts)


def not_bundled(updates: Sequence[RowUpdate], bundles: Sequence[Bundle | CudaBundle]) -> list[int]:
    """Returns the numbers of the updates that are in no bundle."""
    bundled = {number for bundle in bundles for number in bundle.numbers}
    return [number for number in range(len(updates)) if number not in bundled]


def stacked_inputs(
    x_MI: Tensor, bundle: Bundle | CudaBundle, updates: Sequence[RowUpdate]
) -> Tensor:
    """Returns the bundle's rows of x, each segment after its own dropout."""
    if all(update.dropout is None for update in updates):
        return bundle.stacked(x_MI)
    return bundle.padded(x_MI, [update.dropped(x_MI) for update in updates])
