"""Compiles the entries of a declaration (declarations.py) to checks of a call's arguments.

The checks work on one list: the arguments, what the function's body returns, types, then what the
checks add: sizes, shapes and addresses. Their positions in the list are known beforehand.
"""

import ast
import ctypes
import operator
import re
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import TYPES, CallError
from veneer.kernels.bindings.library import on_cpu

CallValues = list[Any]
Step = Callable[[CallValues], Any]

DTYPES = {
    "bf16": torch.bfloat16,
    "f32": torch.float32,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
}
VARIABLES = {
    "T": (torch.float32, torch.bfloat16),
    "F": (torch.float32, torch.bfloat16),
    "V": (torch.float32, torch.bfloat16, torch.float16),
    "S": (torch.float32, torch.uint8),
}
"""Names of types that a tensor sets, and the types that it may have."""
_TYPE_VALUES = {
    name: {dtype: (dtype, dtype.itemsize, TYPES.get(dtype)) for dtype in dtypes}
    for name, dtypes in VARIABLES.items()
}
"""What the list holds of a type: the type, its bytes and its number in C."""
TENSOR = re.compile(
    r"(?P<dtype>\w+)(?P<bracket>[\[{])(?P<axes>.+)[\]}](?P<optional>\??)"
    r"(?: words (?P<words>\d+))?(?: (?P<order>below|ascending to) (?P<limit>.+))?$"
)
NUMBER = re.compile(
    r"(?P<type>int32|uint32|int|)\s*(?:(?P<least>.*?)\.\.(?P<most>.*?))?(?P<optional>\??)"
    r"(?: % (?P<multiple>\d+))?$"
)
_MOST = {"uint32": str(2**32 - 1), "int32": str(2**31 - 1)}


class Entry(NamedTuple):
    """One name of a declaration. role: "" for a field or an argument, "check", "let" or "kept"."""

    role: str
    name: str
    expression: str
    kind: str

    def match(self, pattern: re.Pattern[str]) -> dict[str, str]:
        """Returns the parts of a kind, or nothing if it is of another form."""
        match = pattern.match(self.kind)
        return match.groupdict("") if match else {}


def divide(dividend: int, divisor: int) -> int:
    """Divides without a rest, or raises CallError."""
    if divisor < 1 or dividend % divisor:
        raise CallError(f"{dividend} is not a multiple of {divisor}")
    return dividend // divisor


_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.FloorDiv: operator.floordiv,
    ast.Div: divide,
}


