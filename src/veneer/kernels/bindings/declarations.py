"""Declares the functions of the compiled library, each once, in the order of its C signature.

    @declare(
        "veneer_step_gate(*, T, level: int32 0..3)",
        "gate: T[rows, width]; up: T{rows * width}; out: T[rows, width]; rows, width",
    )
    def step_gate(gate: Tensor, up: Tensor, out: Tensor, level: int = 3) -> None:
        '''out = silu(gate) * up'''

The first text is the call; `*` passes a pointer to a struct, whose fields the second text lists,
and `name|name` are the functions for bf16 and for float32. Calling step_gate checks its arguments
against both texts, fills the struct and calls C. An entry is `name: kind` or `name = expression:
kind`. A name is a parameter, a size, or a value that the function's own body returns: the body runs
first, may check more, and may replace parameters. checks.py generates the function. The kinds:

    bf16[rows, width]   a tensor of this type and shape, without gaps. The first tensor that names a
                        size sets it. `rows@apart` allows gaps, and sets the stride `apart`
    T[rows]  F  V  W    a type that the first tensor with this letter sets; `= T`: its number in C
    T{count}            a tensor of this many values, in any shape; may set a size
    T[rows]?            None is allowed: NULL
    f32[n] words 4      C reads words of 4 bytes: addresses and strides are multiples
    i64[n] below m      holds values from 0 to m - 1; `ascending to m`: from 0 to m, in order
    int 16..n % 16      a number from 16 to n that is a multiple of 16; also int32, uint32
    float  flag         a number, a bool
    pointer             an address, or another value that ctypes accepts as a pointer
    Mask  int*3         a struct class that `declare` gets, an array; the values are tuples
    unused  unused*3    a pointer that this function does not read, or an array
    check name: kind    a value that is checked and not passed to C
    body name, name     names whose values the body returns
    kept name           an object that the struct refers to as `kept`
"""

import ctypes
import re
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec

from veneer.kernels.bindings.checks import (
    NUMBER,
    TENSOR,
    VARIABLES,
    Entry,
    Values,
    generate_call,
    refused,
)
from veneer.kernels.bindings.library import add_signature

P = ParamSpec("P")

_C_TYPES: dict[str, Any] = {
    "int": ctypes.c_int64,
    "int32": ctypes.c_int,
    "uint32": ctypes.c_uint32,
    "float": ctypes.c_float,
    "flag": ctypes.c_int64,
    **dict.fromkeys(("pointer", "unused", "*"), ctypes.c_void_p),
}


def structure(name: str, text: str, **structs: Any) -> Any:
    """Creates the ctypes structure with these fields."""
    fields = [(entry.name, _c_type(entry, structs)) for entry in _entries(text) if not entry.role]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _entries(text: str, separator: str = r"[\n;]") -> list[Entry]:
    entries = []
    for line in filter(None, map(str.strip, re.split(separator, text))):
        names, _, kind = line.partition(":")
        names, _, expression = names.partition("=")
        role = next(
            (role for role in ("check", "body", "kept") if names.startswith(f"{role} ")), ""
        )
        for name in map(str.strip, names.removeprefix(role).split(",")):
            default = "*" if name == "*" else "int32" if name in VARIABLES else "int"
            entries.append(Entry(role, name, expression.strip(), kind.strip() or default))
    return entries


def _c_type(entry: Entry, structs: Values) -> Any:
    if entry.match(TENSOR):
        return ctypes.c_void_p
    if number := entry.match(NUMBER):
        return _C_TYPES[number["type"] or "int"]
    base, _, length = entry.kind.rstrip("?").partition("*")
    c_type = structs.get(base) or _C_TYPES[base or "*"]
    return c_type * int(length) if length else c_type


def declare_structure(
    struct: Any, fields: str
) -> Callable[[Callable[P, Values | None]], Callable[P, Any]]:
    """Makes a function check its arguments and return a struct with these fields."""

    def decorate(function: Callable[P, Values | None]) -> Callable[P, Any]:
        helpers = {"_struct": struct, "_refused": partial(refused, function.__name__)}
        return generate_call(function, _entries(fields), [], [], helpers)

    return decorate


def declare(
    c_call: str, fields: str = "", *, fails: Exception | None = None, **structs: Any
) -> Callable[[Callable[P, Values | None]], Callable[P, None]]:
    """Makes a function check its arguments and call C. structs: struct classes by their kinds.
    fails: the error that is raised if C does not return 0."""
    text, _, c_arguments = c_call.removesuffix(")").partition("(")
    names = text.split("|")
    entries, arguments = _entries(fields), _entries(c_arguments, r",(?![^[{]*[\]}])")
    takes = [_c_type(entry, structs) for entry in arguments]
    for name in names:
        add_signature(name, ctypes.c_int if fails else None, takes)
    has_struct = arguments[0].name == "*"
    helpers = {
        "_struct": structure(names[0], fields, **structs) if has_struct else None,
        "_fails": lambda: type(fails)(*fails.args) if fails else None,
    }

    def decorate(function: Callable[P, Values | None]) -> Callable[P, None]:
        own_helpers = helpers | {"_refused": partial(refused, function.__name__)}
        return generate_call(function, entries, arguments[has_struct:], names, own_helpers)

    return decorate
