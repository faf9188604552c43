"""What C may be handed: the checks that every call into the compiled kernels goes through (calls.py, packed_calls.py).

C looks at nothing: a number that is too large arrives as another one, and a pointer is read as far as the numbers say.
So numbers are taken from the tensors' own shapes wherever they can be, and a tensor must be what C takes it for: its
type, this very shape, no gaps, on the CPU, at an address that fits its words. Anything else raises CallError, which
only we can cause: callers ask first whether a kernel computes what they have.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.native import library, on_cpu

BF16, FP32, INT32, INT64, BYTES = torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.uint8
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of values that go in and come out, and their numbers in C."""


class CallError(AssertionError):
    """C would have read or written what it may not. Raised, not asserted: `python -O` leaves assertions out."""


def available(name: str) -> bool:
    """Whether this machine has the function: it is compiled, and for this kind of processor."""
    found = library()
    return found is not None and hasattr(found, name)


def has_bf16() -> bool:
    """Whether it has those that compute in bf16."""
    found = library()
    return found is not None and hasattr(found, "veneer_entropy") and bool(found.veneer_has_bf16())


def reachable(tensor: Tensor) -> bool:
    """On the CPU; while planning, when nothing is called, also where it only stands for that."""
    return tensor.device.type == "cpu" or on_cpu(tensor)


def call(name: str, *arguments: Any) -> int:
    found = library()
    if found is None or not hasattr(found, name):
        raise CallError(f"{name} is not compiled here")
    return int(getattr(found, name)(*arguments) or 0)


def at(tensor: Tensor, dtype: torch.dtype, *shape: int, words: int = 1) -> int:
    """Where the values lie. words: bytes that are read at once."""
    if tensor.shape != shape:
        raise CallError(f"{tuple(tensor.shape)} values where C takes {shape}")
    return _start(tensor, dtype, words)


def whole(tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """The same of any shape that holds `count` values."""
    if tensor.numel() != count:
        raise CallError(f"{tensor.numel():,} values where C takes {count:,}")
    return _start(tensor, dtype, 1)


def _start(tensor: Tensor, dtype: torch.dtype, words: int) -> int:
    if tensor.dtype != dtype or not reachable(tensor) or not tensor.is_contiguous():
        said = f"{tensor.dtype} on {tensor.device}{'' if tensor.is_contiguous() else ' with gaps'}"
        raise CallError(f"{said} where C takes {dtype} on the CPU without gaps")
    address = tensor.data_ptr()
    if address % max(words, tensor.element_size()):
        raise CallError(f"values at an odd address where C reads {words} bytes at once")
    return address


def number(value: int, least: int = 0, most: int = 2**62) -> int:
    if type(value) is not int or not least <= value <= most:
        raise CallError(f"{value!r} where C takes a whole number from {least} to {most}")
    return value


def type_number(dtype: torch.dtype) -> int:
    if dtype not in TYPES:
        raise CallError(f"{dtype} where C takes one of {', '.join(map(str, TYPES))}")
    return TYPES[dtype]


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def pointers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


def numbers(names: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_int64) for name in names.split()]