class Checks:
    """The checks of one declared function.

    positions   where the list holds the value of a name; "&x" is the address of x
    constants   what follows the arguments in the list
    steps       read sizes, compute expressions, check bounds that are expressions
    numbers     positions of numbers with constant bounds
    shapes      functions that put shapes together
    late_steps  check tensors with gaps or with bounds of their values
    tensors     positions of the other tensors, and of what they have to match
    """

    def __init__(
        self, name: str, parameters: Iterable[str], entries: list[Entry], structs: Iterable[str]
    ) -> None:
        self.name = name
        tensors = {entry: match for entry in entries if (match := entry.match(TENSOR))}
        words = re.findall(r"[a-zA-Z_]\w*", " ".join(match["axes"] for match in tensors.values()))
        known = {*parameters, *VARIABLES, *words}
        returned = [
            entry
            for entry in entries
            if entry.role == "let"
            or not (entry.expression or entry.kind == "unused" or entry.name in known)
        ]
        self._computed = {entry.name for entry in entries if entry.expression}
        self._from_caller = {*parameters, *(entry.name for entry in returned)}
        self.positions: dict[str, int] = {}
        self.constants: CallValues = []
        self.steps: list[Step] = []
        self.numbers: list[tuple[int, int, int, int, Entry]] = []
        self.shapes: list[Step] = []
        self.late_steps: list[Step] = []
        self.tensors: list[tuple[int, int, int | None, int, bool, Entry]] = []
        self._add(*parameters)
        for entry in returned:
            is_array = "*" in entry.kind or entry.kind in structs
            self._add_constant(entry.name, () if is_array else None)
        for name, value in (("unused", None), ("4 bytes", 4), ("64 bytes", 64), *DTYPES.items()):
            self._add_constant(name, value)
        for name, constant in DTYPES.items():
            self._add_constant(f"{name} bytes", constant.itemsize)
        required_first = sorted(tensors, key=lambda entry: tensors[entry]["optional"])
        whole = {entry for entry in required_first if self._add_sizes(entry, tensors[entry])}
        for entry in entries:
            self._add_number(entry)
        for entry, match in tensors.items():
            if entry not in whole:
                self._add_shape(match)
        late = [e for e, match in tensors.items() if e not in whole and _is_special(match)]
        for entry in late:
            self._add_late(entry, tensors[entry])
        for entry, match in tensors.items():
            if entry not in late:
                shape = None if entry in whole else self.positions[_shape_name(match)]
                position, dtype = self.positions[entry.name], self.positions[match["dtype"]]
                word, optional = _word(self.positions, match), bool(match["optional"])
                self.tensors.append((position, dtype, shape, word, optional, entry))
                self._add(f"&{entry.name}")

    def _add(self, *names: str) -> None:
        for name in names:
            if name in self.positions:
                raise TypeError(f"{self.name}: {name} is declared twice")
            self.positions[name] = len(self.positions)

    def _add_constant(self, name: str, value: Any) -> None:
        self._add(name)
        self.constants.append(value)

    def _add_sizes(self, entry: Entry, match: dict[str, str]) -> bool:
        """Adds the step that reads the sizes which this tensor is the first to name. Returns
        whether these are all of its sizes."""
        axes = [axis.strip().partition("@") for axis in match["axes"].split(",")]
        known, position = {*self.positions, *self._computed}, self.positions[entry.name]
        rank = len(axes) if match["bracket"] == "[" else 0
        new = [i for i, (size, *_) in enumerate(axes) if size.isidentifier() and size not in known]
        gaps = [i for i, (*_, stride) in enumerate(axes) if stride and stride not in known]
        variable = match["dtype"]
        types = _TYPE_VALUES.get(variable, {}) if variable not in known else {}
        if not (new or gaps or types):
            return False
        whole = (
            len(new) == rank > 0 and bool(types) and not (match["optional"] or _is_special(match))
        )
        self._add(*(axes[i][0] for i in new))
        if whole:
            self._add(_shape_name(match))
        self._add(*(axes[i][2] for i in gaps))
        if types:
            self._add(variable, f"{variable} bytes", f"number of {variable}")
        count = len(new) + len(gaps) + 3 * bool(types)

        def add_sizes(values: CallValues) -> None:
            tensor = values[position]
            if tensor is None:
                values += [0] * count
                return
            shape = tensor.shape if rank else (tensor.numel(),)
            type_values = types.get(tensor.dtype, ())
            if (rank and len(shape) != rank) or (types and not type_values):
                raise self.refused(entry, values)
            strides = tensor.stride() if gaps else ()
            values += [shape[i] for i in new]
            values += [strides[i] for i in gaps]
            values += type_values

        def add_all_sizes(values: CallValues) -> None:
            tensor = values[position]
            shape, type_values = tensor.shape, types.get(tensor.dtype)
            if len(shape) != rank or type_values is None:
                raise self.refused(entry, values)
            values += (*shape, shape, *type_values)

        self.steps.append(add_all_sizes if whole else add_sizes)
        return whole

    def _add_number(self, entry: Entry) -> None:
        """Adds the steps that compute an expression, and that check the bounds of a number."""
        if entry.expression:
            compute = self._expression(entry.expression)
            self.steps.append(lambda values: values.append(compute(values)))
            self._add(entry.name)
        position, number = self.positions.get(entry.name, -1), entry.match(NUMBER)
        if entry.kind == "flag":

            def check_flag(values: CallValues) -> None:
                if type(values[position]) is not bool:
                    raise self.refused(entry, values)

            self.steps.append(check_flag)
        elif entry.kind == "float?":

            def fill_float(values: CallValues) -> None:
                values[position] = values[position] or 0.0

            self.steps.append(fill_float)
        if not number or not (".." in entry.kind or entry.name in self._from_caller):
            return
        texts = number["least"] or "0", number["most"] or _MOST.get(number["type"], "2**62")
        least, most = map(self._expression, texts)
        multiple, optional = int(number["multiple"] or 0), number["optional"]

        def check(values: CallValues) -> None:
            value = values[position]
            if optional and value is None:
                values[position] = 0
            elif (
                type(value) is not int
                or not least(values) <= value <= most(values)
                or (multiple and value % multiple)
            ):
                raise self.refused(entry, values)

        if optional or re.search("[a-z]", "".join(texts)):
            self.steps.append(check)
        else:
            self.numbers.append((position, least([]), most([]), multiple, entry))

    def _expression(self, text: str) -> Step:
        return self._compute(ast.parse(text.strip(), mode="eval").body)

    def _compute(self, node: ast.expr) -> Step:
        match node:
            case ast.Constant(value=value):
                return lambda values: value
            case ast.Name(id=name):
                return itemgetter(
                    self.positions[f"number of {name}" if name in VARIABLES else name]
                )
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                negated = self._compute(operand)
                return lambda values: -negated(values)
            case ast.BinOp(left=left, op=operation, right=right):
                first, second = self._compute(left), self._compute(right)
                compute = _OPERATORS[type(operation)]
                return lambda values: compute(first(values), second(values))
        raise TypeError(f"{self.name}: {ast.unparse(node)} is no expression of sizes")

    def _add_shape(self, match: dict[str, str]) -> None:
        """Adds the function that puts a shape or a count together, once for all tensors."""
        name = _shape_name(match)
        if name in self.positions:
            return
        texts = name[1:].split(",")
        axes = [self._expression(text) for text in texts]
        if match["bracket"] == "{":
            self.shapes.append(axes[0])
        elif all(text in self.positions for text in texts):
            self.shapes.append(take([self.positions[text] for text in texts]))
        else:
            self.shapes.append(lambda values: tuple([axis(values) for axis in axes]))
        self._add(name)

    def _add_late(self, entry: Entry, match: dict[str, str]) -> None:
        """Adds the step that checks a tensor with gaps, of any shape, or with bounds of values."""
        position, dtype = self.positions[entry.name], self.positions[match["dtype"]]
        shape, word = self.positions[_shape_name(match)], _word(self.positions, match)
        optional, order = bool(match["optional"]), match["order"]
        has_gaps, counts = "@" in match["axes"], match["bracket"] == "{"
        limit = self._expression(match["limit"] or "0")

        def add_address(values: CallValues) -> None:
            tensor = values[position]
            if tensor is None and optional:
                values.append(None)
                return
            if (
                tensor.dtype is not values[dtype]
                or (tensor.numel() if counts else tensor.shape) != values[shape]
                or not (tensor.is_cpu or on_cpu(tensor))
                or (address := tensor.data_ptr()) % values[word]
                or not (_has_rows(tensor, values[word]) if has_gaps else tensor.is_contiguous())
                or (order and not _is_within(tensor, limit(values), order))
            ):
                raise self.refused(entry, values)
            values.append(address)

        self.late_steps.append(add_address)
        self._add(f"&{entry.name}")

    def place(self, entry: Entry) -> int:
        """Returns the position of what C gets of an entry."""
        name = f"number of {entry.name}" if entry.name in VARIABLES else f"&{entry.name}"
        position = self.positions.get(name, self.positions.get(entry.name, -1))
        if entry.kind == "unused":
            return self.positions["unused"]
        if entry.kind in ("struct", "pointer"):
            refer: Any = ctypes.byref if entry.kind == "struct" else ctypes.addressof

            def refer_to(values: CallValues) -> None:
                if isinstance(values[position], (ctypes.Structure, ctypes.Array)):
                    values[position] = refer(values[position])

            self.late_steps.append(refer_to)
        return position

    def refused(self, entry: Entry, values: CallValues) -> CallError:
        """Describes what differs from an entry, with the sizes that are known."""
        value = values[self.positions[entry.name]]
        if isinstance(value, Tensor):
            steps = value.stride()
            value = f"{value.dtype} {list(value.shape)} on {value.device}, strides {steps}"
        sizes = [
            f"{name} = {values[position]}"
            for name in re.findall(r"[a-zA-Z_]\w*", entry.kind)
            if (position := self.positions.get(name, len(values))) < len(values)
        ]
        text = f"{self.name}: {entry.name} is {value} where C takes {entry.kind}"
        return CallError(f"{text} ({', '.join(sizes)})" if sizes else text)


