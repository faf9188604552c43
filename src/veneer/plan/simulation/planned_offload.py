"""Simulates offload (training/optimizer/offload.py) on tensors without storage: which bytes would
leave the device, and which would come back."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.private.torch import storage_key, version_of
from veneer.training.optimizer.offload import WORTH_BYTES


@dataclass(eq=False)
class _DroppedTensor:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class PlannedOffload:
    """Drops what Offload would copy to the host, and allocates it again for backward. moved_bytes:
    both ways.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.moved_bytes = 0
        self._weights = {storage_key(tensor) for tensor in weights}
        self._known: dict[tuple[Any, ...], StorageWeakRef] = {}

    def pack(self, tensor: Tensor) -> Tensor | _DroppedTensor:
        storage = tensor.untyped_storage()
        if (
            not tensor.is_meta
            or tensor.nbytes < WORTH_BYTES
            or tensor.nbytes > storage.nbytes()
            or storage_key(tensor) in self._weights
        ):
            return tensor
        weak = StorageWeakRef(storage)
        key = (
            weak.cdata,
            version_of(tensor),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
        )
        if key not in self._known or self._known[key].expired():
            self._known[key] = weak
            self.moved_bytes += tensor.nbytes
        return _DroppedTensor(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def unpack(self, saved: Tensor | _DroppedTensor) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        restored = torch.empty_strided(saved.shape, saved.stride, dtype=saved.dtype, device="meta")
        self.moved_bytes += restored.nbytes
        return restored
