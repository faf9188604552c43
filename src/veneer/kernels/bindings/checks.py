"""Generates the function that checks the arguments of a declaration (declarations.py) and calls C.

C reads and writes wherever its arguments say, so every call needs checks. A step makes thousands of
calls, and checks in functions of their own would cost more than small kernels do. So each
declaration becomes one function without loops or further calls. The declaration

    @declare("veneer_step_gate(*, T, level: int32 0..3)",
             "gate: T[rows, width]; out: T[rows, width]; rows, width")
    def step_gate(gate: Tensor, out: Tensor, level: int = 3) -> None:

becomes this function (its tests of `out` are like those of `gate`):

    def step_gate(gate, out, level=3):
        rows, width = gate.shape                                            # _read_sizes
        if not gate.dtype in _T: raise _refused("gate", "T[rows, width]", _locals())
        T, T_bytes, T_number = _T[gate.dtype]
        if not (_type(level) is _int and 0 <= level <= 3): raise ...        # _check_number
        gate_address = gate.data_ptr()                                      # _check_tensor
        if not (gate.shape == (rows, width) and gate.dtype is T and ...): raise ...
        out_address = ...
        _filled = _struct(gate_address, out_address, rows, width)           # generate_call
        if _call("veneer_step_gate", _byref(_filled), T_number, level): raise _fails()

The function is compiled from its text, a list of lines. Names that begin with `_` are globals of
the generated function: _GLOBALS, and the helpers that declarations.py passes.

To read this file, begin with `generate_call`, then `_checks`.
"""

import ast
import ctypes
import re
from collections.abc import Callable, Iterable
from functools import update_wrapper
from inspect import signature
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import TYPES, CallError, call
from veneer.kernels.bindings.library import on_cpu

Match = dict[str, str]
"""Named groups of TENSOR or NUMBER in the text of a kind; "" for a missing group."""
Values = dict[str, Any]
"""Values by name."""

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
    "W": (torch.float32, torch.bfloat16),
}
"""Type variables, which a tensor sets, and the types that each may be."""
TENSOR = re.compile(
    r"(?P<dtype>\w+)(?P<bracket>[\[{])(?P<axes>.+)[\]}](?P<optional>\??)"
    r"(?: words (?P<words>\d+))?(?: (?P<order>below|ascending to) (?P<limit>.+))?$"
)
NUMBER = re.compile(
    r"(?P<type>int32|uint32|int|)\s*(?:(?P<least>.*?)\.\.(?P<most>.*?))?(?: % (?P<multiple>\d+))?$"
)
"""TENSOR and NUMBER match the kinds that declarations.py lists."""
_MOST = {"": 2**62, "int": 2**62, "int32": 2**31 - 1, "uint32": 2**32 - 1}


class Entry(NamedTuple):
    """One name of a declaration. role: "" for a field or an argument, "check", "body" or "kept"."""

    role: str
    name: str
    expression: str
    kind: str

    def match(self, pattern: re.Pattern[str]) -> Match:
        """Returns the groups of a match of the kind; empty if it does not match."""
        match = pattern.match(self.kind)
        return match.groupdict("") if match else {}


Lines = list[str]
"""Lines of Python."""


def _expression(text: str) -> str:
    """Translates an expression of a declaration. A type variable such as T stands for its number in
    C, and a division refuses a remainder."""
    text = re.sub(rf"\b([{''.join(VARIABLES)}])\b", r"\1_number", text.strip())
    if "/" not in text:
        return text
    return ast.unparse(_CheckedDivisions().visit(ast.parse(text, mode="eval")))


