"""The calls that end attention's backward (native/attention/attention_sums.c): gradients in shares,
added up.

Each function states the shapes that C takes for granted; arguments.py refuses everything else.
Values are bf16 or float32, shares float32. Shapes: R rows, S shares of queries, K key heads, D head
size, P keys that all documents see.
"""

import ctypes

from torch import Tensor

from veneer.kernels.bindings.arguments import (
    BF16,
    FP32,
    CallError,
    at,
    call,
    number,
    numbers,
    pointers,
)
from veneer.kernels.bindings.calls import MOST_STRIDE


class _SplitSums(ctypes.Structure):
    _fields_ = [*pointers("own more out_k out_v"), *numbers("splits rows width wide")]


class _SharedGradients(ctypes.Structure):
    _fields_ = [*pointers("held out"), *numbers("parts heads rows size add")]


class _Zeros(ctypes.Structure):
    _fields_ = [*pointers("to"), *numbers("bytes")]


def attention_summed(own: Tensor, more: Tensor | None, out_k: Tensor, out_v: Tensor) -> None:
    """out_k, out_v (R, K, D), rounded once, = own (2, S, R, K, D) summed over S, + more (2, R, K,
    D)."""
    (rows, heads, size), (_, splits, *_) = out_k.shape, own.shape
    given = _SplitSums(
        splits=number(splits, 1), rows=rows, width=number(heads * size, 0, MOST_STRIDE)
    )
    given.own = at(own, FP32, 2, splits, rows, heads, size)
    given.more = None if more is None else at(more, FP32, 2, rows, heads, size)
    if out_k.dtype not in (BF16, FP32):
        raise CallError(f"{out_k.dtype} where C takes bf16 or float32")
    given.wide = int(out_k.dtype is FP32)
    given.out_k, given.out_v = (at(each, out_k.dtype, rows, heads, size) for each in (out_k, out_v))
    call("veneer_attention_summed", ctypes.byref(given))


def attention_shared(held: Tensor, out: Tensor, *, add: bool) -> None:
    """out (2, P, K, D) = held (2, documents, S, K, P, D) summed over documents and S; add: + what
    it was."""
    _, documents, splits, heads, rows, size = held.shape
    given = _SharedGradients(
        parts=documents * splits, heads=heads, rows=rows, size=size, add=int(add)
    )
    given.held = at(held, FP32, 2, documents, splits, heads, rows, size)
    given.out = at(out, FP32, 2, rows, heads, size)
    call("veneer_attention_shared", ctypes.byref(given))


def zeros(x: Tensor, start: int) -> None:
    """x (R, K, D), bf16 or float32, = 0 from row `start` on."""
    if x.dtype not in (BF16, FP32):
        raise CallError(f"{x.dtype} where C takes bf16 or float32")
    rows, heads, size = x.shape
    given, row = _Zeros(), heads * size * x.element_size()
    address = at(x, x.dtype, rows, heads, size)
    if number(start, 0, rows) < rows and row:
        given.to, given.bytes = address + start * row, (rows - start) * row
    call("veneer_zeros", ctypes.byref(given))
