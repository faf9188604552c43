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

The statements are syntax trees (the module ast). They are parsed from templates, short texts of
Python in which names in capitals stand for what differs between declarations:
`_statements("X = VALUE", X="rows", VALUE=expression)`. Names that begin with `_` are globals of the
generated function: _GLOBALS, and the helpers that declarations.py passes.

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


class _Template(ast.NodeTransformer):
    """Fills a template: replaces names by values.

    A value is a name, a list of names (a tuple of them), an expression, or a list of statements for
    a name that stands alone on its line.
    """

    def __init__(self, values: Values) -> None:
        self._values = values

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value = self._values.get(node.id, node)
        if isinstance(value, list):
            return ast.Tuple([ast.Name(name, node.ctx) for name in value], node.ctx)
        return ast.Name(value, node.ctx) if isinstance(value, str) else value

    def visit_Expr(self, node: ast.Expr) -> Any:
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        return self._values[name] if name in self._values else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Spreads a tuple among the arguments: f(A, B) with B = (c, d) becomes f(A, c, d)."""
        self.generic_visit(node)
        arguments = [a.value if isinstance(a, ast.Starred) else a for a in node.args]
        node.args = [
            value for a in arguments for value in (a.elts if isinstance(a, ast.Tuple) else [a])
        ]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Replaces a division by _divide, which refuses a remainder."""
        self.generic_visit(node)
        if isinstance(node.op, ast.Div):
            return ast.Call(ast.Name("_divide", ast.Load()), [node.left, node.right], [])
        return node


def _statements(template: str, **values: Any) -> list[ast.stmt]:
    """Returns the statements of a template with values in place of its names in capitals."""
    tree: ast.Module = _Template(values).visit(ast.parse(template))
    return tree.body


def _expression(text: str, **values: Any) -> ast.expr:
    """Parses an expression, and puts values in place of its names. A type variable such as T stands
    for its number in C."""
    numbers = {name: f"{name}_number" for name in VARIABLES}
    tree: ast.expr = _Template(numbers | values).visit(ast.parse(text.strip(), mode="eval").body)
    return tree


def _refuse_unless(entry: Entry, *tests: ast.expr) -> list[ast.stmt]:
    """Returns the statement that raises CallError for this entry if a test fails."""
    return _statements(
        "if not TEST: raise _refused(NAME, KIND, _locals())",
        TEST=ast.BoolOp(ast.And(), list(tests)) if len(tests) > 1 else tests[0],
        NAME=ast.Constant(entry.name),
        KIND=ast.Constant(entry.kind),
    )


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
    body: Any = _expression("_body(*ARGUMENTS)", ARGUMENTS=positional)
    body.keywords = [ast.keyword(name, ast.Name(name, ast.Load())) for name in keywords]
    statements = list[ast.stmt]()
    if from_body := [entry.name for entry in fields if entry.role == "body"]:
        statements += _statements("_values = BODY", BODY=body)
        for name in from_body:
            statements += _statements("X = _values[KEY]", X=name, KEY=ast.Constant(name))
    elif function.__code__.co_code != _without_body.__code__.co_code:
        statements.append(ast.Expr(body))
    statements += _checks([*fields, *arguments], parameters)
    values = [_value(entry) for entry in arguments]
    if helpers["_struct"] is not None:
        filled = [entry for entry in fields if not entry.role]
        while filled[-1].kind.startswith("unused"):  # ctypes leaves the last fields NULL
            filled.pop()
        struct_values = ast.Tuple([*map(_value, filled)], ast.Load())
        statements += _statements("_filled = _struct(*VALUES)", VALUES=struct_values)
        values.insert(0, _expression("_byref(_filled)"))
    for entry in fields:
        if entry.role == "kept":
            statements += _statements("_filled.kept = X", X=entry.name)
    if c_names:
        first, last = ast.Constant(c_names[0]), ast.Constant(c_names[-1])
        choice = _expression("FIRST if TYPE is bf16 else LAST", FIRST=first, LAST=last, TYPE="T")
        statements += _statements(
            "if _call(C_NAME, *VALUES): raise _fails()",
            C_NAME=choice if len(c_names) > 1 else first,
            VALUES=ast.Tuple(values, ast.Load()),
        )
    else:
        statements += _statements("return _filled")
    module: Any = ast.Module(_statements("def X(): BODY", BODY=statements), [])
    module.body[0].args.args = [*map(ast.arg, positional)]
    module.body[0].args.kwonlyargs = [*map(ast.arg, keywords)]
    module.body[0].args.kw_defaults = [None] * len(keywords)
    tree = ast.fix_missing_locations(module)
    constants = compile(tree, f"<declaration of {function.__name__}>", "exec").co_consts
    code = next(constant for constant in constants if isinstance(constant, CodeType))
    generated = FunctionType(code, {**_GLOBALS, **helpers, "_body": function})
    generated.__defaults__ = function.__defaults__
    generated.__kwdefaults__ = function.__kwdefaults__
    return update_wrapper(generated, function)


def _without_body() -> None:
    """Has the same code as a declared function without a body."""


def _value(entry: Entry) -> ast.expr:
    """Returns the expression that is passed to C for an entry."""
    if entry.kind.startswith("unused"):
        return _expression("()" if "*" in entry.kind else "None")
    if entry.match(TENSOR):
        return _expression("X", X=f"{entry.name}_address")
    return _expression(entry.name)