class _CheckedDivisions(ast.NodeTransformer):
    """Replaces `a / b` by `_divide(a, b)`."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Div):
            return node
        return ast.Call(ast.Name("_divide"), [node.left, node.right], [])


def _refuse_unless(entry: Entry, *tests: str) -> str:
    """Returns the statement that raises CallError for this entry if a test fails."""
    all_tests = " and ".join(f"({test})" for test in tests)
    return f"if not ({all_tests}): raise _refused({entry.name!r}, {entry.kind!r}, _locals())"


def _either(x: str, missing: Lines, present: Lines) -> Lines:
    """Returns statements for a parameter that may be None."""
    return [f"if {x} is None:", *_indented(missing), "else:", *_indented(present)]


def _indented(lines: Lines) -> Lines:
    return [f"    {line}" for line in lines]


def generate_call(
    function: Callable[..., Any],
    fields: list[Entry],
    arguments: list[Entry],
    c_names: list[str],
    helpers: Values,
) -> Callable[..., Any]:
    """Generates the function that replaces a declared one. It calls C, or returns the struct if
    there are no c_names.

    fields     entries of the struct
    arguments  entries of the C function behind the struct
    c_names    the C function, or those for bf16 and float32
    helpers    _struct: the struct class or None; _refused and _fails: return errors to raise
    """
    parameters = signature(function).parameters
    keywords = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    positional = [name for name in parameters if name not in keywords]
    body = f"_body({', '.join([*positional, *(f'{name}={name}' for name in keywords)])})"
    lines = Lines()
    if from_body := [entry.name for entry in fields if entry.role == "body"]:
        lines += [f"_values = {body}", *(f"{name} = _values[{name!r}]" for name in from_body)]
    elif function.__code__.co_code != _without_body.__code__.co_code:
        lines.append(body)
    lines += _checks([*fields, *arguments], parameters)
    values = [_value(entry) for entry in arguments]
    if helpers["_struct"] is not None:
        filled = [entry for entry in fields if not entry.role]
        while filled[-1].kind.startswith("unused"):  # ctypes leaves the last fields NULL
            filled.pop()
        lines.append(f"_filled = _struct({', '.join(map(_value, filled))})")
        values.insert(0, "_byref(_filled)")
    lines += [f"_filled.kept = {entry.name}" for entry in fields if entry.role == "kept"]
    if c_names:
        first, last = c_names[0], c_names[-1]
        c_name = repr(first) if first == last else f"{first!r} if T is bf16 else {last!r}"
        lines.append(f"if _call({', '.join([c_name, *values])}): raise _fails()")
    else:
        lines.append("return _filled")
    declared = ", ".join([*positional, *(["*", *keywords] if keywords else [])])
    text = "\n".join([f"def generated({declared}):", *_indented(lines)])
    constants = compile(text, f"<declaration of {function.__name__}>", "exec").co_consts
    code = next(constant for constant in constants if isinstance(constant, CodeType))
    generated = FunctionType(code, {**_GLOBALS, **helpers, "_body": function})
    generated.__defaults__ = function.__defaults__
    generated.__kwdefaults__ = function.__kwdefaults__
    return update_wrapper(generated, function)


def _without_body() -> None:
    """Has the same code as a declared function without a body."""


def _value(entry: Entry) -> str:
    """Returns the expression that is passed to C for an entry."""
    if entry.kind.startswith("unused"):
        return "()" if "*" in entry.kind else "None"
    return f"{entry.name}_address" if entry.match(TENSOR) else _expression(entry.name)


def _checks(entries: list[Entry], parameters: Iterable[str]) -> Lines:
    """Returns the statements that read the sizes, compute expressions and check all entries. They
    assign the address of a tensor x to x_address."""
    tensors = {entry: match for entry in entries if (match := entry.match(TENSOR))}
    known = {*parameters, *DTYPES, *(e.name for e in entries if e.expression or e.role == "body")}
    lines = Lines()
    for entry in sorted(tensors, key=lambda entry: tensors[entry]["optional"]):
        lines += _read_sizes(entry, tensors[entry], known)
    for entry in entries:
        if entry.expression:
            lines.append(f"{entry.name} = {_expression(entry.expression)}")
        is_bounded = ".." in entry.kind or (entry.name in parameters and entry.role == "")
        if is_bounded and (match := entry.match(NUMBER)):
            lines.append(_check_number(entry, match))
    for entry, match in tensors.items():
        lines += _check_tensor(entry, match)
    return lines


def _read_sizes(entry: Entry, match: Match, known: set[str]) -> Lines:
    """Returns the statements that read the sizes, strides and type that this tensor is the first to
    name. Adds these to the known names."""
    x, dtype, lines = entry.name, match["dtype"], Lines()
    axes, strides = _axes(match), _axes(match, 2)
    new = [i for i, axis in enumerate(axes) if axis.isidentifier() and axis not in known]
    if match["bracket"] == "{":
        lines += [f"{axes[i]} = {x}.numel()" for i in new]
    elif len(new) == len(axes):
        lines.append(f"{', '.join(axes)}, = {x}.shape")
    else:
        lines += [f"{axes[i]} = {x}.shape[{i}]" for i in new]
    if any(strides):
        lines.append(f"{', '.join(strides[:-1])}, {x}_inner = {x}.stride()")
    if dtype not in known:
        lines.append(_refuse_unless(entry, f"{x}.dtype in _{dtype}"))
        lines.append(f"{dtype}, {dtype}_bytes, {dtype}_number = _{dtype}[{x}.dtype]")
    sizes = [axes[i] for i in new] + [*filter(None, strides)]
    known |= {*sizes, dtype}
    if match["optional"] and lines:
        return _either(x, [f"{name} = 0" for name in sizes] or ["pass"], lines)
    return lines


def _check_number(entry: Entry, match: Match) -> str:
    """Returns the statement that checks a number's type, bounds and divisor."""
    x, least = entry.name, _expression(match["least"] or "0")
    most = _expression(match["most"] or str(_MOST[match["type"]]))
    multiple = [f"{x} % {match['multiple']} == 0"] if match["multiple"] else []
    return _refuse_unless(entry, f"_type({x}) is _int", f"{least} <= {x} <= {most}", *multiple)


