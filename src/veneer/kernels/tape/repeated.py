"""Calls into compiled functions that one layer makes, made again by one call for layers like it.

    repeated = noted(given, compute)         what compute() makes, and the calls that it makes, once
    made = repeated.again(addresses)         the same of values that lie elsewhere

given: all that the calls read and nothing of which they made themselves; `addresses` is where
another layer has these, in the same order, each as large. A number among them is that of a mask
(dropout), and its own address. compute returns groups of tensors, made anew for every layer. What
else is made between is scratch: pieces that are not needed at the same time share theirs.

The calls were checked when they were made (bindings/arguments.py); that another layer's values are
of the same shapes and types, without gaps, is the caller's to see. Anything else that torch
computes spoils it, as in recorded.py. Between two products Python's part of a layer took as long as
four of C's: all that it reads has left the caches.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import CallError, call, noting
from veneer.kernels.bindings.calls import Masked
from veneer.kernels.tape.recorded import watched

FUNCTIONS = (
    *("veneer_product", "veneer_rank_down", "veneer_rank_up", "veneer_rank_gradient"),
    *("veneer_block_norm_forward", "veneer_block_norm_backward"),
    *("veneer_block_gate_forward", "veneer_block_gate_backward", "veneer_block_heads"),
    *(
        "veneer_attention_forward",
        "veneer_attention_backward",
        "veneer_attention_summed",
        "veneer_attention_shared",
    ),
    *("veneer_zeros", "veneer_silu_gate_forward"),
)
"""In the order in which native/repeated.c numbers them."""
LINE, WORD = 64, 2**64 - 1
TOGETHER = 2**20
"""Bytes up to which tensors of a group lie in one piece of memory: large ones leave holes that
others of a batch with more rows do not fit into."""
_NUMBERS = {name: number for number, name in enumerate(FUNCTIONS)}
_EMPTY = -1
"""A piece of no bytes."""

Groups = Sequence[Sequence[Tensor]]
Given = Tensor | int | None


class _Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("function", "at", "bytes", "count", "places")]


class _Place(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("at", "base", "start")]


@dataclass
class _Piece:
    """Memory that was made: where, how much, and the calls that are given it first and last."""

    address: int
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class _Shape:
    """A tensor within a piece of memory."""

    piece: int
    at: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def fills(self, size: int) -> bool:
        """Whether it has no gaps, and is all of a memory of so many bytes."""
        whole = torch.empty(self.size, dtype=self.dtype, device="meta")
        return self.at == 0 and whole.nbytes == size and whole.stride() == self.stride

    def of(self, memory: Tensor) -> Tensor:
        """memory: the piece, as it is made."""
        if memory.dtype is not self.dtype:
            memory = memory.view(-1).view(self.dtype)
        elif memory.shape == self.size:
            return memory
        return memory.as_strided(
            self.size, self.stride, memory.storage_offset() + self.at // self.dtype.itemsize
        )


class Repeated:
    """groups: the tensors of each, as they lie in its memory of so many bytes. scratch: bytes."""

    def __init__(
        self,
        calls: Any,
        structs: bytes,
        places: Any,
        groups: list[list[_Shape]],
        sizes: list[int],
        scratch: int,
    ) -> None:
        self._groups = groups
        self._given = (
            ctypes.byref(calls),
            len(calls),
            structs,
            ctypes.byref(places),
        )  # which hold what they name
        every = [each for group in groups for each in group]
        made = [
            _memory([each for each in every if each.piece == n], size)
            for n, size in enumerate(sizes)
        ]
        self._memory: list[tuple[tuple[int, ...], torch.dtype]] = [*made, ((scratch,), torch.uint8)]
        self._firsts = [min((each.piece for each in group), default=0) for group in groups]
        self._stops = [max((each.piece for each in group), default=-1) + 1 for group in groups]

    def again(self, addresses: Sequence[int]) -> list[list[Tensor]]:
        """The pieces of memory of each group: as the tensor that fills it, else as values of one
        type in a row."""
        made = [torch.empty(size, dtype=dtype) for size, dtype in self._memory]
        bases = (*addresses, *[each.data_ptr() for each in made])
        if call("veneer_repeated", *self._given, (ctypes.c_int64 * len(bases))(*bases)):
            raise CallError("calls that cannot be made again")
        return [made[first:stop] for first, stop in zip(self._firsts, self._stops, strict=True)]

    def gathered(self, group: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a group in pieces of memory as `again` makes them."""
        shapes, found = self._groups[group], list[Tensor]()
        for piece in range(self._firsts[group], self._stops[group]):
            within = [
                (shape, tensor)
                for shape, tensor in zip(shapes, tensors, strict=True)
                if shape.piece == piece
            ]
            size, dtype = self._memory[piece]
            first = within[0][1]
            if (
                len(within) == 1
                and first.shape == size
                and first.dtype is dtype
                and first.is_contiguous()
            ):
                found.append(first)
                continue
            found.append(torch.empty(size, dtype=dtype))
            for shape, tensor in within:
                shape.of(found[-1]).copy_(tensor)
        return found

    def tensors(self, group: int, pieces: Sequence[Tensor]) -> list[Tensor]:
        first = self._firsts[group]
        return [each.of(pieces[each.piece - first]) for each in self._groups[group]]

    def addresses(self, group: int, pieces: Sequence[Tensor]) -> list[int]:
        starts, first = [each.data_ptr() for each in pieces], self._firsts[group]
        return [starts[each.piece - first] + each.at for each in self._groups[group]]


