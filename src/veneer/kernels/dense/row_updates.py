"""A low-rank update of some rows of a linear layer's output."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from veneer.kernels.dense.dropout import Dropout
from veneer.kernels.dense.lora import add_update


class FactorSource(Protocol):
    """A layer with the two factors of an update: A (R, I), B (O, R)."""

    def factors(self) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class RowUpdate:
    """y[rows] += scaling * (drop(x[rows]) A^T) B^T, for 0 <= start < stop <= M.

    dropout has one key for each of the m rows.
    """

    rows: slice
    layer: FactorSource
    scaling: float
    dropout: Dropout | None = None

    @property
    def count(self) -> int:
        return int(self.rows.stop - self.rows.start)

    def dropped(self, x_MI: Tensor) -> Tensor:
        """Returns the rows of x after dropout."""
        x = x_MI[self.rows]
        return x if self.dropout is None else self.dropout.apply(x)

    def add_to(self, y_MO: Tensor, x_MI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
        """Adds the update to y, with factors in x's type. Returns drop(x[rows]) A^T."""
        return add_update(y_MO[self.rows], x_MI[self.rows], A_RI, B_OR, self.scaling, self.dropout)
