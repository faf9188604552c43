"""The tape of a decoding step: its calls over the same memory, with any number of rows.

    with record_step(memory) as tape: y = ...
    if tape.unsupported_call is None:
        tape.set_rows(5)
        tape.replay()           y now holds what the same calls compute from the current inputs

New inputs are copied into the old tensors. Tensors are created in a `RowMemory`, with space for
more rows. Memory that is free again is used by later calls, as it is in a replay: the order is the
same.
"""

import math
import mmap
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import CallError
from veneer.kernels.tape.tape import STEP_FUNCTIONS, Recorder, Tape, record, tape_call
from veneer.private.interpreter import referent_of

_ROWS = {
    "veneer_few_rows",
    "veneer_few_rows_updated",
    "veneer_packed_rows",
    "veneer_step_embed",
    "veneer_step_angles",
    "veneer_step_norm",
    "veneer_step_rotate",
    "veneer_step_gate",
    "veneer_step_cap",
    "veneer_step_copy",
    "veneer_expert_route",
    "veneer_expert_sort",
    "veneer_expert_product",
    "veneer_expert_sum",
    "veneer_state_window",
    "veneer_state_space",
    "veneer_state_delta",
}
"""Functions that compute any number of rows by the same instructions, as many as their struct
says. So does attention over pages, whose rows are those of its spans."""
_ANY_ROWS = _ROWS | {"veneer_paged_attention"}


class RowMemory:
    """Memory for tensors of `rows` rows, or a multiple, with space for `most_rows`."""

    def __init__(self, rows: int, most_rows: int) -> None:
        self.rows, self.most_rows = rows, most_rows
        self._pieces: list[mmap.mmap] = []
        self._free: dict[int, list[mmap.mmap]] = {}

    def empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Creates a tensor of `rows` rows. Its memory is free again once no view of it is left."""
        count = math.prod(shape)
        size = count // self.rows * self.most_rows * dtype.itemsize
        free = self._free.setdefault(size, [])
        if not free:
            # The system provides a page when it is written first.
            self._pieces.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            free.append(self._pieces[-1])
        buffer = memoryview(piece := free.pop())
        weakref.finalize(buffer, free.append, piece).atexit = False
        return torch.frombuffer(buffer, dtype=dtype)[:count].view(shape)

    def holds_only(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all of it is free but the memory of these tensors."""
        pieces = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return len(self._pieces) - sum(map(len, self._free.values())) == len(pieces)


class StepTape(Recorder):
    """Records calls whose tensors lie in `memory`. has_any_rows: whether `set_rows` accepts another
    number of rows than that of the recording."""

    def __init__(self, memory: RowMemory) -> None:
        self.memory = memory
        self.has_any_rows = True
        self._calls: list[tuple[str, tuple[Any, ...]]] = []
        self._multiples: list[tuple[Any, int]] = []
        self._before = self._behind = 0
        self._tape: Tape | None = None

    def set_rows(self, rows: int) -> None:
        """Sets the number of rows that replays compute."""
        memory, other = self.memory, rows != self.memory.rows
        if not 0 < rows <= memory.most_rows or (other and not self.has_any_rows):
            raise CallError(f"a tape that was not recorded for {rows} rows")
        for struct, multiple in self._multiples:
            struct.rows = multiple * rows

    def structs(self, function: str) -> list[Any]:
        """Returns the structs of all calls of a function; a replay reads what they hold then."""
        return [referent_of(struct) for name, (struct, *_) in self._calls if name == function]

    def enclose(self, before: "StepTape", behind: "StepTape") -> None:
        """Adds calls before and behind, recorded in the same memory, which are replayed only where
        that is asked for. To be called before the first replay."""
        self._calls = [*before._calls, *self._calls, *behind._calls]
        self._multiples += [*before._multiples, *behind._multiples]
        self._before, self._behind = len(before._calls), len(behind._calls)

    def replay(self, *, enclosed: bool = False) -> None:
        """Makes the calls again. enclosed: with those before and behind. Raises MemoryError if one
        of them gets no memory."""
        if self.unsupported_call is not None:
            raise CallError(f"a tape does not hold all calls: {self.unsupported_call}")
        if self._tape is None:
            self._tape = Tape([tape_call(name, *arguments) for name, arguments in self._calls])
        first, behind = (0, 0) if enclosed else (self._before, self._behind)
        self._tape.replay(first, len(self._calls) - behind)

    def check_memory(self, tensors: Iterable[Tensor]) -> None:
        """Rejects the recording if its memory holds other tensors than these: a replay may write
        over them."""
        if not self.memory.holds_only(tensors):
            self.reject("a tensor that is kept")

    def add_call(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name not in STEP_FUNCTIONS:
            self.reject(name)
            return
        self._calls.append((name, arguments))
        self.has_any_rows = self.has_any_rows and name in _ANY_ROWS
        if name in _ROWS:
            struct = referent_of(arguments[0])
            multiple, rest = divmod(struct.rows, self.memory.rows)
            self.has_any_rows = self.has_any_rows and rest == 0
            self._multiples.append((struct, multiple))

    def add_tensor(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.numel() % self.memory.rows or not (tensor.is_cpu and tensor.is_contiguous()):
            self.reject(name)
            return tensor
        return self.memory.empty(tensor.dtype, *tensor.shape)


@contextmanager
def record_step(memory: RowMemory) -> Iterator[StepTape]:
    """Records the calls of this thread."""
    tape = StepTape(memory)
    with record(tape):
        yield tape
