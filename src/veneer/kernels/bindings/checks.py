"""Generates the function that checks the arguments of a declaration (declarations.py) and calls C.

For "gate: T[rows, width]; out: T[rows, width]; rows, width" its statements are like these:

    rows, width = gate.shape
    T, T_bytes, T_number = _T[gate.dtype]
    if gate.dtype is not T or not gate.is_contiguous() or ...: raise _refused("gate", ...)
    if out.shape != (rows, width) or ...: raise _refused("out", ...)
    _call("veneer_step_gate", _byref(_struct(gate_address, out_address, rows, width)))

The statements are syntax trees (the module ast): no text is executed, and a call costs less than
with checks in functions of their own.
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
Values = dict[str, Any]
"""Values of names in a declaration."""

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
TENSOR = re.compile(
    r"(?P<dtype>\w+)(?P<bracket>[\[{])(?P<axes>.+)[\]}](?P<optional>\??)"
    r"(?: words (?P<words>\d+))?(?: (?P<order>below|ascending to) (?P<limit>.+))?$"
)
NUMBER = re.compile(
    r"(?P<type>int32|uint32|int|)\s*(?:(?P<least>.*?)\.\.(?P<most>.*?))?(?: % (?P<multiple>\d+))?$"
)
_MOST = {"": 2**62, "int": 2**62, "int32": 2**31 - 1, "uint32": 2**32 - 1}


class Entry(NamedTuple):
    """One name of a declaration. role: "" for a field or an argument, "check", "body" or "kept"."""

    role: str
    name: str
    expression: str
    kind: str

    def match(self, pattern: re.Pattern[str]) -> Match:
        """Returns the parts of a kind, or nothing if it is of another form."""
        match = pattern.match(self.kind)
        return match.groupdict("") if match else {}


class _Sizes(ast.NodeTransformer):
    """Turns an expression of a declaration into one of the generated function: names of types stand
    for their numbers in C, and a division leaves no rest."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _name(f"{node.id}_number") if node.id in VARIABLES else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        return _call("_divide", node.left, node.right) if isinstance(node.op, ast.Div) else node


def _expression(text: str) -> ast.expr:
    tree: ast.expr = _Sizes().visit(ast.parse(text.strip(), mode="eval").body)
    return tree


