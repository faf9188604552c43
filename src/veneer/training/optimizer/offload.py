"""Moves saved activations to host memory in forward, and back to the GPU when backward needs them.

Exact to the bit: values are copied in their type and layout. A tensor that several operations save
(the input of q, k and v) is copied once. Weights stay, and so do tensors too small to be worth a
copy.

Copies run beside the GPU's computation, on one stream per direction, from and to pinned memory. A
tensor that leaves is kept until its copy is over, PENDING_BYTES at most; if backward asks before
that, the kept tensor is used. While a layer is computed backward, tensors of the layers before it
are on their way back.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from veneer.errors import ConfigError
from veneer.private.torch import version_of

WORTH_BYTES = 2**16
"""Tensors below this size stay: masks, statistics of norms, an adapter's factors."""
PENDING_BYTES = 2**29
"""Device memory kept for copies in progress: 20 ms of a bus of 25 GB/s."""


class CopyStreams(Protocol):
    """Runs copies between host and device. `wait` takes an event; None: the copy is over
    already.
    """

    def out(self, host: Tensor, of: Tensor) -> Any:
        """Starts a copy to the host, after the device's work so far."""

    def back(self, there: Tensor, host: Tensor, after: Any) -> Any:
        """Starts a copy to the device, after the copy that the event `after` belongs to."""

    def wait(self, event: Any) -> None:
        """Makes the device's next work wait for a copy; the host does not wait."""


class InOrderCopies:
    """Copies in the order of all other work."""

    def out(self, host: Tensor, of: Tensor) -> None:
        host.copy_(of, non_blocking=True)

    def back(self, there: Tensor, host: Tensor, after: None) -> None:
        there.copy_(host, non_blocking=True)

    def wait(self, event: None) -> None:
        pass


