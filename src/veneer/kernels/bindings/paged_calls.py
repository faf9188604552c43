"""The call into the kernel over keys and values in blocks (native/attention/paged_attention.c).

It states the shapes that C takes for granted; arguments.py refuses everything else.
Shapes: as in kernels/attention/paged.py.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import (
    BF16,
    FP32,
    INT32,
    INT64,
    CallError,
    at,
    call,
    number,
    numbers,
    pointers,
    reachable,
)

SLOTS = 16
"""Tokens of a block: as many as a register has lanes."""
MOST_STRIDE = 2**40
MOST_PLACES = 2**31


class _PagedAttention(ctypes.Structure):
    _fields_ = [
        *pointers("tables spans q k v keys values out sinks"),
        *numbers("q_row q_head k_row k_head v_row v_head"),
        *numbers("count heads kv_heads size value_size window"),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]
    kept: object


@dataclass
class PagedSpans:
    """Checked: their tables lie within `tables` and name blocks below `blocks`; `rows`: of all
    together."""

    tables: Tensor
    spans: Tensor
    blocks: int
    rows: int


def paged_spans(tables: Tensor, spans: Tensor) -> PagedSpans:
    """tables int32; spans (count, 5) int64: where its table begins, blocks and places of its front,
    start, stop."""
    count, _ = spans.shape
    at(tables, INT32, size := tables.numel())
    at(spans, INT64, count, 5)
    rows = 0
    for begin, front_blocks, front, start, stop in spans.tolist():
        if (
            not 0 <= start < stop <= MOST_PLACES
            or not 0 <= front <= front_blocks * SLOTS <= MOST_PLACES
        ):
            raise CallError(
                f"a span from {start} to {stop} behind {front} places in {front_blocks} blocks"
            )
        if not 0 <= begin <= size - front_blocks - -(-stop // SLOTS):
            raise CallError(
                f"a table from {begin} on of {front_blocks} blocks and {stop} places, {size} are"
                " given"
            )
        rows += stop - start
    blocks = 0
    if size:
        least, most = (int(extreme) for extreme in tables.aminmax())
        blocks = number(most, least := number(least)) + 1
    return PagedSpans(tables, spans, blocks, rows)


def paged_attention(
    spans: PagedSpans,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    level: int = 4,
) -> None:
    """out (N, H, E) of q (N, H, D), k (N, K, D), v (N, K, E), which are written into keys and
    values; filler stays."""
    (rows, heads, size), (_, kv_heads, value_size), dtype = q.shape, v.shape, q.dtype
    if dtype not in (BF16, FP32) or heads % number(kv_heads, 1):
        raise CallError(f"{heads} query heads over {kv_heads} key heads of {dtype}")
    pair = 2 if dtype is BF16 else 1
    if size % pair:
        raise CallError(f"heads of {size} where C takes pairs of bf16 values")
    (
        number(size, 1),
        number(value_size, 1),
        number(spans.rows, 0, rows),
        number(len(keys), spans.blocks),
    )
    given = _PagedAttention(
        heads=heads, kv_heads=kv_heads, size=size, value_size=value_size, scale=scale
    )
    point_at(given, spans)
    given.q, given.q_row, given.q_head = _strided(q, dtype, rows, heads, size)
    given.k, given.k_row, given.k_head = _strided(k, dtype, rows, kv_heads, size)
    given.v, given.v_row, given.v_head = _strided(v, dtype, rows, kv_heads, value_size)
    lie_in(given, keys, values, dtype)
    given.out = at(out, dtype, rows, heads, value_size)
    given.sinks = None if sinks is None else at(sinks, FP32, heads)
    given.window = 0 if window is None else number(window, 1)
    given.softcap = 0.0 if softcap is None else softcap
    if call("veneer_paged_attention", ctypes.byref(given), pair - 1, number(level, 0, 4)):
        raise MemoryError("no memory for the attention of a step")


def point_at(given: Any, spans: PagedSpans) -> None:
    """The call's spans. What a call is given may get others of as many rows, in blocks that are
    there."""
    given.tables, given.spans, given.count = (
        spans.tables.data_ptr(),
        spans.spans.data_ptr(),
        len(spans.spans),
    )
    given.kept = spans


def lie_in(given: Any, keys: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """The call's blocks. What a call is given may get others of its type, for as many heads of the
    same sizes."""
    pair, blocks, heads = 2 if dtype is BF16 else 1, len(keys), given.kv_heads
    given.keys = at(keys, dtype, blocks, heads, given.size // pair, SLOTS, pair, words=4)
    given.values = at(values, dtype, blocks, heads, SLOTS // pair, given.value_size, pair, words=4)


def _strided(tensor: Tensor, dtype: object, *shape: int) -> tuple[int, int, int]:
    """(address, values from row to row, from head to head) of a tensor whose heads have no gaps
    within."""
    if tensor.shape != shape or tensor.dtype is not dtype or not reachable(tensor):
        raise CallError(
            f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device} where C takes {shape} {dtype}"
        )
    row, head, inner = tensor.stride()
    if inner != 1 and shape[2] > 1:
        raise CallError(f"strides {tensor.stride()} where C takes neighbours")
    address = tensor.data_ptr()
    if address % tensor.element_size():
        raise CallError("values at an odd address")
    return address, number(row, 0, MOST_STRIDE), number(head, 0, MOST_STRIDE)
