"""Packed weights on their way from files into a model, in the hands of transformers' loader.

It reads each where it is needed, brings it to a device and, for experts that the files hold apart,
stacks and joins them: a packed weight goes through all of it as one value, in its own types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from veneer.errors import CorruptFileError
from veneer.quant.config import Quantize
from veneer.quant.in_files import FileWeight
from veneer.quant.weight import PackedWeight

NEXT = "Download the model again; if it stays, ask its author."


@dataclass(frozen=True)
class Waiting:
    """A weight that lies packed in its files; `[...]` reads it.

    shape: of the dense weight; bytes: in memory, once read; before: the type that it was packed
    from, where the files say. faults: what its values have against it.
    """

    name: str
    format: Quantize
    shape: tuple[int, ...]
    bytes: int
    read: Callable[[], PackedWeight]
    faults: Callable[[Any], list[str]] = lambda weight: []
    before: torch.dtype | None = None

    def __getitem__(self, everything: Any) -> Moving:
        weight = self.read()
        if wrong := self.faults(weight):
            raise CorruptFileError(f"{self.name} cannot be decoded", wrong, NEXT)
        return Moving(weight)

    # What transformers asks of a slice of a file.
    def get_dtype(self) -> str:
        return "U8"

    def get_shape(self) -> list[int]:
        return list(self.shape)


@dataclass(frozen=True)
class Moving:
    """It follows to a device and keeps its types. fault: why the model's weight cannot be made of
    it."""

    weight: PackedWeight
    fault: str | None = None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Moving:
        return Moving(
            self.weight.holding({key: each.to(device) for key, each in self.weight.tensors.items()})
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch.stack of (O, I) in front, and torch.cat of such stacks, or of (O, I), along O."""
        weights = [each.weight for each in args[0]]
        dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
        kind: Any = type(weights[0])
        axes = len(weights[0].shape)
        if issubclass(kind, FileWeight) and all(type(each) is kind for each in weights):
            try:
                if func is torch.stack and dim == 0 and axes == 2:
                    return Moving(kind.stacked(weights))
                if func is torch.cat and dim == axes - 2:
                    return Moving(kind.joined(weights))
            except ValueError as fault:
                return Moving(weights[0], str(fault))
        return NotImplemented
