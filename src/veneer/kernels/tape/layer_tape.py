"""The tape of a decoder layer that trains: its calls, replayed for the layers like it.

    groups, tape = record_layer(inputs, compute)    runs compute() and records its calls
    buffers = tape.replay(addresses(others))        makes the same calls for other inputs

inputs: all that the calls read and did not create themselves. Inputs of another layer come in the
same order, with the same shapes and types, and without gaps; the caller makes sure of that. An int
among the inputs is the key of a dropout mask; in every layer the same ones are equal. compute
returns groups of tensors, which every layer gets anew. All else that it creates is scratch: pieces
that are not needed at the same time share memory.

Between two products Python took four times as long as C's part of a layer: all that it reads has
left the caches.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.rank_calls import DropoutMask
from veneer.kernels.tape.tape import (
    LAYER_FUNCTIONS,
    Recorder,
    Tape,
    TapeAddress,
    TapeCall,
    record,
    tape_call,
)
from veneer.private.interpreter import referent_of

LINE, WORD = 64, 2**64 - 1
MOST_SHARED = 2**20
"""Bytes up to which tensors of a group share a buffer: large ones leave holes that tensors of a
batch with more rows do not fit into."""

Groups = Sequence[Sequence[Tensor]]
Input = Tensor | int | None


def addresses(inputs: Sequence[Input]) -> list[int]:
    """Returns what a replay takes in place of the inputs."""
    return [
        value.data_ptr() if isinstance(value, Tensor) else 0 if value is None else value
        for value in inputs
    ]


@dataclass
class Allocation:
    """Memory that a tensor got while calls were recorded, and the first and last call that use
    it."""

    address: int
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class _View:
    """A tensor that starts `offset` bytes behind the start of a buffer."""

    buffer: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def fills(self, size: int) -> bool:
        """Whether it has no gaps and takes all of a buffer of so many bytes."""
        dense = torch.empty(self.shape, dtype=self.dtype, device="meta")
        return self.offset == 0 and dense.nbytes == size and dense.stride() == self.stride

    def of(self, buffer: Tensor) -> Tensor:
        if buffer.dtype is self.dtype and buffer.shape == self.shape:
            return buffer
        if buffer.dtype is not self.dtype:
            buffer = buffer.view(-1).view(self.dtype)
        start = buffer.storage_offset() + self.offset // self.dtype.itemsize
        return buffer.as_strided(self.shape, self.stride, start)


class LayerTape:
    """groups: tensors of each group, within buffers of these sizes in bytes."""

    def __init__(
        self, tape: Tape, groups: list[list[_View]], sizes: list[int], scratch_size: int
    ) -> None:
        self._tape, self._groups = tape, groups
        views = [view for group in groups for view in group]
        self._buffers = [
            _buffer([view for view in views if view.buffer == number], size)
            for number, size in enumerate(sizes)
        ]
        self._buffers.append(((scratch_size,), torch.uint8))
        used = [[view.buffer for view in group] for group in groups]
        self._ranges = [range(min(own, default=0), max(own, default=-1) + 1) for own in used]

    def replay(self, inputs: Sequence[int]) -> list[list[Tensor]]:
        """Makes the calls for inputs at these addresses; returns the buffers of each group."""
        buffers = self._create(0, len(self._buffers))
        self._tape.replay_at([*inputs, *map(Tensor.data_ptr, buffers)])
        return [buffers[own.start : own.stop] for own in self._ranges]

    def gather(self, group: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Moves the tensors of a group into buffers like those that `replay` creates."""
        numbers = self._ranges[group]
        buffers = self._create(numbers.start, numbers.stop)
        for view, tensor in zip(self._groups[group], tensors, strict=True):
            own = view.of(buffer := buffers[view.buffer - numbers.start])
            if own is buffer and tensor.is_contiguous():
                buffers[view.buffer - numbers.start] = tensor
            else:
                own.copy_(tensor)
        return buffers

    def _create(self, first: int, stop: int) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in self._buffers[first:stop]]

    def tensors(self, group: int, buffers: Sequence[Tensor]) -> list[Tensor]:
        first = self._ranges[group].start
        return [view.of(buffers[view.buffer - first]) for view in self._groups[group]]

    def addresses(self, group: int, buffers: Sequence[Tensor]) -> list[int]:
        starts, first = [buffer.data_ptr() for buffer in buffers], self._ranges[group].start
        return [starts[view.buffer - first] + view.offset for view in self._groups[group]]


