"""Saved activations in host memory: what backward needs leaves the GPU in forward and comes back
when its turn comes.

Exact to the bit: values are copied, in the type and the layout they have. What several operations
save (the input of q, k and v) is copied once. Weights stay where they are, and so does what is too
small to be worth a copy.

Copies run beside the GPU's own work, on a stream for each way, from and to memory that it reads
directly (pinned). What leaves is held until its copy is over, UNDER_WAY_BYTES at most, and what is
still held when backward asks comes from there. While a layer is computed backward, what those
before it saved is on its way.
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

WORTH_BYTES = 2**16
"""Smaller tensors stay: masks, statistics of norms, an adapter's factors."""
UNDER_WAY_BYTES = 2**29
"""Of the device's memory, held for copies that may not be over: 20 ms of a bus of 25 GB/s."""


class CopyStreams(Protocol):
    """Where copies run. An event is what `wait` is given; None: the copy is over already."""

    def out(self, host: Tensor, of: Tensor) -> Any:
        """Begin to copy, after what the device was given to do so far."""

    def back(self, there: Tensor, host: Tensor, after: Any) -> Any:
        """The same the other way, and after the copy that `after` is of."""

    def wait(self, event: Any) -> None:
        """What the device is given to do from now on begins when that copy is over; the host goes
        on."""


class InOrderCopies:
    """Copies in the order of everything else."""

    def out(self, host: Tensor, of: Tensor) -> None:
        host.copy_(of, non_blocking=True)

    def back(self, there: Tensor, host: Tensor, after: None) -> None:
        there.copy_(host, non_blocking=True)

    def wait(self, event: None) -> None:
        pass


class CudaCopyStreams:
    """A stream for each way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def out(self, host: Tensor, of: Tensor) -> torch.cuda.Event:
        return self._copied(self._out, host, of)

    def back(self, there: Tensor, host: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self._back.wait_event(after)
        return self._copied(self._back, there, host)

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def _copied(self, lane: torch.cuda.Stream, to: Tensor, of: Tensor) -> torch.cuda.Event:
        # also for the memory of `to`: what had it before may not be through with it
        lane.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(lane):
            to.copy_(of, non_blocking=True)
        return lane.record_event()


@dataclass(eq=False)
class _HostCopy:
    """Values on the host, and the device that they belong on. Whoever saved the same tensor holds
    the same one.

    over: of the copy out. held: the values themselves, as long as they may be copied. number: how
    many left before.
    """

    host: Tensor
    device: torch.device
    number: int
    over: Any = None
    held: Tensor | None = None


@dataclass
class _CopiedStorage:
    """A storage that was copied: the weak reference keeps its address from being given to another
    one."""

    storage: StorageWeakRef
    away: "ref[_HostCopy]"


class Offload:
    """Hooks for torch.autograd.graph.saved_tensors_hooks. moves: the device type whose tensors
    leave."""

    def __init__(
        self,
        weights: Iterable[Tensor],
        *,
        moves: str = "cuda",
        lanes: CopyStreams | None = None,
        under_way_bytes: int = UNDER_WAY_BYTES,
    ) -> None:
        self.moves, self._lanes, self._most = (
            moves,
            InOrderCopies() if lanes is None else lanes,
            under_way_bytes,
        )
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self._known: dict[tuple[object, ...], _CopiedStorage] = {}
        self._order: list[ref[_HostCopy]] = []
        self._leaving: deque[_HostCopy] = deque()
        self._coming: dict[int, tuple[Tensor, Any]] = {}
        self._next = 0
        """What left from here on has come back, or is coming."""

    @property
    def under_way_bytes(self) -> int:
        """Held on the device."""
        leaving = sum(away.held.nbytes for away in self._leaving if away.held is not None)
        return leaving + sum(tensor.nbytes for tensor, _ in self._coming.values())

    def pack(self, tensor: Tensor) -> Tensor | _HostCopy:
        storage = tensor.untyped_storage()
        if (
            tensor.device.type != self.moves
            or tensor.nbytes < WORTH_BYTES
            or tensor.nbytes
            > storage.nbytes()  # one value repeated (expand): a copy would write it out
            or storage.data_ptr() in self._weights
        ):
            return tensor
        weak = StorageWeakRef(storage)
        layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        key = (weak.cdata, tensor._version, *layout)
        known = self._known.get(key)
        if known is not None and not known.storage.expired() and (away := known.away()) is not None:
            return away
        away = self._sent(tensor.detach())
        self._known[key] = _CopiedStorage(weak, ref(away))
        return away

    def _sent(self, tensor: Tensor) -> _HostCopy:
        away = _HostCopy(_empty_like(tensor, torch.device("cpu")), tensor.device, len(self._order))
        self._order.append(ref(away))
        away.over = self._lanes.out(away.host, tensor)
        if away.over is not None:
            away.held = tensor
            self._leaving.append(away)
            self._settle(self._most)
        return away

    def unpack(self, saved: Tensor | _HostCopy) -> Tensor:
        if not isinstance(saved, _HostCopy):
            return saved
        if saved.held is not None:
            return saved.held
        self._settle(0)
        there, event = (
            self._coming.pop(saved.number) if saved.number in self._coming else self._begun(saved)
        )
        if event is not None:
            self._lanes.wait(event)
            self._fetch_before(saved.number)
        return there

    def _fetch_before(self, number: int) -> None:
        """What left before it is asked for next, the last first."""
        self._next = min(self._next, number)
        while self._next > 0:
            away = self._order[self._next - 1]()
            if away is not None:
                if self.under_way_bytes + away.host.nbytes > self._most:
                    return
                self._coming[away.number] = self._begun(away)
            self._next -= 1

    def _begun(self, away: _HostCopy) -> tuple[Tensor, Any]:
        there = _empty_like(away.host, away.device)
        return there, self._lanes.back(there, away.host, away.over)

    def _settle(self, most: int) -> None:
        """No more than so many bytes are held for what leaves."""
        while self._leaving and (most == 0 or self.under_way_bytes > most):
            away = self._leaving.popleft()
            self._lanes.wait(away.over)
            away.held = None

    def begin(self) -> None:
        """A forward pass: what the one before left behind is let go when its copies are over."""
        self._settle(0)
        for _, event in self._coming.values():
            self._lanes.wait(event)
        self._coming.clear()
        self._order.clear()

    def forget(self) -> None:
        """Between two forwards nothing is known any more."""
        self._known.clear()
        self._next = len(self._order)


def _empty_like(tensor: Tensor, there: torch.device) -> Tensor:
    """Room for the same values in the same strides: kernels choose by layout, and another may round
    otherwise."""
    pinned = tensor.device.type == "cuda" and there.type == "cpu"
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=there, pin_memory=pinned
    )


@contextmanager
def offloaded(offload: Offload | None) -> Iterator[None]:
    """Within the block, what is saved for backward leaves the device; None: it stays."""
    if offload is None:
        yield
        return
    offload.begin()
    with torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack):
        yield
    offload.forget()


def offload_for(device: torch.device, weights: Iterable[Tensor]) -> Offload:
    """Raises ConfigError where activations lie in host memory anyway."""
    if device.type != "cuda":
        raise ConfigError(
            f"offload moves saved activations to host memory; on {device.type} that is where"
            " they are",
            next_step="Leave offload out; --checkpointing saves memory on every device.",
        )
    return Offload(weights, lanes=CudaCopyStreams(device))
