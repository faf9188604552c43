"""Makes the same calls for many groups of rows, such as the rows of each expert of a mixture.

Python makes the calls of the first group, which checks their arguments. The calls of the other
groups are copies with other addresses and numbers of rows. numpy fills them in, and one call into C
makes them (native/common/tape.c). So a group costs no Python of its own.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from veneer.kernels.bindings.arguments import CallError, is_observed, observe_calls
from veneer.kernels.tape.layer_tape import offsets
from veneer.kernels.tape.tape import TapeCall, function_number, replay_calls
from veneer.private.interpreter import referent_of

Numbers = npt.NDArray[np.int64]
WORD_BYTES = 8


class Groups(NamedTuple):
    """Groups of rows: the number of each group's matrix, its first row, and how many rows it has,
    at least one."""

    numbers: Numbers
    firsts: Numbers
    counts: Numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, group: int) -> slice:
        first = int(self.firsts[group])
        return slice(first, first + int(self.counts[group]))


Compute = Callable[[slice, int], None]
"""Makes the calls of a group: takes its rows and the number of its matrix."""


def for_each_group(
    groups: Groups, rows: Sequence[Tensor], stacks: Sequence[Tensor | None], compute: Compute
) -> None:
    """Makes the calls of compute(rows, number) for each group.

    compute makes the same calls for every group, of functions that a tape knows. They read and
    write `tensor[rows]` of these `rows`, and parts of `stack[number]` of these `stacks`, which have
    no gaps. Their structs have a field `rows`, the number of rows.
    """
    if not len(groups):
        return
    operands = [*rows, *(stack for stack in stacks if stack is not None)]
    if is_observed() or any(operand.is_meta for operand in operands):
        for group in range(len(groups)):
            compute(groups.rows(group), int(groups.numbers[group]))
        return
    _check(groups, rows, operands[len(rows) :])
    calls: list[tuple[str, Any, bytes]] = []

    def record(name: str, arguments: tuple[Any, ...]) -> None:
        (argument,) = arguments  # C may write to the struct, so it is copied before the call
        calls.append((name, type(referent_of(argument)), bytes(referent_of(argument))))

    with observe_calls(record):
        compute(groups.rows(0), int(groups.numbers[0]))
    if len(groups) == 1:
        return
    steps = [
        _Steps(operand, groups.firsts if place < len(rows) else groups.numbers)
        for place, operand in enumerate(operands)
    ]
    table = np.zeros((len(groups) - 1, len(calls), ctypes.sizeof(TapeCall) // WORD_BYTES), np.int64)
    kept = []
    for place, (name, kind, values) in enumerate(calls):
        structs = _structs(kind, values, steps, groups.counts[1:])
        kept.append(structs)
        table[:, place, 0] = function_number(name)
        table[:, place, 1] = structs.ctypes.data + structs.strides[0] * np.arange(len(structs))
    replay_calls(table.ctypes.data, (len(groups) - 1) * len(calls))


def _check(groups: Groups, rows: Sequence[Tensor], stacks: Sequence[Tensor]) -> None:
    """Raises CallError if a group reaches beyond an operand. Python checks the first group alone
    otherwise."""
    stop = int((groups.firsts + groups.counts).max())
    most = int(groups.numbers.max())
    least = int(min(groups.firsts.min(), groups.counts.min() - 1, groups.numbers.min()))
    fits = all(len(x) >= stop for x in rows) and all(len(stack) > most for stack in stacks)
    if least < 0 or not fits or not all(x.is_contiguous() for x in (*rows, *stacks)):
        raise CallError(f"groups up to row {stop} and matrix {most} where operands are smaller")


class _Steps:
    """Distances in bytes from an operand's part of the first group to those of the others."""

    def __init__(self, operand: Tensor, places: Numbers) -> None:
        self.start, self.size = operand.data_ptr(), operand.nbytes
        width = operand.stride(0) * operand.element_size()
        self.distances = (places[1:] - places[0]) * width

    def holds(self, address: int) -> bool:
        return 0 <= address - self.start < self.size


def _structs(kind: Any, values: bytes, steps: Sequence[_Steps], counts: Numbers) -> Numbers:
    """Returns a copy of the first group's struct for each other group, as words."""
    structs = np.tile(np.frombuffer(values, np.int64), (len(counts), 1))
    for place in offsets(kind, ctypes.c_void_p):
        if address := int(structs[0, place // WORD_BYTES]):
            operand = next((own for own in steps if own.holds(address)), None)
            if operand is None:
                raise CallError("a call reads memory that is no operand of its groups")
            structs[:, place // WORD_BYTES] += operand.distances
    structs[:, kind.rows.offset // WORD_BYTES] = counts
    return structs