def _check_tensor(entry: Entry, match: Match) -> Lines:
    """Returns the statements that set a tensor's address, and check its type, place, shape, gaps
    and values."""
    x, axes, strides, dtype = entry.name, _axes(match), _axes(match, 2), match["dtype"]
    size = f"{dtype}_bytes" if dtype in VARIABLES else str(DTYPES[dtype].itemsize)
    word, sizes = match["words"] or size, [_expression(axis) for axis in axes]
    tests = [f"{x}.shape == ({', '.join(sizes)},)", f"{x}.dtype is {dtype}"]
    if match["bracket"] == "{":
        tests[0] = f"{x}.numel() == {sizes[0]}"
    tests += [f"{x}.is_cpu or _on_cpu({x})", f"{x}_address % {word} == 0"]
    if any(strides):
        tests.append(f"{x}_inner == 1 or {sizes[-1]} <= 1")
        if match["words"]:
            tests += [f"{stride} * {size} % {word} == 0" for stride in strides[:-1]]
    else:
        tests.append(f"{x}.is_contiguous()")
    if order := match["order"]:
        tests.append(f"_is_within({x}, {_expression(match['limit'])}, {order!r})")
    lines = [f"{x}_address = {x}.data_ptr()", _refuse_unless(entry, *tests)]
    return _either(x, [f"{x}_address = None"], lines) if match["optional"] else lines


def _axes(match: Match, part: int = 0) -> list[str]:
    """Returns the names of the axes' sizes, or with part 2 those of their strides."""
    return [axis.partition("@")[part].strip() for axis in match["axes"].split(",")]


def _divide(dividend: int, divisor: int) -> int:
    """Divides exactly. Raises CallError if there is a remainder."""
    if divisor < 1 or dividend % divisor:
        raise CallError(f"{dividend} is not a multiple of {divisor}")
    return dividend // divisor


def _is_within(tensor: Tensor, limit: int, order: str) -> bool:
    """Whether all values are from 0 to the limit. order: "below" (the limit itself is excluded), or
    "ascending to" (included, and the values must ascend)."""
    numbers = [] if tensor.is_meta else tensor.view(-1).tolist()
    if order == "below":
        return all(0 <= number < limit for number in numbers)
    return all(0 <= number <= limit for number in numbers) and numbers == sorted(numbers)


def refused(function: str, name: str, kind: str, values: Values) -> CallError:
    """Returns the error for a value that does not match its entry, with the sizes in the entry."""
    value = values[name]
    if isinstance(value, Tensor):
        strides = value.stride()
        value = f"{value.dtype} {list(value.shape)} on {value.device}, strides {strides}"
    names = [word for word in re.findall(r"[a-zA-Z_]\w*", kind) if word in values]
    sizes = f" ({', '.join(f'{word} = {values[word]}' for word in names)})" if names else ""
    return CallError(f"{function}: {name} is {value} where C takes {kind}{sizes}")


_GLOBALS: Values = {
    **DTYPES,
    **{
        f"_{name}": {dtype: (dtype, dtype.itemsize, TYPES.get(dtype)) for dtype in dtypes}
        for name, dtypes in VARIABLES.items()
    },
    "_divide": _divide,
    "_is_within": _is_within,
    "_on_cpu": on_cpu,
    "_byref": ctypes.byref,
    "_call": call,
    "_type": type,
    "_int": int,
    "_locals": locals,
}
"""Names that the statements use."""
