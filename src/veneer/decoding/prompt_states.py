"""Averages the last hidden states of a prompt's tokens, while an engine reads the prompt.

A request gets `mean.take` as its prompt_states. The engine's thread calls it; another thread reads
`value` once the answer has ended. Shapes: D hidden.
"""

import torch
from torch import Tensor


class PromptMean:
    """Averages over the tokens start to stop - 1 of a prompt. value: (D), empty until the prompt is
    read."""

    def __init__(self, start: int, stop: int) -> None:
        assert start < stop, "a mean needs a token"
        self.value: list[float] = []
        self._next, self._stop, self._count = start, stop, stop - start
        self._sum: Tensor | None = None

    def take(self, first: int, states: Tensor) -> None:
        """Adds the states (rows, D) of the tokens from `first` on. Tokens that come again after a
        failed step or a preemption are skipped."""
        if self._next == self._stop:
            return
        assert first <= self._next, "a token was left out"
        rows = states[self._next - first : max(self._stop - first, 0)]
        if len(rows):
            total = rows.sum(0, dtype=torch.float32)
            self._sum = total if self._sum is None else self._sum + total
            self._next += len(rows)
            if self._next == self._stop:
                self.value = (self._sum / self._count).tolist()
