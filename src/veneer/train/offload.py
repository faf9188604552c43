"""Saved activations in host memory: what backward needs leaves the GPU in forward and comes back when its turn comes.

Exact to the bit: values are copied, in the type and the layout they have. What several operations save (the input of
q, k and v) is copied once. Weights stay where they are, and so does what is too small to be worth a copy.
The copies wait in the order of the GPU's own work, from and to memory that it reads directly (pinned).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.errors import ConfigError

WORTH_BYTES = 2**16
"""Smaller tensors stay: masks, statistics of norms, an adapter's factors."""


@dataclass(eq=False)
class _Away:
    """Values on the host, and the device that they belong on. Whoever saved the same tensor holds the same one."""

    host: Tensor
    device: torch.device

    def back(self) -> Tensor:
        return _copied(self.host, self.device)


@dataclass
class _Known:
    """A storage that was copied: the weak reference keeps its address from being given to another one."""

    storage: StorageWeakRef
    away: "ref[_Away]"


class Offload:
    """Hooks for torch.autograd.graph.saved_tensors_hooks. moves: the device type whose tensors leave."""

    def __init__(self, weights: Iterable[Tensor], *, moves: str = "cuda") -> None:
        self.moves = moves
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._known: dict[tuple[object, ...], _Known] = {}

    def pack(self, tensor: Tensor) -> Tensor | _Away:
        storage = tensor.untyped_storage()
        if (
            tensor.device.type != self.moves
            or tensor.nbytes < WORTH_BYTES
            or tensor.nbytes > storage.nbytes()  # one value repeated (expand): a copy would write it out
            or storage.data_ptr() in self._weights
        ):
            return tensor
        weak = StorageWeakRef(storage)
        layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        key = (weak.cdata, tensor._version, *layout)
        known = self._known.get(key)
        if known is not None and not known.storage.expired() and (away := known.away()) is not None:
            return away
        away = _Away(_copied(tensor.detach(), torch.device("cpu")), tensor.device)
        self._known[key] = _Known(weak, ref(away))
        return away

    def unpack(self, saved: Tensor | _Away) -> Tensor:
        return saved.back() if isinstance(saved, _Away) else saved

    def forget(self) -> None:
        """Between two forwards nothing is known any more."""
        self._known.clear()


def _copied(tensor: Tensor, to: torch.device) -> Tensor:
    """The same values in the same strides: kernels choose by layout, and another choice may round otherwise."""
    pinned = tensor.device.type == "cuda" and to.type == "cpu"
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=to, pin_memory=pinned)
    return there.copy_(tensor, non_blocking=True)


@contextmanager
def offloaded(offload: Offload | None) -> Iterator[None]:
    """Within the block, what is saved for backward leaves the device; None: it stays."""
    if offload is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):
        yield
    offload.forget()


def offload_for(device: torch.device, weights: Iterable[Tensor]) -> Offload:
    """Raises ConfigError where activations lie in host memory anyway."""
    if device.type != "cuda":
        raise ConfigError(
            f"offload moves saved activations to host memory; on {device.type} that is where they are",
            next_step="Leave offload out; --checkpointing saves memory on every device.",
        )
    return Offload(weights)
