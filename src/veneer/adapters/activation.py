"""Finds where an adapter with an activation begins to act.

Activated LoRA (aLoRA, Greenewald et al. 2025, arXiv:2504.12397): the base alone computes all tokens
before the last occurrence of the invocation tokens; the adapter acts from their first token on. A
text without them is computed by the base alone. Facts: PEFT 0.21.2, peft/tuners/lora/variants.py.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[int] | NDArray[np.integer]


def activation_start(ids: Ids, invocation: Sequence[int]) -> int:
    """Returns the first token on which the adapter acts: the start of the last occurrence of the
    invocation tokens. Returns the number of ids if there is none, and 0 for no invocation."""
    if not invocation:
        return 0
    text, size = np.asarray(ids), len(invocation)
    candidates = np.flatnonzero(text[: max(len(text) - size + 1, 0)] == invocation[0])
    for start in reversed(candidates.tolist()):
        if np.array_equal(text[start : start + size], invocation):
            return int(start)
    return len(text)


def active_tokens(rows: Sequence[Ids], invocation: Sequence[int]) -> list[slice]:
    """Returns the tokens on which the adapter acts, as a slice for each row that has any.

    All rows have the same length; the slices count tokens over all rows, one row after another.
    """
    length = len(rows[0]) if len(rows) else 0
    starts = [activation_start(row, invocation) for row in rows]
    return [
        slice(number * length + start, (number + 1) * length)
        for number, start in enumerate(starts)
        if start < length
    ]
