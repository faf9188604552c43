"""Calls a function of the compiled kernels, and checks single arguments.

C checks nothing: a number that is too large arrives as another number, and C reads as many values
from a pointer as the numbers say. So sizes come from the tensors' own shapes where possible, and a
tensor must be what C expects: of this type and shape, without gaps, on the CPU, at an address that
is a multiple of the words read. Anything else raises CallError. Only our code can cause it: callers
first ask whether a kernel takes their tensors.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.library import compiled_function, library, on_cpu, planned_counts

BF16, FP32, INT32, INT64, BYTES = (
    torch.bfloat16,
    torch.float32,
    torch.int32,
    torch.int64,
    torch.uint8,
)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of inputs and outputs, and their numbers in C."""


class CallError(AssertionError):
    """Arguments with which C would read or write memory that it may not. Raised, not asserted,
    because `python -O` leaves assertions out."""


def available(name: str) -> bool:
    """Whether the function is compiled, and for this kind of processor."""
    kernels = library()
    return kernels is not None and hasattr(kernels, name)


Observer = Callable[[str, tuple[Any, ...]], None]
"""Takes the name of a function and what it is called with."""


class _Thread(threading.local):
    observer: Observer | None = None


_thread = _Thread()


def call(name: str, *arguments: Any) -> int:
    """Calls a function of the library, or nothing while a step is planned."""
    try:
        function = compiled_function(name)
    except AttributeError as fault:
        raise CallError(f"{name} is not compiled here") from fault
    if (observer := _thread.observer) is not None:
        observer(name, arguments)
    return function(*arguments) or 0 if planned_counts.get() is None else 0


def is_observed() -> bool:
    """Whether this thread's calls are observed, for example recorded."""
    return _thread.observer is not None


@contextmanager
def observe_calls(observer: Observer) -> Iterator[None]:
    """Within the block every call of this thread is reported to the observer. Raises CallError if
    there is an observer already, which would miss calls."""
    if _thread.observer is not None:
        raise CallError("calls are observed within a block that observes them")
    _thread.observer = observer
    try:
        yield
    finally:
        _thread.observer = None


def at(tensor: Tensor, dtype: torch.dtype, *shape: int, words: int = 1) -> int:
    """Returns the address of a tensor of this type and shape. words: bytes that are read at
    once."""
    address = tensor.data_ptr()
    if (
        tensor.shape != shape
        or tensor.dtype is not dtype
        or not tensor.is_contiguous()
        or not (tensor.is_cpu or on_cpu(tensor))
        or address % dtype.itemsize
        or address % words
    ):
        raise CallError(
            f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"
            f" where C takes {dtype} {list(shape)} in words of {words} bytes, without gaps"
        )
    return address


def is_narrow(x: Tensor, weight: Tensor) -> bool:
    """Returns whether the weight is bf16 and x float32. Raises CallError for other types that
    differ."""
    if weight.dtype is x.dtype:
        return False
    if weight.dtype is not BF16 or x.dtype is not FP32:
        raise CallError(f"a weight of {weight.dtype} where x is {x.dtype}")
    return True


def number(value: int, least: int = 0, most: int = 2**62) -> int:
    if type(value) is not int or not least <= value <= most:
        raise CallError(f"{value!r} where C takes a whole number from {least} to {most}")
    return value
