"""Declares the functions of the compiled library, each once, in the order of its C signature.

    @declare(
        "veneer_step_gate(*, T, level: int32 0..3)",
        "gate: T[rows, width]; up: T{rows * width}; out: T[rows, width]; rows, width",
    )
    def step_gate(gate: Tensor, up: Tensor, out: Tensor, level: int = 3) -> None: ...

The first text is the call; `*` passes a pointer to a struct, whose fields the second text lists,
and `name|name` are the functions for bf16 and for float32. Calling step_gate checks its arguments
against both texts, fills the struct and calls C. An entry is `name: kind` or `name = expression:
kind`. A name is a parameter, a size, or a value that the function's own body returns: the body runs
first, may check more, and may replace parameters. The kinds:

    bf16[rows, width]   a tensor of this type and shape, without gaps. The first tensor that names a
                        size sets it. `rows@apart` allows gaps, and sets the stride `apart`
    T[rows]  F  V  S    a type that the first such tensor sets; `= T` is its number in C
    T{count}            so many values in any shape, whose number may set a size
    T[rows]?  1..?      None is allowed: NULL or 0
    f32[n] words 4      C reads words of 4 bytes: addresses and strides are multiples
    i64[n] below m      holds values from 0 to m - 1; `ascending to m`: from 0 to m, in order
    int 16..n % 16      a number with its bounds, and what it is a multiple of; int32, uint32
    float  flag         a number, a bool
    pointer  struct     an address or a ctypes object; in a field, as an argument
    Mask  int*3         a struct class passed to `declare`, an array; their values are tuples
    unused              a pointer that this function does not read
    check name: kind    is checked, but is no field; let: and is a number that the body returns
    kept name           an object that the struct refers to as `kept`
"""

import ctypes
import re
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec

import torch

from veneer.kernels.bindings.arguments import call
from veneer.kernels.bindings.checks import (
    NUMBER,
    TENSOR,
    VARIABLES,
    CallValues,
    Checks,
    Entry,
    take,
)
from veneer.kernels.bindings.library import add_signature, on_cpu

P = ParamSpec("P")
Values = dict[str, Any]
"""Values of names in a declaration, returned by the body of a declared function."""

_C_TYPES: dict[str, Any] = {
    "int": ctypes.c_int64,
    "int32": ctypes.c_int,
    "uint32": ctypes.c_uint32,
    "float": ctypes.c_float,
    "flag": ctypes.c_int64,
    **dict.fromkeys(("pointer", "struct", "unused", "*"), ctypes.c_void_p),
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
        role = next((role for role in ("check", "let", "kept") if names.startswith(f"{role} ")), "")
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


def declare(
    c_call: str, fields: str = "", *, fails: Exception | None = None, **structs: Any
) -> Callable[[Callable[P, Values | None]], Callable[P, None]]:
    """Makes a function check its arguments and call C. structs: struct classes by their kinds.
    fails: the error where C returns another number than 0."""
    text, _, c_arguments = c_call.removesuffix(")").partition("(")
    names = text.split("|")
    entries, arguments = _entries(fields), _entries(c_arguments, r",(?![^[{]*[\]}])")
    takes = [_c_type(entry, structs) for entry in arguments]
    for name in names:
        add_signature(name, ctypes.c_int if fails else None, takes)
    struct = structure(names[0], fields, **structs) if arguments[0].name == "*" else None
    arguments = arguments[struct is not None :]

    def decorate(function: Callable[P, Values | None]) -> Callable[P, None]:
        parameters = signature(function).parameters
        checks = Checks(function.__name__, parameters, [*entries, *arguments], structs)
        take_fields = take([checks.place(entry) for entry in entries if not entry.role])
        take_arguments = take([checks.place(entry) for entry in arguments])
        positions, refused = checks.positions, checks.refused
        steps, numbers, shapes = checks.steps, checks.numbers, checks.shapes
        late_steps, tensors = checks.late_steps, checks.tensors
        kept = next((positions[entry.name] for entry in entries if entry.role == "kept"), None)
        defaults = [parameter.default for parameter in parameters.values()]
        behind = [[*defaults[count:], *checks.constants] for count in range(len(defaults) + 1)]
        has_body = function.__code__.co_code != _without_body.__code__.co_code
        first_name, last_name, type_position = names[0], names[-1], positions.get("T", 0)

        @wraps(function)
        def check_and_call(*args: P.args, **kwargs: P.kwargs) -> None:
            values: CallValues = [*args, *behind[len(args)]]
            if has_body or kwargs:
                returned = function(*args, **kwargs)
                if kwargs or returned:
                    for name, value in (kwargs | (returned or {})).items():
                        values[positions[name]] = value
            for step in steps:
                step(values)
            for position, least, most, multiple, entry in numbers:
                value = values[position]
                if (
                    type(value) is not int
                    or not least <= value <= most
                    or (multiple and value % multiple)
                ):
                    raise refused(entry, values)
            for shape_of in shapes:
                values.append(shape_of(values))
            for step in late_steps:
                step(values)
            for position, dtype, shape, word, optional, entry in tensors:
                tensor = values[position]
                if tensor is None and optional:
                    values.append(None)
                    continue
                if (
                    (shape is not None and tensor.shape != values[shape])
                    or tensor.dtype is not values[dtype]
                    or not tensor.is_contiguous()
                    or not (tensor.is_cpu or on_cpu(tensor))
                ):
                    raise refused(entry, values)
                address = tensor.data_ptr()
                if address % values[word]:
                    raise refused(entry, values)
                values.append(address)
            name = first_name
            if first_name is not last_name and values[type_position] is torch.float32:
                name = last_name
            if struct is None:
                failed = call(name, *take_arguments(values))
            else:
                filled = struct(*take_fields(values))
                if kept is not None:
                    filled.kept = values[kept]
                failed = call(name, ctypes.byref(filled), *take_arguments(values))
            if failed and fails is not None:
                raise type(fails)(*fails.args)

        return check_and_call

    return decorate


def _without_body() -> None:
    """Has the code of a function that declares its parameters alone."""
