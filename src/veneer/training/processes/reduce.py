"""The gradient of a step out of its micro-batches', over all processes.

plain   each process adds up its own, and the processes' sums are added: as fast as can be; which
        process computed what shows in the last bits
exact   each micro-batch's gradient is rounded to a fixed grid and added as whole numbers, so that
        neither order nor the number of processes matters: equal bits on 1, 2 and 4 (with as many
        threads each); so is its norm

Where values are split over processes (training/optimizer/parts.py), both kinds add up a
micro-batch's gradient at the owner of each part.
"""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from veneer.training.processes.world import World

UPPER = 2.0**20
"""Of the grid's coarser half, whole multiples of 2^-20."""
LOWER = 2.0**40
"""What the finer half splits each of them into: multiples of 2^-60, below which a float32 gradient
is rounded."""
LIMIT = 2.0**30
"""From here on a value is taken for infinite, which stops the run: 2^13 micro-batches of it fit
into 64 bits."""
SQUARE_BITS = 29
"""Of each half of a square, as a share of the largest: the squares of 2^33 values add up within 64
bits."""

ReduceKind = Literal["plain", "exact"]


class GradientSum(Protocol):
    """gradient: of the flat buffer, or of this process's part of it (apart), which is 0 until
    `finish`."""

    def begin(self) -> None: ...

    def add(self) -> None:
        """A micro-batch's gradient has been computed."""

    def receive(self, place: slice, part: Tensor, owner: int) -> None:
        """Where values lie apart: all processes' `part` of a micro-batch's gradient, to `place` of
        its owner's."""

    def finish(self) -> None:
        """The gradient is that of all micro-batches of all processes."""

    def measured(self) -> Tensor:
        """One value on the gradient's device, for `norm`: the loop reads it together with
        others."""

    def norm(self, measured: float) -> float:
        """Of the whole gradient; nan or inf if any part is not finite."""


class PlainSum:
    def __init__(self, gradient: Tensor, world: World, *, apart: bool) -> None:
        self.gradient, self.world, self.apart = gradient, world, apart

    def begin(self) -> None: ...

    def add(self) -> None: ...

    def receive(self, place: slice, part: Tensor, owner: int) -> None:
        self.world.sum_at(part, owner)
        if owner == self.world.rank:
            self.gradient[place] += part

    def finish(self) -> None:
        if not self.apart:
            self.world.sum(self.gradient)

    def measured(self) -> Tensor:
        return _norm(self.gradient)

    def norm(self, measured: float) -> float:
        return math.sqrt(self.world.summed([measured**2])[0]) if self.apart else measured


class ExactSum:
    """16 bytes more a trained value that is held here; four times plain's traffic."""

    def __init__(self, gradient: Tensor, world: World, *, apart: bool) -> None:
        self.gradient, self.world, self.apart = gradient, world, apart
        self.sums = torch.zeros(2, gradient.numel(), dtype=torch.int64, device=gradient.device)

    def begin(self) -> None:
        self.sums.zero_()

    def add(self) -> None:
        if self.apart:
            return
        for part in _slices(self.gradient):
            self.sums[:, part] += _halves(self.gradient[part])
        self.gradient.zero_()

    def receive(self, place: slice, part: Tensor, owner: int) -> None:
        sums = self.sums[:, place]
        for each in _slices(part):
            halves = _halves(part[each])
            self.world.sum_at(halves, owner)
            if owner == self.world.rank:
                sums[:, each] += halves

    def finish(self) -> None:
        if not self.apart:
            self.world.sum(self.sums)
        for part in _slices(self.gradient):
            upper, lower = self.sums[:, part]
            found = (upper.double() + lower.double() / LOWER) / UPPER
            self.gradient[part] = torch.where(upper.abs() < LIMIT * UPPER, found, torch.inf).float()

    def measured(self) -> Tensor:
        """The norm itself, in float64; where values lie apart this process's largest."""
        if not self.gradient.numel():
            return self.gradient.new_zeros(())
        largest = torch.linalg.vector_norm(self.gradient, torch.inf)
        return largest if self.apart else self._norm(largest)

    def norm(self, measured: float) -> float:
        if not self.apart:
            return measured
        largest = max(self.world.gathered(measured))
        if largest == 0 or not math.isfinite(largest):
            return largest
        return float(self._norm(torch.full((), largest, device=self.gradient.device)))

    def _norm(self, largest: Tensor) -> Tensor:
        """Squares as shares of the largest value's, in whole numbers: the same whoever adds
        which."""
        # its inverse, without what is behind the leading bit: a power of two, by its bits
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
        if self.apart:
            self.world.sum(totals)
        upper_sum, lower_sum = totals.double()
        found = (upper_sum / grid + lower_sum / grid**2).sqrt() / scale
        return torch.where(largest.isfinite(), found, largest.double())


def _norm(values: Tensor) -> Tensor:
    """By rows of 1,024, and those again: torch's own of 5 million float32 values is 3 parts in
    10,000 too small."""
    while values.numel() > 1024:
        whole = values.numel() - values.numel() % 1024
        rows = torch.linalg.vector_norm(values[:whole].view(-1, 1024), dim=1)
        values = torch.cat([rows, values[whole:]])
    return torch.linalg.vector_norm(values)


KINDS: dict[ReduceKind, type[PlainSum] | type[ExactSum]] = {"plain": PlainSum, "exact": ExactSum}


def _halves(values: Tensor) -> Tensor:
    """[2, values]: on the grid. In slices: float64 of all values at once would be as much memory
    again."""
    wide = values.double()
    wide = torch.where(wide.abs() < LIMIT, wide, LIMIT)  # nan too: seen by its size at the end
    upper = (wide * UPPER).round()
    return torch.stack([upper.long(), ((wide * UPPER - upper) * LOWER).round().long()])


def _slices(values: Tensor, size: int = 1 << 20) -> list[slice]:
    return [slice(start, start + size) for start in range(0, values.numel(), size)]
