"""The call into the kernel over keys and values in blocks (native/attention/paged_attention.c).

Shapes: as in kernels/attention/paged.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.arguments import BF16, INT32, INT64, CallError, at, number
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare

SLOTS = 16
"""Tokens in a block: the number of lanes of a register."""
MOST_PLACES = 2**31


@dataclass
class PagedSpans:
    """Checked spans: each has its table within `tables`, and all block numbers are below `blocks`.
    rows: total number of rows of all spans."""

    tables: Tensor
    spans: Tensor
    blocks: int
    rows: int


def paged_spans(tables: Tensor, spans: Tensor) -> PagedSpans:
    """Checks spans. tables int32, one after the other; spans (count, 5) int64: the start of its
    table, blocks and tokens of its trained prefix, first token, last token + 1."""
    count, _ = spans.shape
    at(tables, INT32, size := tables.numel())
    at(spans, INT64, count, 5)
    rows = 0
    for begin, prefix_blocks, prefix_length, start, stop in spans.tolist():
        if (
            not 0 <= start < stop <= MOST_PLACES
            or not 0 <= prefix_length <= prefix_blocks * SLOTS <= MOST_PLACES
        ):
            raise CallError(
                f"a span from {start} to {stop} behind {prefix_length} places in"
                f" {prefix_blocks} blocks"
            )
        if not 0 <= begin <= size - prefix_blocks - -(-stop // SLOTS):
            raise CallError(
                f"a table from {begin} on of {prefix_blocks} blocks and {stop} places, {size} are"
                " given"
            )
        rows += stop - start
    blocks = 0
    if size:
        least, most = (int(extreme) for extreme in tables.aminmax())
        blocks = number(most, least := number(least)) + 1
    return PagedSpans(tables, spans, blocks, rows)


@declare(
    "veneer_paged_attention(*, T, level: int32 0..4)",
    f"""
    tables, spans: pointer
    q: T[rows@q_row, heads@q_head, size]
    k: T[rows@k_row, kv_heads@k_head, size]
    v: T[rows@v_row, kv_heads@v_head, value_size]
    keys: T[blocks, kv_heads, size / pair, {SLOTS}, pair] words 4
    values: T[blocks, kv_heads, {SLOTS} / pair, value_size, pair] words 4
    out: T[rows, heads, value_size]
    sinks: f32[heads]?
    q_row, q_head, k_row, k_head, v_row, v_head: 0..2**40
    count, heads
    kv_heads: 1..
    size, value_size: 1..
    window
    scale: float
    softcap: float
    kept checked: PagedSpans
    check group = heads / kv_heads
    check pair = T + 1
    body tables, spans, count, checked, window, softcap, span_rows, span_blocks
    check span_rows: 0..rows
    check span_blocks: 0..blocks
    """,
    fails=MemoryError("no memory for the attention of a step"),
)
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
) -> Values:
    """Writes k (N, K, D) and v (N, K, E) into the blocks `keys` and `values`, then computes
    attention of q (N, H, D) into out (N, H, E). Rows of no span stay as they are."""
    return {
        **_addresses(spans),
        "checked": spans,
        "window": 0 if window is None else number(window, 1),
        "softcap": softcap or 0.0,
        "span_rows": spans.rows,
        "span_blocks": spans.blocks,
    }


def _addresses(spans: PagedSpans) -> Values:
    return {
        "tables": spans.tables.data_ptr(),
        "spans": spans.spans.data_ptr(),
        "count": len(spans.spans),
    }


def point_at(struct: Any, spans: PagedSpans) -> None:
    """Replaces the spans of a recorded call by others of as many rows, in blocks that exist."""
    for name, value in _addresses(spans).items():
        setattr(struct, name, value)
    struct.kept = spans


def lie_in(struct: Any, keys: Tensor, values: Tensor, dtype: torch.dtype) -> None:
    """Replaces the blocks of a recorded call by others of the same type, heads and head sizes."""
    pair, blocks, heads = 2 if dtype is BF16 else 1, len(keys), struct.kv_heads
    struct.keys = at(keys, dtype, blocks, heads, struct.size // pair, SLOTS, pair, words=4)
    shape = blocks, heads, SLOTS // pair, struct.value_size, pair
    struct.values = at(values, dtype, *shape, words=4)
