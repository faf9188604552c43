"""Weights that other programs packed. Their tensors follow the axes of the dense weight, so weights
can be stacked (separate experts) and joined (gate and up) without decoding.

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
    """A PackedWeight from files. All tensors of a stack have E as their first axis.

    by_rows: names of tensors whose last axis but one is O; other tensors hold for all rows
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
        """Decodes the tensors of one matrix into out (O, I)."""
        raise NotImplementedError

    def holding(self, tensors: Mapping[str, Tensor]) -> Self:
        return replace(self, tensors=dict(tensors))

    def matrix(
        self, dtype: torch.dtype, *, number: int | None = None, transposed: bool = False
    ) -> DecodedMatrix:
        assert not transposed
        tensors = (
            self.tensors
            if number is None
            else {key: tensor[number] for key, tensor in self.tensors.items()}
        )
        O, I = self.shape[-2:]
        return DecodedMatrix(
            lambda out: self.decode(tensors, out), I, O, self.tensors[""].device, dtype
        )

    @classmethod
    def stacked(cls, weights: Sequence[Self]) -> Self:
        """Stacks (O, I) weights to (E, O, I). Raises ValueError if they differ in kind."""
        first = weights[0]
        _check_alike(weights)
        return first.holding(
            {key: torch.stack([w.tensors[key] for w in weights]) for key in first.tensors}
        )

    @classmethod
    def joined(cls, weights: Sequence[Self]) -> Self:
        """Joins (..., O, I) weights to (..., sum of O, I). Raises ValueError if tensors that hold
        for all rows differ."""
        first = weights[0]
        _check_alike(weights)
        joined_tensors = {}
        for key, tensor in first.tensors.items():
            parts = [w.tensors[key] for w in weights]
            if key in cls.by_rows:
                joined_tensors[key] = torch.cat(parts, dim=-2)
            elif all(torch.equal(tensor, part) for part in parts):
                joined_tensors[key] = tensor
            else:
                raise ValueError(f"{key} of weights that the model holds as one are not the same")
        return first.holding(joined_tensors)


def _check_alike(weights: Sequence[FileWeight]) -> None:
    """Raises ValueError if the weights differ in their tensor names or numbers."""
    if len({frozenset(weight.tensors) for weight in weights}) > 1:
        raise ValueError(
            "of weights that the model holds as one, some have an order of columns and some have"
            " none"
        )
    for field in fields(weights[0]):
        values = [getattr(weight, field.name) for weight in weights]
        if field.name != "tensors" and any(value != values[0] for value in values):
            raise ValueError(
                f"{field.name} of weights that the model holds as one are not the same"
            )


def scaled(out: Tensor, scales: Tensor, width: int) -> None:
    """Multiplies out (O, I) by scales (O, ceil(I / width)), one per `width` columns. Rounds
    once."""
    _by_blocks(out, scales, width, "mul_")


def shifted(out: Tensor, zeros: Tensor, width: int) -> None:
    """Subtracts zeros (O, ceil(I / width)) from out likewise."""
    _by_blocks(out, zeros, width, "sub_")


def _by_blocks(out: Tensor, values: Tensor, width: int, operation: str) -> None:
    whole = out.shape[1] // width
    if whole:
        blocks = out[:, : whole * width].unflatten(1, (whole, width))
        getattr(blocks, operation)(values[:, :whole, None])
    if whole < values.shape[1]:
        getattr(out[:, whole * width :], operation)(values[:, whole:])