def _name(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


def _call(function: str, *arguments: ast.expr, **named: ast.expr) -> ast.expr:
    """A call of a function or of a method, "x.stride"."""
    owner, _, method = function.rpartition(".")
    called = ast.Attribute(_name(owner), method, ast.Load()) if owner else _name(function)
    return ast.Call(called, list(arguments), [ast.keyword(*pair) for pair in named.items()])


def _get(owner: str, attribute: str) -> ast.expr:
    return ast.Attribute(_name(owner), attribute, ast.Load())


def _item(owner: ast.expr, key: str | int) -> ast.expr:
    return ast.Subscript(owner, ast.Constant(key), ast.Load())


def _compare(left: ast.expr, comparison: ast.cmpop, right: ast.expr) -> ast.expr:
    return ast.Compare(left, [comparison], [right])


def _not(value: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.Not(), value)


def _both(*tests: ast.expr) -> ast.expr:
    return ast.BoolOp(ast.And(), list(tests))


def _tuple(values: Iterable[ast.expr]) -> ast.expr:
    return ast.Tuple(list(values), ast.Load())


def _rest(value: ast.expr, divisor: ast.expr) -> ast.expr:
    return ast.BinOp(value, ast.Mod(), divisor)


def _assign(name: str, value: ast.expr) -> ast.stmt:
    return ast.Assign([ast.Name(name, ast.Store())], value)


def _unpack(names: Iterable[str], value: ast.expr) -> ast.stmt:
    targets: list[ast.expr] = [ast.Name(name, ast.Store()) for name in names]
    return ast.Assign([ast.Tuple(targets, ast.Store())], value)


def _refuse_if(entry: Entry, *tests: ast.expr) -> ast.stmt:
    texts = ast.Constant(entry.name), ast.Constant(entry.kind)
    refusal = _call("_refused", *texts, _call("_locals"))
    either = ast.BoolOp(ast.Or(), list(tests)) if len(tests) > 1 else tests[0]
    return ast.If(either, [ast.Raise(refusal)], [])


def generate_call(
    function: Callable[..., Any],
    fields: list[Entry],
    arguments: list[Entry],
    c_names: list[str],
    helpers: Values,
) -> Callable[..., Any]:
    """Generates the function that replaces a declared one; without c_names it returns the struct.
    helpers: _struct, None without a struct, _fails, and what else the statements use."""
    parameters = signature(function).parameters
    keywords = {n: _name(n) for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    positional = [name for name in parameters if name not in keywords]
    body = _call("_body", *map(_name, positional), **keywords)
    if from_body := [entry.name for entry in fields if entry.role == "body"]:
        statements = [_assign("_values", body)]
        statements += [_assign(name, _item(_name("_values"), name)) for name in from_body]
    else:
        has_body = function.__code__.co_code != _without_body.__code__.co_code
        statements = [ast.Expr(body)] if has_body else []
    statements += _checks([*fields, *arguments], parameters)
    values = [_value(entry) for entry in arguments]
    if helpers["_struct"] is not None:
        own = [_value(entry) for entry in fields if not entry.role]
        statements.append(_assign("_filled", _call("_struct", *own)))
        values.insert(0, _call("_byref", _name("_filled")))
    for entry in fields:
        if entry.role == "kept":
            target = ast.Attribute(_name("_filled"), "kept", ast.Store())
            statements.append(ast.Assign([target], _name(entry.name)))
    if c_names:
        first, last = ast.Constant(c_names[0]), ast.Constant(c_names[-1])
        is_bf16 = _compare(_name("T"), ast.Is(), _name("bf16"))
        c_name = ast.IfExp(is_bf16, first, last) if len(c_names) > 1 else first
        failed = _call("_call", c_name, *values)
        statements.append(ast.If(failed, [ast.Raise(_call("_fails"))], []))
    else:
        statements.append(ast.Return(_name("_filled")))
    own_arguments = ast.arguments(
        [],
        [*map(ast.arg, positional)],
        None,
        [*map(ast.arg, keywords)],
        [None] * len(keywords),
        None,
        [],
    )
    definition = ast.FunctionDef(function.__name__, own_arguments, statements, [])
    module = ast.fix_missing_locations(ast.Module([definition], []))
    constants = compile(module, f"<declaration of {function.__name__}>", "exec").co_consts
    code = next(constant for constant in constants if isinstance(constant, CodeType))
    generated = FunctionType(code, {**_GLOBALS, **helpers, "_body": function})
    generated.__defaults__ = function.__defaults__
    generated.__kwdefaults__ = function.__kwdefaults__
    return update_wrapper(generated, function)


def _without_body() -> None:
    """Has the code of a function that declares its parameters alone."""


def _value(entry: Entry) -> ast.expr:
    """Returns what C gets of an entry."""
    if entry.kind.startswith("unused"):
        return _tuple([]) if "*" in entry.kind else ast.Constant(None)
    if entry.name in VARIABLES:
        return _name(f"{entry.name}_number")
    return _name(f"{entry.name}_address" if entry.match(TENSOR) else entry.name)


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
            statements.append(_assign(entry.name, _expression(entry.expression)))
        is_bounded = ".." in entry.kind or (entry.name in parameters and entry.role == "")
        if is_bounded and (match := entry.match(NUMBER)):
            statements.append(_check_number(entry, match))
    for entry, match in tensors.items():
        statements += _check_tensor(entry, match)
    return statements


def _read_sizes(entry: Entry, match: Match, known: set[str]) -> list[ast.stmt]:
    """Reads the sizes, the strides and the type which this tensor is the first to name, and adds
    them to the known names."""
    x, dtype, statements = entry.name, match["dtype"], list[ast.stmt]()
    axes, strides = _axes(match), _axes(match, 2)
    new = [i for i, axis in enumerate(axes) if axis.isidentifier() and axis not in known]
    if match["bracket"] == "{":
        statements += [_assign(axes[i], _call(f"{x}.numel")) for i in new]
    elif len(new) == len(axes):
        statements.append(_unpack(axes, _get(x, "shape")))
    else:
        statements += [_assign(axes[i], _item(_get(x, "shape"), i)) for i in new]
    if any(strides):
        *outer, _ = strides
        statements.append(_unpack([*outer, f"{x}_inner"], _call(f"{x}.stride")))
    if dtype not in known:
        allowed = _not(_compare(_get(x, "dtype"), ast.In(), _name(f"_{dtype}")))
        values = ast.Subscript(_name(f"_{dtype}"), _get(x, "dtype"), ast.Load())
        statements.append(_refuse_if(entry, allowed))
        statements.append(_unpack([dtype, f"{dtype}_bytes", f"{dtype}_number"], values))
    names = [axes[i] for i in new] + [*filter(None, strides)]
    known |= {*names, dtype}
    if match["optional"] and statements:
        zeros: list[ast.stmt] = [_assign(name, ast.Constant(0)) for name in names]
        statements = [ast.If(_compare(_name(x), ast.Is(), ast.Constant(None)), zeros, statements)]
    return statements


def _check_number(entry: Entry, match: Match) -> ast.stmt:
    value, most = _name(entry.name), match["most"] or str(_MOST[match["type"]])
    least, most_value = _expression(match["least"] or "0"), _expression(most)
    within = ast.Compare(least, [ast.LtE(), ast.LtE()], [value, most_value])
    tests = [_compare(_call("_type", value), ast.IsNot(), _name("_int")), _not(within)]
    if multiple := match["multiple"]:
        tests.append(_rest(value, _expression(multiple)))
    return _refuse_if(entry, *tests)


def _check_tensor(entry: Entry, match: Match) -> list[ast.stmt]:
    x, axes, strides = entry.name, _axes(match), _axes(match, 2)
    dtype = match["dtype"]
    size = _name(f"{dtype}_bytes") if dtype in VARIABLES else ast.Constant(DTYPES[dtype].itemsize)
    word = _expression(match["words"]) if match["words"] else size
    address, shape = f"{x}_address", _tuple(map(_expression, axes))
    statements = [_assign(address, _call(f"{x}.data_ptr"))]
    if match["bracket"] == "{":
        tests = [_compare(_call(f"{x}.numel"), ast.NotEq(), _expression(axes[0]))]
    else:
        tests = [_compare(_get(x, "shape"), ast.NotEq(), shape)]
    tests.append(_compare(_get(x, "dtype"), ast.IsNot(), _name(dtype)))
    tests.append(_not(ast.BoolOp(ast.Or(), [_get(x, "is_cpu"), _call("_on_cpu", _name(x))])))
    tests.append(_rest(_name(address), word))
    if any(strides):
        inner = _compare(_name(f"{x}_inner"), ast.NotEq(), ast.Constant(1))
        tests.append(_both(inner, _compare(_expression(axes[-1]), ast.Gt(), ast.Constant(1))))
        for stride in strides[:-1] if match["words"] else ():
            tests.append(_rest(ast.BinOp(_name(stride), ast.Mult(), size), word))
    else:
        tests.append(_not(_call(f"{x}.is_contiguous")))
    if order := match["order"]:
        limit = _expression(match["limit"])
        tests.append(_not(_call("_is_within", _name(x), limit, ast.Constant(order))))
    statements.append(_refuse_if(entry, *tests))
    if match["optional"]:
        is_none = _compare(_name(x), ast.Is(), ast.Constant(None))
        statements = [ast.If(is_none, [_assign(address, ast.Constant(None))], statements)]
    return statements


def _axes(match: Match, part: int = 0) -> list[str]:
    """Returns the sizes of axes, or their strides: part 2."""
    return [axis.partition("@")[part].strip() for axis in match["axes"].split(",")]


def _divide(dividend: int, divisor: int) -> int:
    """Divides without a rest, or raises CallError."""
    if divisor < 1 or dividend % divisor:
        raise CallError(f"{dividend} is not a multiple of {divisor}")
    return dividend // divisor


def _is_within(tensor: Tensor, limit: int, order: str) -> bool:
    """True if the values lie between 0 and the limit, in order if that is asked."""
    numbers = [] if tensor.is_meta else tensor.tolist()
    if order == "below":
        return all(0 <= number < limit for number in numbers)
    return all(0 <= number <= limit for number in numbers) and numbers == sorted(numbers)


def refused(function: str, name: str, kind: str, values: Values) -> CallError:
    """Describes what differs from an entry, with the sizes that it names."""
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
