"""Calls into compiled functions, noted while Python makes them, and made again in their order by
one call.

    with recording() as noted: y = ...                     computed as ever
    if noted.spoiled is None: noted.again()               y holds what the same calls make of what
        now lies where they read

As with a CUDA graph, the same functions read and write the same memory again: new inputs are copied
into the old tensors. Tensors that were made are kept, views cost nothing; anything else that torch
computes within the block would be missing the second time, and spoils the recording. The calls were
checked when they were made (bindings/arguments.py); that what they read still stands where it
stood, is the caller's to see.

Given `Room`, tensors are made there, with space for more rows; `with_rows` says how many it is
then. What was let go is used again by later calls, as it is when they are made again: the order is
the same.
"""

import ctypes
import math
import mmap
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.kernels.bindings.arguments import CallError, call, noting

FUNCTIONS = (
    *(
        "veneer_few_rows",
        "veneer_few_rows_updated",
        "veneer_step_norm",
        "veneer_step_rotate",
        "veneer_step_gate",
    ),
    *("veneer_paged_attention", "veneer_nf4_product", "veneer_packed_rows", "veneer_step_inputs"),
)
"""In the order in which native/recorded.c numbers them."""
MOST_GIVEN = 9
_NUMBERS = {name: number for number, name in enumerate(FUNCTIONS)}
_MEMORY = {"empty", "new_empty", "empty_like", "empty_strided"}
_VIEWED = {"detach", "alias"}
_VIEWS = {
    "view",
    "_unsafe_view",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "expand",
    "as_strided",
    "t",
    "transpose",
}
_VIEWS |= {"permute", "split", "split_with_sizes"}


_ROWS_IN_STRUCT = {
    "veneer_few_rows",
    "veneer_few_rows_updated",
    "veneer_packed_rows",
    "veneer_step_inputs",
}
_ROWS_GIVEN = {"veneer_step_norm", "veneer_step_rotate", "veneer_step_gate"}
"""Second."""
_OF_ANY_ROWS = {*_ROWS_IN_STRUCT, *_ROWS_GIVEN, "veneer_paged_attention"}
"""Calls that compute whatever rows there are, of a paged_attention those of its spans, by the same
instructions."""


class _Call(ctypes.Structure):
    _fields_ = [("function", ctypes.c_int64), ("given", ctypes.c_int64 * MOST_GIVEN)]


class Room:
    """Memory for tensors of `rows` rows, or a whole number of times as many, with space for
    `most`."""

    def __init__(self, rows: int, most: int) -> None:
        self.rows, self.most = rows, most
        self._pieces: list[mmap.mmap] = []
        self._free: dict[int, list[mmap.mmap]] = {}

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Of `rows` rows. Its memory is free again when nobody has the tensor or a view of it."""
        count = math.prod(shape)
        size = count // self.rows * self.most * dtype.itemsize
        free = self._free.setdefault(size, [])
        if not free:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._pieces.append(
                mmap.mmap(-1, size, flags=flags)
            )  # taken from the system where it is written
            free.append(self._pieces[-1])
        held = memoryview(piece := free.pop())
        weakref.finalize(held, free.append, piece).atexit = False
        return torch.frombuffer(held, dtype=dtype)[:count].view(shape)

    def holds_only(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all of it is free but the memory of these tensors."""
        pieces = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return len(self._pieces) - sum(map(len, self._free.values())) == len(pieces)


