"""Decides which rows of several sets an epoch uses, and how often.

Each set is an endless sequence: its rows in a random order, then in another random order, and so
on. An epoch continues where the previous one stopped, so a row is repeated only after all other
rows of its set were used. Everything follows from (seed, epoch): a resumed run uses the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mixture:
    """Sizes of the sets, and how many rows of each an epoch uses.

    sizes   rows of each set; row numbers continue from set to set
    draws   rows that an epoch uses
    """

    sizes: tuple[int, ...]
    draws: tuple[float, ...]

    @property
    def is_plain(self) -> bool:
        """Whether an epoch uses every row once."""
        return all(size == draw for size, draw in zip(self.sizes, self.draws, strict=True))

    @property
    def most_uses(self) -> int:
        """How often an epoch uses a row at most."""
        uses = [draw / size for size, draw in zip(self.sizes, self.draws, strict=True) if size]
        return 1 if self.is_plain else max(map(math.ceil, uses), default=0) + 1

    def rows(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Returns the row numbers of an epoch, set by set."""
        if self.is_plain:
            return np.arange(sum(self.sizes))
        parts, first = [], 0
        for number, (size, draw) in enumerate(zip(self.sizes, self.draws, strict=True)):
            start, stop = round(epoch * draw), round((epoch + 1) * draw)
            if size:
                parts.append(
                    first + rows_in_cycles(size, start, stop, seed=seed, stream=(number + 1) << 32)
                )
            first += size
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def among(self, rows: NDArray[np.int64]) -> Mixture:
        """Restricts the mixture to these rows, whose numbers rise; each keeps its frequency, unless
        an epoch would take less than a row of each set."""
        ends = np.searchsorted(rows, np.cumsum([0, *self.sizes]))
        sizes = tuple(np.diff(ends).tolist())
        parts = zip(self.draws, sizes, self.sizes, strict=True)
        draws = [draw * left / before if before else 0.0 for draw, left, before in parts]
        least = min(max(draws), 1.0) or 1.0
        return Mixture(sizes, tuple(draw / least for draw in draws))


def rows_in_cycles(
    size: int, start: int, stop: int, *, seed: int, stream: int
) -> NDArray[np.int64]:
    """Returns a range of an endless sequence: all rows in a random order, then in another one.

    stream: tells sequences of one seed apart; a multiple of 2**32
    """
    parts = [np.zeros(0, dtype=np.int64)]
    for cycle in range(start // size, -(-stop // size)):
        generator = np.random.Generator(np.random.Philox(key=[seed, stream | cycle]))
        order = generator.permutation(size)
        parts.append(order[max(start - cycle * size, 0) : stop - cycle * size])
    return np.concatenate(parts)


def mix_sets(
    sizes: Sequence[int],
    tokens: Sequence[int],
    weights: Sequence[float],
    shares: Sequence[float | None],
    *,
    by: str,
) -> Mixture:
    """Mixes sets by weights and shares. by: whether shares count rows or tokens.

    A set with a share makes up that part of an epoch, whatever its size. In other sets each row is
    used `weight` times. If all sets have shares, an epoch has as many rows (tokens) as all sets
    together.
    """
    measured = [size if by == "rows" else count for size, count in zip(sizes, tokens, strict=True)]
    total_share = sum(share for share in shares if share is not None)
    if all(share is not None for share in shares):
        whole = float(sum(measured))
    else:
        unshared = zip(measured, weights, shares, strict=True)
        whole = sum(amount * weight for amount, weight, share in unshared if share is None) / (
            1 - total_share
        )
    draws = []
    for size, amount, weight, share in zip(sizes, measured, weights, shares, strict=True):
        draws.append(
            size * weight if share is None else whole * share * size / amount if amount else 0.0
        )
    return Mixture(tuple(sizes), tuple(draws))