def _memory(within: Sequence[_Shape], size: int) -> tuple[tuple[int, ...], torch.dtype]:
    """As what a piece of at least so many bytes with these tensors in it is made."""
    whole = next((each for each in within if each.fills(size)), None)
    if whole is not None:
        return whole.size, whole.dtype
    types = {each.dtype for each in within}
    dtype = types.pop() if len(types) == 1 else torch.uint8
    return (_lines(size) // dtype.itemsize,), dtype


def addresses(given: Sequence[Given]) -> list[int]:
    """Of what a layer's calls read, for `again`."""
    return [
        0 if each is None else each if isinstance(each, int) else each.data_ptr() for each in given
    ]


class _Notes:
    """What is heard of one layer. spoiled: what cannot be made again, by name; None: nothing."""

    def __init__(self, given: Sequence[Given]) -> None:
        self.spoiled: str | None = None
        bytes_of = [each.nbytes if isinstance(each, Tensor) else 0 for each in given]
        self._given = list(zip(addresses(given), bytes_of, strict=True))
        self._numbers = {
            each & WORD: -1 - place for place, each in enumerate(given) if isinstance(each, int)
        }
        if len(self._numbers) != sum(isinstance(each, int) for each in given):
            self.spoil("masks that are the same")
        self._pieces: list[_Piece] = []
        self._calls: list[tuple[int, bytes, int, list[tuple[int, int, int]]]] = []

    def spoil(self, name: str) -> None:
        self.spoiled = self.spoiled or name

    def made(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.numel() and name not in ("detach", "alias"):
            now = len(self._calls)
            self._pieces.append(
                _Piece(tensor.data_ptr(), tensor.untyped_storage().nbytes(), now, now)
            )
        return tensor

    def note(self, name: str, given: tuple[Any, ...]) -> None:
        if name not in _NUMBERS:
            self.spoil(name)
            return
        struct, *count = given
        kind: Any = type(struct._obj)
        content, places = bytes(struct._obj), list[tuple[int, int, int]]()
        for at in _addresses(kind):
            if address := int.from_bytes(content[at : at + 8], "little"):
                found = self._place(address)
                if found is None:
                    self.spoil(f"what {name} is given")
                    return
                places.append((at, *found))
        for at in _masks(kind):
            if any(content[at : at + 8]):
                number = self._numbers.get(int.from_bytes(content[at + 8 : at + 16], "little"))
                if number is None:
                    self.spoil(f"a mask of {name}")
                    return
                places.append((at + 8, number, 0))
        self._calls.append((_NUMBERS[name], content, int(count[0]) if count else 0, places))

    def _place(self, address: int) -> tuple[int, int] | None:
        """(number, bytes behind its begin): below 0 of what was given, counted from -1 on, else of
        what was made; of two pieces that lay in one place the later one."""
        number = self._piece(address)
        if number is not None:
            self._pieces[number].last = len(self._calls)
            return number, address - self._pieces[number].address
        for number, (start, size) in enumerate(self._given):
            if start <= address < start + size:
                return -1 - number, address - start
        return None

    def _piece(self, address: int) -> int | None:
        for number in reversed(range(len(self._pieces))):
            if 0 <= address - self._pieces[number].address < self._pieces[number].bytes:
                return number
        return None

    def repeated(self, groups: Groups) -> Repeated | None:
        """None: it is spoiled."""
        if self.spoiled is not None:
            return None
        where: dict[
            int, tuple[int, int]
        ] = {}  # of a piece: number of its memory, bytes behind its begin
        shapes, sizes = list[list[_Shape]](), list[int]()
        for group in groups:
            shapes.append([])
            first = len(sizes)
            for each in group:
                number = self._piece(each.untyped_storage().data_ptr()) if each.numel() else _EMPTY
                if number is None:
                    return None
                if number == _EMPTY or number not in where:
                    size = 0 if number == _EMPTY else self._pieces[number].bytes
                    if len(sizes) == first or (size and _lines(sizes[-1]) + size > TOGETHER):
                        sizes.append(0)
                    where[number] = len(sizes) - 1, _lines(sizes[-1])
                    sizes[-1] = _lines(sizes[-1]) + size
                memory, at = where[number]
                at += 0 if number == _EMPTY else int(each.storage_offset()) * each.element_size()
                shapes[-1].append(_Shape(memory, at, each.dtype, tuple(each.shape), each.stride()))
        scratch = [number for number in range(len(self._pieces)) if number not in where]
        places, needed = _laid([self._pieces[number] for number in scratch])
        where.update((number, (len(sizes), at)) for number, at in zip(scratch, places, strict=True))
        return Repeated(*self._together(where), shapes, sizes, needed)

    def _together(self, where: dict[int, tuple[int, int]]) -> tuple[Any, bytes, Any]:
        """Calls, their structs, and the addresses in these."""
        structs, calls, laid = bytearray(), list[_Call](), list[_Place]()
        for function, content, count, places in self._calls:
            calls.append(_Call(function, len(structs), len(content), count, len(places)))
            structs += content
            for at, number, start in places:
                memory, begin = (-1 - number, 0) if number < 0 else where[number]
                laid.append(
                    _Place(at, memory if number < 0 else len(self._given) + memory, begin + start)
                )
        return (_Call * len(calls))(*calls), bytes(structs), (_Place * len(laid))(*laid)


def noted(given: Sequence[Given], compute: Callable[[], Groups]) -> tuple[Groups, Repeated | None]:
    """What compute() gives; None: it cannot be made again for others."""
    notes = _Notes(given)
    with noting(notes.note), watched(notes):
        groups = compute()
    return groups, notes.repeated(groups)


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE


def _laid(pieces: Sequence[_Piece]) -> tuple[list[int], int]:
    """Where each begins in a common memory, and how large that is: two that are needed at the same
    time lie apart."""
    found, largest = list[int](), 0
    for number, piece in enumerate(pieces):
        beside = [
            (at, at + other.bytes)
            for at, other in zip(found, pieces[:number], strict=True)
            if other.first <= piece.last and piece.first <= other.last
        ]
        start = 0
        for low, high in sorted(beside):
            if start + piece.bytes <= low:
                break
            start = max(start, _lines(high))
        found.append(start)
        largest = max(largest, start + piece.bytes)
    return found, largest


def _within(kind: Any, found: Callable[[Any], tuple[int, ...]]) -> tuple[int, ...]:
    """What is found in an array's values or a struct's fields, counted from its begin."""
    if issubclass(kind, ctypes.Array):
        size = ctypes.sizeof(kind._type_)
        return tuple(i * size + at for i in range(kind._length_) for at in found(kind._type_))
    if issubclass(kind, ctypes.Structure):
        fields = ((getattr(kind, name).offset, of) for name, of, *_ in kind._fields_)
        return tuple(start + at for start, of in fields for at in found(of))
    return ()


@cache
def _addresses(kind: Any) -> tuple[int, ...]:
    """Where a struct holds addresses, in those within it too."""
    return (0,) if kind is ctypes.c_void_p else _within(kind, _addresses)


@cache
def _masks(kind: Any) -> tuple[int, ...]:
    """Where it holds masks: an address and, behind it, their own number."""
    return (0,) if kind is Masked else _within(kind, _masks)
