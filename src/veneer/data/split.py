"""Which rows are held out: as many as the share asks for, the prompts with the smallest hashes.

The choice depends on the rows' content alone, not on their order, and all rows with one prompt fall
on one side. The share is met to the row where prompts differ. Each row that is added or removed
moves at most one other row across, where prompts differ.

Source: the hash is prompt_key (examples.py), below 2**63.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from veneer.data.examples import Row, prompt_key

Keys = NDArray[np.int64]
Holds = Callable[[Row], bool]
"""Whether a row is held out."""
BY_COUNT, BY_THRESHOLD = "count", "threshold"


def by_threshold(share: float) -> Holds:
    """Holds out every prompt whose hash is below the share of all hashes.

    Versions that began older runs split so: it adds up to the share in large sets alone.
    """
    return lambda row: prompt_key(row) < share * (1 << 63)


class Split:
    """Divides sets, one after another, into rows to train on and rows to hold out.

    A prompt stays on the side on which an earlier set or an earlier share put it.
    """

    def __init__(self) -> None:
        self._held, self._others = _none(), _none()

    def hold_out(self, prompts: Iterable[int], share: float) -> Holds:
        """Chooses among the rows of a set. prompts: prompt_key of each row, in any order."""
        rows = np.fromiter(prompts, dtype=np.int64)
        keys, counts = np.unique(rows, return_counts=True)
        decided = np.isin(keys, self._held)
        free = ~decided & ~np.isin(keys, self._others)
        chosen = _nearest(keys[free], counts[free], share * len(rows) - int(counts[decided].sum()))
        held = np.union1d(keys[decided], chosen)
        self._held = np.union1d(self._held, held)
        self._others = np.union1d(self._others, np.setdiff1d(keys, held))
        return lambda row: _contains(held, prompt_key(row))


def shared_out(rows: Sequence[Row], shares: Sequence[float]) -> list[list[Row]]:
    """The rows that are left, then those of each share, each in file order. No prompt is in two
    parts."""
    prompts = [prompt_key(row) for row in rows]
    parts = parts_of_shares(prompts, shares)
    found: list[list[Row]] = [[] for _ in range(len(shares) + 1)]
    for row, prompt in zip(rows, prompts, strict=True):
        found[part_of(prompt, parts)].append(row)
    return found


def parts_of_shares(prompts: Sequence[int], shares: Sequence[float]) -> list[Keys]:
    """The prompts of each share, which make up that share of the rows. prompts: prompt_key of each
    row."""
    keys, counts = np.unique(np.array(prompts, dtype=np.int64), return_counts=True)
    parts = []
    for share in shares:
        part = _nearest(keys, counts, share * len(prompts))
        left = ~np.isin(keys, part)
        keys, counts = keys[left], counts[left]
        parts.append(part)
    return parts


def part_of(prompt: int, parts: Sequence[Keys]) -> int:
    """Number of the part that holds the prompt, from 1; 0 if none does."""
    return next((number for number, keys in enumerate(parts, 1) if _contains(keys, prompt)), 0)


def _nearest(keys: Keys, counts: Keys, wanted: float) -> Keys:
    """Prompts, the smallest hashes first, each of which brings the number of rows nearer to
    `wanted`."""
    chosen, missing = [], wanted
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        if missing <= 0.5:  # one row more would be no nearer
            break
        if abs(missing - count) < missing:
            chosen.append(key)
            missing -= count
    return np.array(chosen, dtype=np.int64)


def _contains(keys: Keys, key: int) -> bool:
    at = int(np.searchsorted(keys, key))
    return at < len(keys) and int(keys[at]) == key


def _none() -> Keys:
    return np.zeros(0, dtype=np.int64)
