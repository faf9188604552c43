"""Finds texts that are nearly the same: MinHash over word shingles, then counted similarity.

Broder 1997. Signatures of PLACES minima, in BANDS bands: two texts that share a band are compared.
Of texts that share 0.8 of their shingles 0.998 share a band; of those that share 0.4, a quarter.
"""

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WORDS = 3
"""Words of a shingle. A text of fewer than LEAST words is too short to compare."""
LEAST = 8
COMMON = 0.1
"""Share of texts from which on a shingle is common to them."""
MANY = 20.0
"""Texts that may share a shingle before it is common, however few texts there are."""
PLACES, BANDS = 48, 16
_PRIME = (1 << 31) - 1
_NONE = np.zeros(0, dtype=np.int64)
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Returns the words of a text, without case and punctuation."""
    return _WORD.findall(text.lower())


def shingles(text: str) -> NDArray[np.int64]:
    """Returns the sorted hashes of all runs of words, without case and punctuation; none for a
    short text."""
    words = np.array([zlib.crc32(word.encode()) for word in words_of(text)], dtype=np.int64)
    if len(words) < LEAST:
        return _NONE
    hashes = words % _PRIME
    rows = [
        hashes[offset : len(hashes) - WORDS + 1 + offset] * (1_000_003**offset % _PRIME) % _PRIME
        for offset in range(WORDS)
    ]
    return np.unique(sum(rows[1:], rows[0]) % _PRIME)


def similarity(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Returns the share of all shingles of two texts that both have."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both) if len(a) + len(b) else 0.0


def _bands(values: NDArray[np.int64]) -> list[bytes]:
    """Returns the bands of a text's signature. values: its shingles, at least one"""
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    factors = generator.integers(1, _PRIME, (2, PLACES), dtype=np.int64)
    hashed = (values[:, None] * factors[0] % _PRIME + factors[1]) % _PRIME
    lowest = hashed.min(axis=0).reshape(BANDS, -1)
    return [number.to_bytes(1, "big") + band.tobytes() for number, band in enumerate(lowest)]


class DisjointSets:
    """Disjoint sets of numbers. The smallest number of a set names it."""

    def __init__(self, parents: Sequence[int]) -> None:
        self._parents = list(parents)

    def first(self, number: int) -> int:
        """Returns the smallest number in the set of this number."""
        parents = self._parents
        while parents[number] != number:
            parents[number] = number = parents[parents[number]]
        return number

    def join(self, numbers: Sequence[int]) -> None:
        """Joins the sets of these numbers."""
        firsts = [self.first(number) for number in numbers]
        for first in firsts:
            self._parents[first] = min(firsts)

    def names(self) -> list[int]:
        """Returns the name of each number's set."""
        return [self.first(number) for number in range(len(self._parents))]


def similar_groups(texts: Sequence[str], *, least: float) -> list[int]:
    """Groups texts: two of them share a group if they, or others between them, are similar.

    Shingles of more than COMMON of all texts, such as those of a shared instruction, do not count.
    Returns the number of each text's group: that of its first text.
    """
    of_texts = _without_common([shingles(text) for text in texts], 2.0)
    groups = DisjointSets(range(len(texts)))
    texts_by_band: dict[bytes, list[int]] = {}
    for number, values in enumerate(of_texts):
        if not len(values):
            continue
        for band in _bands(values):
            for other in texts_by_band.setdefault(band, []):
                is_joined = groups.first(number) == groups.first(other)
                if not is_joined and similarity(values, of_texts[other]) >= least:
                    groups.join([number, other])
            texts_by_band[band].append(number)
    return groups.names()


def _without_common(of_texts: Sequence[NDArray[np.int64]], most: float) -> list[NDArray[np.int64]]:
    """Removes the shingles of more than COMMON of the texts, and of more than `most` of them."""
    all_shingles, counts = np.unique(np.concatenate([*of_texts, _NONE]), return_counts=True)
    common = all_shingles[counts > max(most, COMMON * len(of_texts))]
    return [np.setdiff1d(values, common, assume_unique=True) for values in of_texts]


def nearest(
    texts: Sequence[str], among: Sequence[str], *, least: float
) -> list[tuple[int, float] | None]:
    """Finds for each text the most similar text among `among`.

    Shingles of many texts do not count, as in similar_groups. Returns the number and similarity of
    each, or None if none reaches `least`.
    """
    texts_by_band: dict[bytes, list[int]] = {}
    of_texts = _without_common([shingles(text) for text in (*texts, *among)], MANY)
    known_shingles = of_texts[len(texts) :]
    for number, values in enumerate(known_shingles):
        for band in _bands(values) if len(values) else ():
            texts_by_band.setdefault(band, []).append(number)
    results: list[tuple[int, float] | None] = []
    for text_shingles in of_texts[: len(texts)]:
        candidates = {
            n
            for band in (_bands(text_shingles) if len(text_shingles) else ())
            for n in texts_by_band.get(band, ())
        }
        best = max(
            ((similarity(text_shingles, known_shingles[n]), -n) for n in candidates),
            default=(0.0, 0),
        )
        results.append((-best[1], best[0]) if best[0] >= least else None)
    return results