def _checks(entries: list[Entry], parameters: Iterable[str]) -> list[ast.stmt]:
    """Returns the statements that read the sizes, compute expressions and check all entries. They
    assign the address of a tensor x to x_address."""
    tensors = {entry: match for entry in entries if (match := entry.match(TENSOR))}
    known = {*parameters, *DTYPES, *(e.name for e in entries if e.expression or e.role == "body")}
    statements = list[ast.stmt]()
    for entry in sorted(tensors, key=lambda entry: tensors[entry]["optional"]):
        statements += _read_sizes(entry, tensors[entry], known)
    for entry in entries:
        if entry.expression:
            value = _expression(entry.expression)
            statements += _statements("X = VALUE", X=entry.name, VALUE=value)
        is_bounded = ".." in entry.kind or (entry.name in parameters and entry.role == "")
        if is_bounded and (match := entry.match(NUMBER)):
            statements += _check_number(entry, match)
    for entry, match in tensors.items():
        statements += _check_tensor(entry, match)
    return statements


def _read_sizes(entry: Entry, match: Match, known: set[str]) -> list[ast.stmt]:
    """Returns the statements that read the sizes, strides and type that this tensor is the first to
    name. Adds these to the known names."""
    x, dtype, statements = entry.name, match["dtype"], list[ast.stmt]()
    axes, strides = _axes(match), _axes(match, 2)
    new = [i for i, axis in enumerate(axes) if axis.isidentifier() and axis not in known]
    if match["bracket"] == "[" and len(new) == len(axes):
        statements += _statements("AXES = X.shape", AXES=axes, X=x)
    else:
        size = "X.shape[I]" if match["bracket"] == "[" else "X.numel()"
        for i in new:
            statements += _statements(f"SIZE = {size}", SIZE=axes[i], X=x, I=ast.Constant(i))
    if any(strides):
        statements += _statements(
            "STRIDES = X.stride()", STRIDES=[*strides[:-1], f"{x}_inner"], X=x
        )
    if dtype not in known:
        types = f"_{dtype}"
        statements += _refuse_unless(entry, _expression("X.dtype in TYPES", X=x, TYPES=types))
        names = [dtype, f"{dtype}_bytes", f"{dtype}_number"]
        statements += _statements("NAMES = TYPES[X.dtype]", NAMES=names, TYPES=types, X=x)
    sizes = [axes[i] for i in new] + [*filter(None, strides)]
    known |= {*sizes, dtype}
    if match["optional"] and statements:
        zeros = [s for name in sizes for s in _statements("X = 0", X=name)] or [ast.Pass()]
        return _statements("if X is None: ZEROS\nelse: READ", X=x, ZEROS=zeros, READ=statements)
    return statements


def _check_number(entry: Entry, match: Match) -> list[ast.stmt]:
    """Returns the statement that checks a number's type, bounds and divisor."""
    values = {
        "X": entry.name,
        "LEAST": _expression(match["least"] or "0"),
        "MOST": _expression(match["most"] or str(_MOST[match["type"]])),
        "MULTIPLE": _expression(match["multiple"] or "1"),
    }
    text = "_type(X) is _int and LEAST <= X <= MOST"
    if match["multiple"]:
        text += " and X % MULTIPLE == 0"
    return _refuse_unless(entry, _expression(text, **values))


def _check_tensor(entry: Entry, match: Match) -> list[ast.stmt]:
    """Returns the statements that set a tensor's address, and check its type, place, shape, gaps
    and values."""
    x, axes, strides, dtype = entry.name, _axes(match), _axes(match, 2), match["dtype"]
    size = f"{dtype}_bytes" if dtype in VARIABLES else ast.Constant(DTYPES[dtype].itemsize)
    word = _expression(match["words"]) if match["words"] else size
    values = {"X": x, "ADDRESS": f"{x}_address", "TYPE": dtype, "WORD": word}
    shape: ast.expr = ast.Tuple([*map(_expression, axes)], ast.Load())
    if match["bracket"] == "{":
        tests = [_expression("X.numel() == SIZE", X=x, SIZE=_expression(axes[0]))]
    else:
        tests = [_expression("X.shape == SHAPE", X=x, SHAPE=shape)]
    text = "X.dtype is TYPE and (X.is_cpu or _on_cpu(X)) and ADDRESS % WORD == 0"
    tests.append(_expression(text, **values))
    if any(strides):
        last = _expression(axes[-1])
        tests.append(_expression("INNER == 1 or LAST <= 1", INNER=f"{x}_inner", LAST=last))
        for stride in strides[:-1] if match["words"] else ():
            text = "STRIDE * SIZE % WORD == 0"
            tests.append(_expression(text, STRIDE=stride, SIZE=size, WORD=word))
    else:
        tests.append(_expression("X.is_contiguous()", X=x))
    if order := match["order"]:
        limit, constant = _expression(match["limit"]), ast.Constant(order)
        tests.append(_expression("_is_within(X, LIMIT, ORDER)", X=x, LIMIT=limit, ORDER=constant))
    statements = _statements("ADDRESS = X.data_ptr()", **values) + _refuse_unless(entry, *tests)
    if match["optional"]:
        text = "if X is None: ADDRESS = None\nelse: CHECK"
        return _statements(text, CHECK=statements, **values)
    return statements


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
    numbers = [] if tensor.is_meta else tensor.tolist()
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
