"""Splits rows into training and validation: the prompts with the smallest hashes are held out.

The choice depends on the rows' content alone, not on their order, and all rows with the same prompt
are on the same side. The share is met to the row if all prompts differ; then a row that is added or
removed moves at most one other row to the other side.

The hash is prompt_key (examples.py), below 2**63.
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
    """Holds out every prompt whose hash is below `share` of the largest hash.

    Older versions split in this way, and their runs resume with it. The share is only met on
    average.
    """
    return lambda row: prompt_key(row) < share * (1 << 63)


class Split:
    """Divides sets, one after another, into training rows and held-out rows.

    A prompt stays on the side on which an earlier set put it.
    """

    def __init__(self) -> None:
        self._held, self._trained = _no_keys(), _no_keys()

    def hold_out(self, prompts: Iterable[int], share: float) -> Holds:
        """Chooses the held-out rows of a set. prompts: prompt_key of each row, in any order."""
        rows = np.fromiter(prompts, dtype=np.int64)
        keys, counts = np.unique(rows, return_counts=True)
        decided = np.isin(keys, self._held)
        free = ~decided & ~np.isin(keys, self._trained)
        chosen = _nearest(keys[free], counts[free], share * len(rows) - int(counts[decided].sum()))
        held = np.union1d(keys[decided], chosen)
        self._held = np.union1d(self._held, held)
        self._trained = np.union1d(self._trained, np.setdiff1d(keys, held))
        return lambda row: _contains(held, prompt_key(row))


def split_by_shares(rows: Sequence[Row], shares: Sequence[float]) -> list[list[Row]]:
    """Splits rows by shares: first the remaining rows, then one part for each share.

    Each part keeps the order of the file, and no prompt is in two parts.
    """
    prompts = [prompt_key(row) for row in rows]
    part_keys = parts_of_shares(prompts, shares)
    parts: list[list[Row]] = [[] for _ in range(len(shares) + 1)]
    for row, prompt in zip(rows, prompts, strict=True):
        parts[part_of(prompt, part_keys)].append(row)
    return parts


def parts_of_shares(prompts: Sequence[int], shares: Sequence[float]) -> list[Keys]:
    """Chooses the prompts of each share. prompts: prompt_key of each row."""
    keys, counts = np.unique(np.array(prompts, dtype=np.int64), return_counts=True)
    parts = []
    for share in shares:
        part = _nearest(keys, counts, share * len(prompts))
        left = ~np.isin(keys, part)
        keys, counts = keys[left], counts[left]
        parts.append(part)
    return parts


def part_of(prompt: int, parts: Sequence[Keys]) -> int:
    """Returns the number of the part that holds the prompt, from 1; 0 if no part does."""
    return next((number for number, keys in enumerate(parts, 1) if _contains(keys, prompt)), 0)


def _nearest(keys: Keys, counts: Keys, wanted: float) -> Keys:
    """Takes prompts by rising hash while each brings the number of rows nearer to `wanted`."""
    chosen, missing = [], wanted
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        if missing <= 0.5:  # another row would not bring it nearer
            break
        if abs(missing - count) < missing:
            chosen.append(key)
            missing -= count
    return np.array(chosen, dtype=np.int64)


def _contains(keys: Keys, key: int) -> bool:
    at = int(np.searchsorted(keys, key))
    return at < len(keys) and int(keys[at]) == key


def _no_keys() -> Keys:
    return np.zeros(0, dtype=np.int64)