def take(positions: list[int]) -> Callable[[CallValues], tuple[Any, ...]]:
    """Returns the function that takes the values at these positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    if not positions:
        return lambda values: ()
    (position,) = positions
    return lambda values: (values[position],)


def _shape_name(match: dict[str, str]) -> str:
    return match["bracket"] + re.sub(r"@\w+|\s", "", match["axes"])


def _is_special(match: dict[str, str]) -> bool:
    """Whether a tensor is more than one without gaps of a shape."""
    return "@" in match["axes"] or match["bracket"] == "{" or bool(match["order"])


def _word(positions: dict[str, int], match: dict[str, str]) -> int:
    return positions[f"{match['words'] or match['dtype']} bytes"]


def _has_rows(tensor: Tensor, word: int) -> bool:
    """True if the values of the last axis are neighbours and the other strides are words."""
    *strides, inner = tensor.stride()
    whole = not any(stride * tensor.itemsize % word for stride in strides)
    return whole and (inner == 1 or tensor.shape[-1] <= 1)


def _is_within(tensor: Tensor, limit: int, order: str) -> bool:
    """True if the values of a tensor lie between 0 and the limit, in order if that is asked."""
    if tensor.is_meta or not tensor.numel():
        return True
    numbers = tensor.tolist()
    if order == "below":
        return min(numbers) >= 0 and max(numbers) < limit
    return numbers[0] >= 0 and numbers[-1] <= limit and numbers == sorted(numbers)