class Recording:
    """spoiled: what else was computed, by name; None: nothing. room: where tensors are made; None:
    anywhere."""

    def __init__(self, room: Room | None = None) -> None:
        self.spoiled: str | None = None
        self.room = room
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._kept: list[Tensor] = []
        self._made: Any = None
        self._of_a_row: list[int] | None = None
        self._around = 0, 0

    @property
    def of_any_rows(self) -> bool:
        """Whether `with_rows` may be asked."""
        return self.room is not None and all(name in _OF_ANY_ROWS for name, _ in self._calls)

    def with_rows(self, rows: int) -> None:
        """From now on the calls are made of so many rows."""
        if (
            self.room is None
            or not 0 < rows <= self.room.most
            or not (rows == self.room.rows or self.of_any_rows)
        ):
            raise CallError(f"{rows} rows of calls that were not noted for so many")
        made, times = self._prepared(), self._times()
        for (name, given), again, each in zip(self._calls, made, times, strict=True):
            if name in _ROWS_IN_STRUCT:
                given[0]._obj.rows = each * rows
            elif name in _ROWS_GIVEN:
                again.given[1] = each * rows

    def _times(self) -> list[int]:
        """Rows of each call to one of the step's."""
        if self._of_a_row is None:
            assert self.room is not None
            found = [
                given[0]._obj.rows
                if name in _ROWS_IN_STRUCT
                else given[1]
                if name in _ROWS_GIVEN
                else 0
                for name, given in self._calls
            ]
            if any(rows % self.room.rows for rows in found):
                raise CallError(
                    f"calls of a step of {self.room.rows} rows compute {sorted(set(found))}"
                )
            self._of_a_row = [rows // self.room.rows for rows in found]
        return self._of_a_row

    def structs(self, function: str) -> list[Any]:
        """What the calls of a function were given first, to be changed before they are made
        again."""
        return [given[0]._obj for name, given in self._calls if name == function]

    def stand_between(self, before: "Recording", behind: "Recording") -> None:
        """Calls that `again` makes too where it is asked for them: noted in the same room."""
        self._calls = [*before._calls, *self._calls, *behind._calls]
        self._kept += [*before._kept, *behind._kept]
        self._around, self._made, self._of_a_row = (
            (len(before._calls), len(behind._calls)),
            None,
            None,
        )

    def again(self, *, around: bool = False) -> None:
        """around: with what stands before and behind. MemoryError: one of them had no room."""
        if self.spoiled is not None:
            raise CallError(f"calls are made again that are not all there was: {self.spoiled}")
        made = self._prepared()
        first, last = (0, 0) if around else self._around
        if call(
            "veneer_recorded",
            ctypes.byref(made, first * ctypes.sizeof(_Call)),
            len(made) - first - last,
        ):
            raise MemoryError("no memory for a step")

    def _prepared(self) -> Any:
        if self._made is None:
            self._made = (_Call * len(self._calls))(*[_as_numbers(*each) for each in self._calls])
        return self._made

    def end(self, tensors: Iterable[Tensor]) -> None:
        """Spoils the recording if something made in the room is held besides these tensors: calls
        that are made again may write over it."""
        if self.room is not None and not self.room.holds_only(tensors):
            self.spoil("a tensor that is kept")

    def note(self, name: str, given: tuple[Any, ...]) -> None:
        if name not in _NUMBERS:
            self.spoil(name)
        self._calls.append((name, given))

    def spoil(self, name: str) -> None:
        self.spoiled = self.spoiled or name

    def made(self, name: str, tensor: Tensor) -> Tensor:
        """What is used in place of this one, which holds nothing yet."""
        if self.room is None or name in _VIEWED or not tensor.numel():
            self._kept += [] if self.room else [tensor]
            return tensor
        if tensor.numel() % self.room.rows or not tensor.is_cpu or not tensor.is_contiguous():
            self.spoil(name)
            return tensor
        return self.room.empty(tensor.dtype, *tensor.shape)


def _as_numbers(name: str, given: tuple[Any, ...]) -> _Call:
    numbers = [
        0 if each is None else ctypes.addressof(each._obj) if hasattr(each, "_obj") else each
        for each in given
    ]
    return _Call(_NUMBERS[name], (ctypes.c_int64 * MOST_GIVEN)(*numbers))


class Watching(Protocol):
    """Hears of what torch makes."""

    def made(self, name: str, tensor: Tensor) -> Tensor:
        """What is used in place of a tensor that holds nothing yet."""

    def spoil(self, name: str) -> None:
        """Of anything else than that and views."""


class _Watched(TorchDispatchMode):
    def __init__(self, recording: Watching) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in _MEMORY or name in _VIEWED:
            return self._recording.made(name, made)
        if name not in _VIEWS:
            self._recording.spoil(name)
        return made


def watched(watching: Watching) -> TorchDispatchMode:
    """Within it `watching` hears of what torch makes."""
    return _Watched(watching)


@contextmanager
def recording(room: Room | None = None) -> Iterator[Recording]:
    """Of this thread's calls."""
    found = Recording(room)
    with noting(found.note), _Watched(found), torch.no_grad():
        yield found
