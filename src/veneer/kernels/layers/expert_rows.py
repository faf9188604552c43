"""Sorts the rows of a mixture's input by their experts.

Shapes: M rows, K experts of a row, S = M K sorted rows, E experts.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.tape.repeated import Groups, Numbers


class _SortedNumbers(NamedTuple):
    """The row and the expert of each sorted row, the number of experts, and K."""

    rows: Numbers
    experts: Numbers
    num_experts: int
    width: int


class SortedRows(NamedTuple):
    """The rows by expert, and within an expert in their order.

    slots   (S) the place of each sorted row among the M K choices
    places  (M K) the sorted row of each choice
    """

    slots: Tensor
    places: Tensor
    numbers: _SortedNumbers

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.slots, self.places

    @property
    def experts(self) -> Tensor:
        """Returns (S) the expert of each sorted row."""
        return torch.from_numpy(self.numbers.experts).to(self.slots.device)

    @property
    def width(self) -> int:
        """Returns K."""
        return self.numbers.width

    @property
    def groups(self) -> Groups:
        """Returns the rows of each expert that has any."""
        return self.groups_within(slice(0, len(self.numbers.rows)))

    def groups_within(self, rows: slice) -> Groups:
        """Returns the sorted rows of each expert that come from these rows."""
        of_row, of_expert, size, _ = self.numbers
        before = np.bincount(of_expert[of_row < rows.start], minlength=size)
        within = (of_row >= rows.start) & (of_row < rows.stop)
        counts = np.bincount(of_expert[within], minlength=size)
        starts = np.cumsum(np.bincount(of_expert, minlength=size))
        starts = np.concatenate(([0], starts[:-1]))
        numbers = np.flatnonzero(counts)
        return Groups(numbers, (starts + before)[numbers], counts[numbers])

    def gather(self, x: Tensor) -> Tensor:
        """Returns the sorted rows (S, width) of x (M, width)."""
        return x.index_select(0, self.slots // self.width)

    def sum_rows(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """Returns the weighted sums (M, width) of sorted rows y (S, width); weights (M, K)."""
        places = self.places.view(-1, self.width)
        if weights is None or weights.dtype == y.dtype:  # summed in float32, without a copy of y
            return F.embedding_bag(places, y, mode="sum", per_sample_weights=weights)
        return (y[places] * weights[..., None]).sum(1).to(y.dtype)

    def unsorted(self, values: Tensor, like: Tensor) -> Tensor:
        """Returns values (S) of the sorted rows as (M, K), in the type of `like`."""
        return values.index_select(0, self.places).view(like.shape).to(like.dtype)


def sort_rows(index: Tensor, num_experts: int) -> SortedRows:
    """Sorts by the experts' numbers index (M, K). While planning every expert gets an equal
    share."""
    size, width = index.numel(), index.shape[1]
    if index.is_meta:
        share = -(-size // num_experts)
        experts = np.repeat(np.arange(num_experts), share)[:size]
        numbers = _SortedNumbers(np.arange(size) // width, experts, num_experts, width)
        return SortedRows(index.new_empty(size), index.new_empty(size), numbers)
    experts = index.reshape(-1).numpy()
    order = np.argsort(experts, kind="stable")
    places = np.empty_like(order)
    places[order] = np.arange(size)
    numbers = _SortedNumbers(order // width, experts[order], num_experts, width)
    return SortedRows(torch.from_numpy(order), torch.from_numpy(places), numbers)