class CudaCopyStreams:
    """Copies on one CUDA stream per direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def out(self, host: Tensor, of: Tensor) -> torch.cuda.Event:
        return self._copy_on(self._out, host, of)

    def back(self, there: Tensor, host: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self._back.wait_event(after)
        return self._copy_on(self._back, there, host)

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def _copy_on(self, lane: torch.cuda.Stream, to: Tensor, of: Tensor) -> torch.cuda.Event:
        # Waits for earlier users of the memory of `to`, too.
        lane.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(lane):
            to.copy_(of, non_blocking=True)
        return lane.record_event()


@dataclass(eq=False)
class _HostCopy:
    """Holds a tensor's values on the host; shared by all operations that saved the same tensor.

    device: where they belong. number: copies before it. over: event of the copy to the host. kept:
    the tensor on the device, while it may be copied.
    """

    host: Tensor
    device: torch.device
    number: int
    over: Any = None
    kept: Tensor | None = None


@dataclass
class _CopiedStorage:
    """Remembers a copied storage; the weak reference keeps its address from being reused."""

    storage: StorageWeakRef
    host_copy: "ref[_HostCopy]"


class Offload:
    """Provides hooks for torch.autograd.graph.saved_tensors_hooks. moves: the device type whose
    tensors leave.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        *,
        moves: str = "cuda",
        lanes: CopyStreams | None = None,
        pending_bytes: int = PENDING_BYTES,
    ) -> None:
        self.moves, self._lanes, self._most = (
            moves,
            InOrderCopies() if lanes is None else lanes,
            pending_bytes,
        )
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._known: dict[tuple[object, ...], _CopiedStorage] = {}
        self._order: list[ref[_HostCopy]] = []
        self._leaving: deque[_HostCopy] = deque()
        self._coming: dict[int, tuple[Tensor, Any]] = {}
        self._next = 0
        """Copies from this number on are back, or on their way."""

    @property
    def pending_bytes(self) -> int:
        """Bytes kept on the device for copies."""
        leaving = sum(
            host_copy.kept.nbytes for host_copy in self._leaving if host_copy.kept is not None
        )
        return leaving + sum(tensor.nbytes for tensor, _ in self._coming.values())

    def pack(self, tensor: Tensor) -> Tensor | _HostCopy:
        storage = tensor.untyped_storage()
        if (
            tensor.device.type != self.moves
            or tensor.nbytes < WORTH_BYTES
            or tensor.nbytes > storage.nbytes()  # expanded: a copy would be larger
            or storage.data_ptr() in self._weights
        ):
            return tensor
        weak = StorageWeakRef(storage)
        layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        key = (weak.cdata, version_of(tensor), *layout)
        copied = self._known.get(key)
        if (
            copied is not None
            and not copied.storage.expired()
            and (host_copy := copied.host_copy()) is not None
        ):
            return host_copy
        host_copy = self._copy_out(tensor.detach())
        self._known[key] = _CopiedStorage(weak, ref(host_copy))
        return host_copy

    def _copy_out(self, tensor: Tensor) -> _HostCopy:
        host_copy = _HostCopy(
            _empty_like(tensor, torch.device("cpu")), tensor.device, len(self._order)
        )
        self._order.append(ref(host_copy))
        host_copy.over = self._lanes.out(host_copy.host, tensor)
        if host_copy.over is not None:
            host_copy.kept = tensor
            self._leaving.append(host_copy)
            self._finish_copies(self._most)
        return host_copy

    def unpack(self, saved: Tensor | _HostCopy) -> Tensor:
        if not isinstance(saved, _HostCopy):
            return saved
        if saved.kept is not None:
            return saved.kept
        self._finish_copies(0)
        on_device, event = (
            self._coming.pop(saved.number)
            if saved.number in self._coming
            else self._start_back(saved)
        )
        if event is not None:
            self._lanes.wait(event)
            self._fetch_before(saved.number)
        return on_device

    def _fetch_before(self, number: int) -> None:
        """Starts copies back of what was saved before this number, the last first."""
        self._next = min(self._next, number)
        while self._next > 0:
            host_copy = self._order[self._next - 1]()
            if host_copy is not None:
                if self.pending_bytes + host_copy.host.nbytes > self._most:
                    return
                self._coming[host_copy.number] = self._start_back(host_copy)
            self._next -= 1

    def _start_back(self, host_copy: _HostCopy) -> tuple[Tensor, Any]:
        on_device = _empty_like(host_copy.host, host_copy.device)
        return on_device, self._lanes.back(on_device, host_copy.host, host_copy.over)

    def _finish_copies(self, most: int) -> None:
        """Waits until at most so many bytes are kept for copies to the host."""
        while self._leaving and (most == 0 or self.pending_bytes > most):
            host_copy = self._leaving.popleft()
            self._lanes.wait(host_copy.over)
            host_copy.kept = None

    def begin(self) -> None:
        """Starts a forward pass: frees what the previous one left behind, once its copies are
        over.
        """
        self._finish_copies(0)
        for _, event in self._coming.values():
            self._lanes.wait(event)
        self._coming.clear()
        self._order.clear()

    def forget(self) -> None:
        """Forgets copied storages between two forward passes."""
        self._known.clear()
        self._next = len(self._order)


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    """Allocates the same shape and strides: kernels choose by layout, and another may round
    differently.
    """
    pinned = tensor.device.type == "cuda" and device.type == "cpu"
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device, pin_memory=pinned
    )


@contextmanager
def offloaded(offload: Offload | None) -> Iterator[None]:
    """Moves what is saved for backward off the device within the block, unless offload is None."""
    if offload is None:
        yield
        return
    offload.begin()
    with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):
        yield
    offload.forget()


def offload_for(device: torch.device, weights: Iterable[Tensor]) -> Offload:
    """Returns an Offload for a CUDA device; ConfigError on others, whose activations are on the
    host.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"offload moves saved activations to host memory; on {device.type} that is where"
            " they are",
            next_step="Leave offload out; --checkpointing saves memory on every device.",
        )
    return Offload(weights, lanes=CudaCopyStreams(device))
