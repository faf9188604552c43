"""Passes packed weights from files through transformers' loader into a model.

The loader reads each weight on demand, moves it to a device and, for experts that are stored one by
one, stacks and joins them. A packed weight passes through as one value, in its own types.
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

NEXT = "Download the model again; if the error stays, ask its author."


@dataclass(frozen=True)
class StoredPackedWeight:
    """A packed weight in files; `weight[...]` reads it.

    shape: of the dense weight; bytes: in memory, once read; before: the type that it was packed
    from, if the files say; faults: checks the values
    """

    name: str
    format: Quantize
    shape: tuple[int, ...]
    bytes: int
    read: Callable[[], PackedWeight]
    faults: Callable[[Any], list[str]] = lambda weight: []
    before: torch.dtype | None = None

    def __getitem__(self, everything: Any) -> LoaderWeight:
        weight = self.read()
        if faults := self.faults(weight):
            raise CorruptFileError(f"{self.name} cannot be decoded", faults, NEXT)
        return LoaderWeight(weight)

    # transformers calls these on slices of files.
    def get_dtype(self) -> str:
        return "U8"

    def get_shape(self) -> list[int]:
        return list(self.shape)


@dataclass(frozen=True)
class LoaderWeight:
    """A packed weight that moves to devices and keeps its types.

    fault: why it does not fit the model's parameter
    """

    weight: PackedWeight
    fault: str | None = None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LoaderWeight:
        return LoaderWeight(
            self.weight.holding(
                {key: tensor.to(device) for key, tensor in self.weight.tensors.items()}
            )
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Supports torch.stack of (O, I) in front, and torch.cat of such stacks, or of (O, I),
        along O."""
        weights = [item.weight for item in args[0]]
        dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
        kind = type(weights[0])
        axes = len(weights[0].shape)
        if issubclass(kind, FileWeight) and all(type(item) is kind for item in weights):
            try:
                if func is torch.stack and dim == 0 and axes == 2:
                    return LoaderWeight(kind.stacked(weights))
                if func is torch.cat and dim == axes - 2:
                    return LoaderWeight(kind.joined(weights))
            except ValueError as fault:
                return LoaderWeight(weights[0], str(fault))
        return NotImplemented
