"""Counts the pairs of a set that teach nothing, contradict each other, or favour long answers.

A pair of equal answers teaches nothing. Two pairs with the same answers in opposite order cancel
each other. If the longer answer is nearly always preferred, a model learns to write more. The
tally keeps a hash of 16 bytes of each pair.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from veneer.data.examples import Problem, RowRef, grouped

LONGER = 2 / 3
"""From this share on, the check reports that the longer answer is preferred."""
FEWEST = 20
"""With fewer pairs the share is not reported."""


@dataclass
class PairTally:
    """Counts pairs. longer: pairs whose preferred answer has more tokens; shorter: fewer"""

    pairs: int = 0
    longer: int = 0
    shorter: int = 0
    problems: list[Problem] = field(default_factory=list)
    _seen: set[bytes] = field(default_factory=set)

    def add(self, ref: RowRef, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
        """Counts the pairs of the best answer with each of the others. All are token ids."""
        best, *others = answers
        if not others:
            return
        prompt_hash = _hash(prompt)
        best_hash, *other_hashes = map(_hash, answers)
        for other, other_hash in zip(others, other_hashes, strict=True):
            self.pairs += 1
            self.longer += len(best) > len(other)
            self.shorter += len(best) < len(other)
            if best_hash == other_hash:
                self._report("D227", "both answers are the same: nothing to learn", ref)
            elif _digest(prompt_hash + other_hash + best_hash) in self._seen:
                self._report("D228", "an earlier row has these answers the other way round", ref)
            self._seen.add(_digest(prompt_hash + best_hash + other_hash))

    def _report(self, code: str, message: str, ref: RowRef) -> None:
        self.problems.append(Problem(code, ref.file, message, (ref.line,), fatal=False))

    @property
    def counts(self) -> dict[str, int]:
        """Returns the counts by name, empty without pairs."""
        if not self.pairs:
            return {}
        codes = [problem.code for problem in self.problems]
        return {
            "pairs": self.pairs,
            "identical": codes.count("D227"),
            "swapped": codes.count("D228"),
            "longer_preferred": self.longer,
            "shorter_preferred": self.shorter,
        }

    def all_problems(self, file: str) -> list[Problem]:
        """Returns the problems of rows, and of the set as a whole. file: its name"""
        problems = grouped(self.problems)
        share = self.longer / max(self.longer + self.shorter, 1)
        if self.longer + self.shorter >= FEWEST and share >= LONGER:
            message = f"the longer answer is preferred in {share:.0%} of pairs"
            step = "Compare means over tokens: objective: {name: dpo, per_token: true, beta: 2}."
            problems.append(Problem("D229", file, message, next_step=step, fatal=False))
        return problems


def _hash(ids: Sequence[int]) -> bytes:
    return _digest(array("i", ids))


def _digest(content: bytes | array[int]) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
