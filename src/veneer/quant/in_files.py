"""What weights have in common that other programs packed: their tensors follow the dense weight's
axes, so that such weights can be stacked (experts that lie apart in the files) and joined (gate and
up) without being decoded.

Shapes: E experts, I in_features, O out_features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from veneer.quant.config import Quantize
from veneer.quant.decoded import DecodedMatrix


@dataclass(frozen=True, eq=False, kw_only=True)
class FileWeight:
    """A PackedWeight whose tensors all have the stack's E first, if it is one.

    by_rows: of which tensors the last axis but one goes with O; the others hold for all rows alike.
    """

    by_rows: ClassVar[tuple[str, ...]]
    format: Quantize
    tensors: Mapping[str, Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def numbers(self) -> dict[str, float]:
        return {}

    def decode(self, tensors: Mapping[str, Tensor], out: Tensor) -> None:
        """tensors: of one matrix; out (O, I)."""
        raise NotImplementedError

    def holding(self, tensors: Mapping[str, Tensor]) -> Self:
        return replace(self, tensors=dict(tensors))

    def matrix(
        self, dtype: torch.dtype, *, number: int | None = None, transposed: bool = False
    ) -> DecodedMatrix:
        assert not transposed
        own = (
            self.tensors
            if number is None
            else {key: each[number] for key, each in self.tensors.items()}
        )
        O, I = self.shape[-2:]
        return DecodedMatrix(
            lambda out: self.decode(own, out), I, O, self.tensors[""].device, dtype
        )

    @classmethod
    def stacked(cls, weights: Sequence[Self]) -> Self:
        """(O, I) each -> (E, O, I). ValueError: they are not of one kind."""
        first = weights[0]
        _check_alike(weights)
        return first.holding(
            {key: torch.stack([w.tensors[key] for w in weights]) for key in first.tensors}
        )

    @classmethod
    def joined(cls, weights: Sequence[Self]) -> Self:
        """(..., O, I) each -> (..., sum of O, I). ValueError: what holds for all rows of one does
        not of another's."""
        first = weights[0]
        _check_alike(weights)
        found = {}
        for key, own in first.tensors.items():
            parts = [w.tensors[key] for w in weights]
            if key in cls.by_rows:
                found[key] = torch.cat(parts, dim=-2)
            elif all(torch.equal(own, other) for other in parts):
                found[key] = own
            else:
                raise ValueError(f"{key} of weights that the model holds as one are not the same")
        return first.holding(found)


def _check_alike(weights: Sequence[FileWeight]) -> None:
    """Raises ValueError if some of these weights have tensors or numbers that others do not
    have."""
    if len({frozenset(each.tensors) for each in weights}) > 1:
        raise ValueError(
            "of weights that the model holds as one, some have an order of columns and some have"
            " none"
        )
    for own in fields(weights[0]):
        values = [getattr(each, own.name) for each in weights]
        if own.name != "tensors" and any(value != values[0] for value in values):
            raise ValueError(f"{own.name} of weights that the model holds as one are not the same")


def scaled(out: Tensor, scales: Tensor, width: int) -> None:
    """out (O, I) times scales (O, ceil(I / width)), each for `width` columns. One rounding, to
    out's type."""
    _by_blocks(out, scales, width, "mul_")


def shifted(out: Tensor, zeros: Tensor, width: int) -> None:
    """The same, taken away."""
    _by_blocks(out, zeros, width, "sub_")


def _by_blocks(out: Tensor, values: Tensor, width: int, what: str) -> None:
    whole = out.shape[1] // width
    if whole:
        blocks = out[:, : whole * width].unflatten(1, (whole, width))
        getattr(blocks, what)(values[:, :whole, None])
    if whole < values.shape[1]:
        getattr(out[:, whole * width :], what)(values[:, whole:])
