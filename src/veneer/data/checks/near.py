"""Texts that are nearly the same: MinHash over shingles of words, and the likeness of those that it
finds, counted.

Broder 1997. Signatures of PLACES minima, in BANDS bands: two texts that share a band are compared.
Of texts that share 0.8 of their shingles 0.998 share a band, of those that share 0.4 a quarter do.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WORDS = 3
"""Of a shingle. A text of fewer than LEAST words has too few to say anything."""
LEAST = 8
PLACES, BANDS = 48, 16
_PRIME = (1 << 31) - 1
_WORD = re.compile(r"\w+")


def shingles(text: str) -> NDArray[np.int64]:
    """Sorted numbers of all runs of words, whatever their case and what stands between them; none
    of a short text."""
    words = np.array(
        [zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())], dtype=np.int64
    )
    if len(words) < LEAST:
        return np.zeros(0, dtype=np.int64)
    mixed = words % _PRIME
    rows = [
        mixed[n : len(mixed) - WORDS + 1 + n] * (1_000_003**n % _PRIME) % _PRIME
        for n in range(WORDS)
    ]
    return np.unique(sum(rows[1:], rows[0]) % _PRIME)


def likeness(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Share of all shingles of two texts that both have."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both) if len(a) + len(b) else 0.0


def nearest(
    texts: Sequence[str], among: Sequence[str], *, least: float
) -> list[tuple[int, float] | None]:
    """For each text the number of the likest one among others, and how like it is; None: none is so
    like."""
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    factors = generator.integers(1, _PRIME, (2, PLACES), dtype=np.int64)

    def bands(found: NDArray[np.int64]) -> list[bytes]:
        hashed = (found[:, None] * factors[0] % _PRIME + factors[1]) % _PRIME
        lowest = hashed.min(axis=0).reshape(BANDS, -1)
        return [number.to_bytes(1, "big") + band.tobytes() for number, band in enumerate(lowest)]

    places: dict[bytes, list[int]] = {}
    known = [shingles(text) for text in among]
    for number, found in enumerate(known):
        for band in bands(found) if len(found) else ():
            places.setdefault(band, []).append(number)
    results: list[tuple[int, float] | None] = []
    for text in texts:
        own = shingles(text)
        candidates = {n for band in (bands(own) if len(own) else ()) for n in places.get(band, ())}
        best = max(((likeness(own, known[n]), -n) for n in candidates), default=(0.0, 0))
        results.append((-best[1], best[0]) if best[0] >= least else None)
    return results
