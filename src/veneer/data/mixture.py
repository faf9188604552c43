"""How many rows of each of several sets an epoch takes, and which.

Each set is one endless sequence: its rows in a random order, then in another one, and so on. An
epoch goes on where the one before stopped, so no row comes a second time before all others of its
set came once. All of it follows from (seed, epoch): a resumed run takes the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mixture:
    """sizes: rows of each set, which are numbered on from set to set. draws: how many of them an
    epoch takes."""

    sizes: tuple[int, ...]
    draws: tuple[float, ...]

    @property
    def is_plain(self) -> bool:
        """Every row once an epoch."""
        return all(size == draw for size, draw in zip(self.sizes, self.draws, strict=True))

    def rows(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Numbers of an epoch's rows, set by set."""
        if self.is_plain:
            return np.arange(sum(self.sizes))
        parts, first = [], 0
        for number, (size, draw) in enumerate(zip(self.sizes, self.draws, strict=True)):
            start, stop = round(epoch * draw), round((epoch + 1) * draw)
            for cycle in range(start // size, -(-stop // size)) if size else ():
                generator = np.random.Generator(
                    np.random.Philox(key=[seed, (number + 1) << 32 | cycle])
                )
                order = first + generator.permutation(size)
                parts.append(order[max(start - cycle * size, 0) : stop - cycle * size])
            first += size
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def among(self, rows: NDArray[np.int64]) -> Mixture:
        """Of these rows alone, whose numbers rise: each is taken as often as before."""
        ends = np.searchsorted(rows, np.cumsum([0, *self.sizes]))
        sizes = tuple(np.diff(ends).tolist())
        draws = zip(self.draws, sizes, self.sizes, strict=True)
        return Mixture(
            sizes, tuple(draw * now / before if before else 0.0 for draw, now, before in draws)
        )


def mixed(
    sizes: Sequence[int],
    tokens: Sequence[int],
    weights: Sequence[float],
    shares: Sequence[float | None],
    *,
    by: str,
) -> Mixture:
    """Of sets with so many rows and tokens. by: what shares are of, rows or tokens.

    A set with a share makes up that part of an epoch, whatever its size; the others give each row
    `weight` times. Where all have shares, an epoch has as many rows (tokens) as all sets together.
    """
    measured = [size if by == "rows" else count for size, count in zip(sizes, tokens, strict=True)]
    given = sum(share for share in shares if share is not None)
    if all(share is not None for share in shares):
        whole = float(sum(measured))
    else:
        kept = zip(measured, weights, shares, strict=True)
        whole = sum(amount * weight for amount, weight, share in kept if share is None) / (
            1 - given
        )
    draws = []
    for size, amount, weight, share in zip(sizes, measured, weights, shares, strict=True):
        draws.append(
            size * weight if share is None else whole * share * size / amount if amount else 0.0
        )
    return Mixture(tuple(sizes), tuple(draws))
