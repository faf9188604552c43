"""Sums the gradients of a step's micro-batches over all processes.

plain   each process adds up its own, and the sums are added: the fastest way; which process
        computed what shows in the last bits
exact   each micro-batch's gradient is rounded to a fixed grid and added as whole numbers, so
        neither order nor the number of processes matters: equal bits on 1, 2 and 4 processes (with
        the same threads each), and so is the norm

If each process holds its own rows (training/optimizer/sharded_values.py), FSDP2 has already summed
them, and only plain is possible.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from veneer.training.processes.world import World

UPPER = 2.0**20
"""Scale of the grid's coarser half: multiples of 2^-20."""
LOWER = 2.0**40
"""Scale of the finer half: multiples of 2^-60, below which a float32 gradient is rounded."""
LIMIT = 2.0**30
"""Larger values count as infinite, which stops the run: 2^13 micro-batches of this fit into 64
bits.
"""
SQUARE_BITS = 29
"""Bits of each half of a square, as a share of the largest: squares of 2^33 values fit into 64
bits.
"""

ReduceKind = Literal["plain", "exact"]


class PlainSum:
    """Sums gradients into the flat buffer. This kind adds up what each process has summed.

    measured: one value on the gradient's device, for `norm`; the loop reads it with others
    """

    def __init__(self, gradient: Tensor, world: World, *, apart: bool) -> None:
        self.gradient, self.world, self.apart = gradient, world, apart

    def begin(self) -> None: ...

    def add(self) -> None:
        """Adds the gradient of a micro-batch, once it has been computed."""

    def finish(self) -> None:
        """Puts the sum over all micro-batches and processes into the gradient."""
        if not self.apart:
            self.world.sum(self.gradient)

    def measured(self) -> Tensor:
        return _norm(self.gradient)

    def norm(self, measured: float) -> float:
        """Returns the norm of the whole gradient; nan or inf if any value is not finite."""
        return math.sqrt(self.world.summed([measured**2])[0]) if self.apart else measured


class ExactSum(PlainSum):
    """Takes 16 more bytes per trained value held here, and four times the traffic of PlainSum."""

    def __init__(self, gradient: Tensor, world: World, *, apart: bool) -> None:
        assert not apart, "the settings refuse it"
        super().__init__(gradient, world, apart=apart)
        self.sums = torch.zeros(2, gradient.numel(), dtype=torch.int64, device=gradient.device)

    def begin(self) -> None:
        self.sums.zero_()

    def add(self) -> None:
        for part in _slices(self.gradient):
            self.sums[:, part] += _halves(self.gradient[part])
        self.gradient.zero_()

    def finish(self) -> None:
        self.world.sum(self.sums)
        for part in _slices(self.gradient):
            upper, lower = self.sums[:, part]
            sum_of_parts = (upper.double() + lower.double() / LOWER) / UPPER
            self.gradient[part] = torch.where(
                upper.abs() < LIMIT * UPPER, sum_of_parts, torch.inf
            ).float()

    def measured(self) -> Tensor:
        """Returns the norm in float64: squares as shares of the largest value's, summed in whole
        numbers, so that any order gives the same bits.
        """
        if not self.gradient.numel():
            return self.gradient.new_zeros(())
        largest = torch.linalg.vector_norm(self.gradient, torch.inf)
        # The power of two next to 1 / largest, made from its bits.
        scale = ((1023 - torch.frexp(largest.double()).exponent.long()) << 52).view(torch.float64)
        grid, totals = (
            2.0**SQUARE_BITS,
            torch.zeros(2, dtype=torch.int64, device=self.gradient.device),
        )
        for part in _slices(self.gradient):
            squares = (self.gradient[part].double() * scale).square() * grid
            upper = squares.floor()
            totals[0] += upper.long().sum()
            totals[1] += ((squares - upper) * grid).round().long().sum()
        upper_sum, lower_sum = totals.double()
        norm = (upper_sum / grid + lower_sum / grid**2).sqrt() / scale
        return torch.where(largest.isfinite(), norm, largest.double())


def _norm(values: Tensor) -> Tensor:
    """Computes a norm by rows of 1,024: torch's, over 5 million values, is 3 in 10,000 too
    small.
    """
    while values.numel() > 1024:
        even = values.numel() - values.numel() % 1024
        rows = torch.linalg.vector_norm(values[:even].view(-1, 1024), dim=1)
        values = torch.cat([rows, values[even:]])
    return torch.linalg.vector_norm(values)


KINDS: dict[ReduceKind, type[PlainSum]] = {"plain": PlainSum, "exact": ExactSum}


def _halves(values: Tensor) -> Tensor:
    """Rounds values to the grid: [2, values]. Call it by slices: float64 takes twice the memory."""
    wide = values.double()
    wide = torch.where(wide.abs() < LIMIT, wide, LIMIT)  # nan, too: its size shows at the end
    upper = (wide * UPPER).round()
    return torch.stack([upper.long(), ((wide * UPPER - upper) * LOWER).round().long()])


def _slices(values: Tensor, size: int = 1 << 20) -> list[slice]:
    return [slice(start, start + size) for start in range(0, values.numel(), size)]
