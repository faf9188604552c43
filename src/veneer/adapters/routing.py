"""Which adapters act on the next forward, as one object that every wrapper of a base holds.

Switching is a change of one attribute, however deep the model and however many adapters it carries.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Routing:
    """active: (name, weight) of every adapter that acts; empty: the base alone, bit for bit.

    rows: (M) dropout keys of the rows of the forward in progress; None while not training: no dropout.
    step: counts optimizer steps and micro-batches, so that every one draws another mask.
    """

    active: tuple[tuple[str, float], ...] = ()
    rows: Tensor | None = field(default=None, repr=False)
    step: int = 0

    @contextmanager
    def none(self) -> Iterator[None]:
        """Within the block the base acts alone."""
        before, self.active = self.active, ()
        try:
            yield
        finally:
            self.active = before
