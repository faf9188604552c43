"""Calls into compiled functions, noted while Python makes them, and made again in their order by one call.

    with recording() as noted:
        y = ...                     computed as ever
    if noted.spoiled is None:
        noted.again()               y holds what the same calls make of what now lies where they read

As with a CUDA graph, the same functions read and write the same memory again: new inputs are copied into the old
tensors. Tensors that were made are kept, views cost nothing; anything else that torch computes within the block would
be missing the second time, and spoils the recording. The calls were checked when they were made (arguments.py); that
what they read still stands where it stood, is the caller's to see.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from veneer.kernels.arguments import CallError, call, noting

FUNCTIONS = (
    *("veneer_few_rows", "veneer_few_rows_updated", "veneer_step_norm", "veneer_step_rotate", "veneer_step_gate"),
    *("veneer_paged_attention", "veneer_nf4_product", "veneer_packed_rows"),
)
"""In the order in which native/recorded.c numbers them."""
MOST_GIVEN = 9
_NUMBERS = {name: number for number, name in enumerate(FUNCTIONS)}
_MEMORY = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "alias"}
_VIEWS = {"view", "_unsafe_view", "slice", "select", "unsqueeze", "squeeze", "expand", "as_strided", "t", "transpose"}


class _Call(ctypes.Structure):
    _fields_ = [("function", ctypes.c_int64), ("given", ctypes.c_int64 * MOST_GIVEN)]


class Recording:
    """spoiled: what else was computed, by name; None: nothing."""

    def __init__(self) -> None:
        self.spoiled: str | None = None
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._kept: list[Tensor] = []
        self._made: Any = None

    def structs(self, function: str) -> list[Any]:
        """What the calls of a function were given first, to be changed before they are made again."""
        return [given[0]._obj for name, given in self._calls if name == function]

    def again(self) -> None:
        """MemoryError: one of them had no room."""
        if self.spoiled is not None:
            raise CallError(f"calls are made again that are not all there was: {self.spoiled}")
        if self._made is None:
            self._made = (_Call * len(self._calls))(*[_as_numbers(*each) for each in self._calls])
        if call("veneer_recorded", ctypes.byref(self._made), len(self._made)):
            raise MemoryError("no memory for a step")

    def note(self, name: str, given: tuple[Any, ...]) -> None:
        if name not in _NUMBERS:
            self.spoil(name)
        self._calls.append((name, given))

    def spoil(self, name: str) -> None:
        self.spoiled = self.spoiled or name

    def keep(self, made: Tensor) -> None:
        self._kept.append(made)


def _as_numbers(name: str, given: tuple[Any, ...]) -> _Call:
    numbers = [0 if each is None else ctypes.addressof(each._obj) if hasattr(each, "_obj") else each for each in given]
    return _Call(_NUMBERS[name], (ctypes.c_int64 * MOST_GIVEN)(*numbers))


class _Watched(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in _MEMORY:
            self._recording.keep(made)
        elif name not in _VIEWS:
            self._recording.spoil(name)
        return made


@contextmanager
def recording() -> Iterator[Recording]:
    """Of this thread's calls."""
    found = Recording()
    with noting(found.note), _Watched(found), torch.no_grad():
        yield found