def _buffer(views: Sequence[_View], size: int) -> tuple[tuple[int, ...], torch.dtype]:
    """Returns shape and type of a buffer: those of the tensor that fills it; else it is flat, of
    the type of all its tensors or of bytes."""
    whole = next((view for view in views if view.fills(size)), None)
    if whole is not None:
        return whole.shape, whole.dtype
    types = {view.dtype for view in views}
    dtype = types.pop() if len(types) == 1 else torch.uint8
    return (_lines(size) // dtype.itemsize,), dtype


class _LayerRecorder(Recorder):
    """Records where the calls of a layer find their values: in allocations, the first of which are
    the inputs."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self._inputs = range(len(inputs))
        sizes = [value.nbytes if isinstance(value, Tensor) else 0 for value in inputs]
        starts = addresses(inputs)
        self._allocations = [Allocation(*own, 0, 0) for own in zip(starts, sizes, strict=True)]
        keys = [(value & WORD, i) for i, value in enumerate(inputs) if isinstance(value, int)]
        self._keys = dict(reversed(keys))  # of equal ones the first
        self._calls: list[TapeCall] = []
        self._structs = bytearray()
        self._addresses: list[Any] = []  # base: the number of an allocation

    def add_tensor(self, name: str, tensor: Tensor) -> Tensor:
        now, size = len(self._calls), tensor.untyped_storage().nbytes()
        self._allocations.append(Allocation(tensor.data_ptr(), size, now, now))
        return tensor

    def add_call(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name not in LAYER_FUNCTIONS:
            self.reject(name)
            return
        struct, start = referent_of(arguments[0]), len(self._structs)
        kind: Any = type(struct)
        self._structs += bytes(struct)
        for at in offsets(kind, ctypes.c_void_p):
            if address := self._word(start + at):
                number = self._find(address)
                if number is None:
                    self.reject(f"an argument of {name}")
                    return
                allocation = self._allocations[number]
                allocation.last = len(self._calls)
                self._addresses.append(
                    TapeAddress(start + at, number, address - allocation.address)
                )
        for at in offsets(kind, DropoutMask):
            if self._word(start + at):
                key = self._keys.get(self._word(start + at + 8))
                if key is None:
                    self.reject(f"a mask of {name}")
                    return
                self._addresses.append(TapeAddress(start + at + 8, key, 0))
        self._calls.append(tape_call(name, start, *arguments[1:]))

    def _word(self, at: int) -> int:
        return int.from_bytes(self._structs[at : at + 8], "little")

    def _find(self, address: int) -> int | None:
        """Returns the number of the latest allocation with this address."""
        for number, allocation in reversed([*enumerate(self._allocations)]):
            if 0 <= address - allocation.address < allocation.size:
                return number
        return None

    def tape(self, groups: Groups) -> LayerTape | None:
        """Returns None if the calls cannot be replayed."""
        if self.unsupported_call is not None:
            return None
        starts: dict[int | None, tuple[int, int]] = {}  # (buffer, bytes behind its start)
        sizes, views = list[int](), list[list[_View]]()
        for group in groups:
            views.append(self._views(group, starts, sizes))
        created = range(len(self._inputs), len(self._allocations))
        scratch = [number for number in created if number not in starts]
        offsets, scratch_size = share_memory([self._allocations[number] for number in scratch])
        starts.update((n, (len(sizes), at)) for n, at in zip(scratch, offsets, strict=True))
        for address in self._addresses:
            if address.base not in self._inputs:
                buffer, offset = starts[address.base]
                address.base = len(self._inputs) + buffer
                address.offset += offset
        tape = Tape(self._calls, bytes(self._structs), self._addresses)
        return None if self.unsupported_call else LayerTape(tape, views, sizes, scratch_size)

    def _views(
        self, group: Sequence[Tensor], starts: dict[int | None, tuple[int, int]], sizes: list[int]
    ) -> list[_View]:
        """Places the tensors of a group in new buffers. Appends to the buffers' sizes, and enters
        where allocations start."""
        views, first = list[_View](), len(sizes)
        for tensor in group:
            number, size, offset = None, 0, 0
            if tensor.numel():
                number = self._find(tensor.untyped_storage().data_ptr())
                if number is None or number in self._inputs:
                    self.reject("a tensor that the layer did not create")
                    break
                size = self._allocations[number].size
                offset = int(tensor.storage_offset()) * tensor.element_size()
            if number is None or number not in starts:
                if len(sizes) == first or (size and _lines(sizes[-1]) + size > MOST_SHARED):
                    sizes.append(0)
                starts[number] = len(sizes) - 1, _lines(sizes[-1])
                sizes[-1] = _lines(sizes[-1]) + size
            buffer, start = starts[number]
            shape, stride = tuple(tensor.shape), tensor.stride()
            views.append(_View(buffer, start + offset, tensor.dtype, shape, stride))
        return views


def record_layer(
    inputs: Sequence[Input], compute: Callable[[], Groups]
) -> tuple[Groups, LayerTape | None]:
    """Returns what compute() returns, and a tape; None if the calls cannot be replayed."""
    recorder = _LayerRecorder(inputs)
    with record(recorder):
        groups = compute()
    return groups, recorder.tape(groups)


def _lines(size: int) -> int:
    """Rounds up to whole cache lines."""
    return -(-size // LINE) * LINE


def share_memory(allocations: Sequence[Allocation]) -> tuple[list[int], int]:
    """Places allocations in one piece of memory, apart where both are needed at the same time.
    Returns where each starts, and the size of all."""
    starts, most = list[int](), 0
    for number, own in enumerate(allocations):
        neighbours = [
            (at, at + other.size)
            for at, other in zip(starts, allocations[:number], strict=True)
            if other.first <= own.last and own.first <= other.last
        ]
        start = 0
        for low, high in sorted(neighbours):
            if start + own.size <= low:
                break
            start = max(start, _lines(high))
        starts.append(start)
        most = max(most, start + own.size)
    return starts, most


@cache
def offsets(kind: Any, wanted: Any) -> tuple[int, ...]:
    """Returns where a struct or an array of type `kind` holds values of type `wanted`."""
    if kind is wanted:
        return (0,)
    if issubclass(kind, ctypes.Array):
        size, within = ctypes.sizeof(kind._type_), offsets(kind._type_, wanted)
        return tuple(i * size + at for i in range(kind._length_) for at in within)
    if issubclass(kind, ctypes.Structure):
        fields = ((getattr(kind, name).offset, of) for name, of, *_ in kind._fields_)
        return tuple(start + at for start, of in fields for at in offsets(of, wanted))
    return ()
