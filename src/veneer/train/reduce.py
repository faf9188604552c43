"""The gradient of a step out of its micro-batches', over all processes.

plain   each process adds up its own, and the processes' sums are added: as fast as can be; which process
        computed what shows in the last bits
exact   each micro-batch's gradient is rounded to a fixed grid and added as whole numbers, so that neither order
        nor the number of processes matters: equal bits on 1, 2 and 4 (with as many threads each)
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from veneer.train.world import World

UPPER = 2.0**20
"""Of the grid's coarser half, whole multiples of 2^-20."""
LOWER = 2.0**40
"""What the finer half splits each of them into: multiples of 2^-60, below which a float32 gradient is rounded."""
LIMIT = 2.0**30
"""From here on a value is taken for infinite, which stops the run: 2^13 micro-batches of it fit into 64 bits."""

Kind = Literal["plain", "exact"]


class Reduce(Protocol):
    """gradient: of the flat buffer, which backward adds to."""

    def begin(self) -> None: ...

    def add(self) -> None:
        """A micro-batch's gradient has been computed."""

    def finish(self, world: World) -> None:
        """The gradient is that of all micro-batches of all processes."""


class Plain:
    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def begin(self) -> None: ...

    def add(self) -> None: ...

    def finish(self, world: World) -> None:
        world.sum(self.gradient)


class Exact:
    """16 bytes more a trained value; four times plain's traffic."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self.sums = torch.zeros(2, gradient.numel(), dtype=torch.int64, device=gradient.device)

    def begin(self) -> None:
        self.sums.zero_()

    def add(self) -> None:
        """Rounds in slices: float64 of all values at once would be as much memory again."""
        for part in _slices(self.gradient):
            wide = self.gradient[part].double()
            wide = torch.where(wide.abs() < LIMIT, wide, LIMIT)  # nan too: seen by its size at the end
            upper = (wide * UPPER).round()
            self.sums[0, part] += upper.long()
            self.sums[1, part] += ((wide * UPPER - upper) * LOWER).round().long()
        self.gradient.zero_()

    def finish(self, world: World) -> None:
        world.sum(self.sums)
        for part in _slices(self.gradient):
            upper, lower = self.sums[:, part]
            found = (upper.double() + lower.double() / LOWER) / UPPER
            self.gradient[part] = torch.where(upper.abs() < LIMIT * UPPER, found, torch.inf).float()


KINDS: dict[Kind, type[Plain] | type[Exact]] = {"plain": Plain, "exact": Exact}


def _slices(values: Tensor, size: int = 1 << 20) -> list[slice]:
    return [slice(start, start + size) for start in range(0, values.numel(), size)]
