"""Computes the reference of a trainer: log p of answers by what training started from.

The reference is the adapter with its first values if training goes on with an adapter or adds new
tokens, else the base alone. Each answer is computed once, without dropout.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from veneer.adapters.placement.acting import Acting
from veneer.data.batching import by_length
from veneer.data.examples import Example
from veneer.errors import fits_memory
from veneer.models.step import part_nats, parts_of
from veneer.objectives.objective import Values
from veneer.training.inputs import ForwardInputs
from veneer.training.optimizer.buffer import FlatParameters

ROWS_AT_ONCE = 8
"""Rows of a forward, as in a run of the default batch."""


class StartReference:
    """Computes and keeps log p of each answer, summed over its trained tokens.

    start  the adapter's first values; None if the reference is the base alone
    known  values by the answer's hash
    """

    def __init__(
        self,
        forward: ForwardInputs,
        flat: FlatParameters,
        *,
        start: Tensor | None,
        known: Mapping[str, float],
    ) -> None:
        self._forward, self._flat = forward, flat
        self.start, self.known = start, dict(known)

    def of(self, examples: Sequence[Example]) -> Values:
        """Returns log p of each example, (E)."""
        keys = [_hash(example) for example in examples]
        missing = {
            key: example
            for key, example in zip(keys, examples, strict=True)
            if key not in self.known
        }
        if missing:
            with fits_memory("on the reference of these rows", next_step="Give fewer rows."):
                values = self._compute(list(missing.values()))
            self.known |= dict(zip(missing, values, strict=True))
        return np.array([self.known[key] for key in keys])

    def _compute(self, examples: Sequence[Example]) -> list[float]:
        forward = self._forward
        adapters = () if self.start is None else forward.adapters
        with forward.routing.held(Acting.everywhere(adapters)), self._first_values():
            groups = by_length(examples, ROWS_AT_ONCE)
            parts = list(parts_of(forward, examples, groups))
            nats = part_nats(forward, examples, parts)
        values = [0.0] * len(examples)
        for part, part_values in zip(parts, nats, strict=True):
            for number, value in zip(part, part_values, strict=True):
                values[number] = -value
        return values

    @contextmanager
    def _first_values(self) -> Iterator[None]:
        """Within the block the adapter has the values that training started from."""
        if self.start is None:
            yield
            return
        current = self._flat.values.data.clone()
        try:
            self._replace(self.start)
            yield
        finally:
            self._replace(current)

    def _replace(self, values: Tensor) -> None:
        with torch.no_grad():
            self._flat.values.data.copy_(values)
        self._flat.publish()


def _hash(example: Example) -> str:
    content = example.ids.tobytes() + example.trained.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
