"""Attention of single tokens over blocks of keys and values on CUDA (attention/paged_rows.py).

    _write   writes the keys and values of the rows into their blocks
    _part    for a row, a key/value head and PART places: float32 sums for the queries of that head
    _join    for a row and a query head: weighs the sums of all parts by their largest scores, and
             the sink

Places behind the end of a text, or before a window, are not read. These kernels stay ours because
no library knows this layout of blocks. After Dao et al. 2023, Flash-Decoding. Shapes: as in
attention/paged_rows.py; G = H / K, P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.cuda.triton_numbers import DeviceKernel, multiplied, rounded
from veneer.kernels.rules import AttentionRules

PART = 512
"""Places that a program reads; more if MOST_PARTS programs would not be enough for a text."""
MOST_PARTS = 64
_STEP_BYTES = 2**14
"""Bytes of keys, and of values, that are multiplied at once."""


@DeviceKernel
@triton.jit
def _write(
    keys,
    values,
    key,
    value,
    blocks,
    lengths,
    table_row,
    length_row,
    key_row,
    key_head,
    value_row,
    value_head,
    heads: tl.constexpr,
    slots: tl.constexpr,
    size: tl.constexpr,
    wide: tl.constexpr,
    most: tl.constexpr,
):
    row, head, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, most)
    last = tl.load(lengths + row * length_row) - 1
    block, slot = tl.load(blocks + row * table_row + last // slots) * heads + head, last % slots
    new_key = tl.load(key + row * key_row + head * key_head + d, mask=d < size)
    tl.store(keys + (block * size + d) * slots + slot, new_key, mask=d < size)
    new_value = tl.load(value + row * value_row + head * value_head + d, mask=d < wide)
    tl.store(values + (block * slots + slot) * wide + d, new_value, mask=d < wide)


@DeviceKernel
@triton.jit
def _part(
    query,
    keys,
    values,
    blocks,
    lengths,
    sums,
    scores,
    table_row,
    length_row,
    query_row,
    query_head,
    window,
    scale,
    cap,
    capped: tl.constexpr,
    heads: tl.constexpr,
    groups: tl.constexpr,
    slots: tl.constexpr,
    size: tl.constexpr,
    wide: tl.constexpr,
    most_groups: tl.constexpr,
    most_size: tl.constexpr,
    most_wide: tl.constexpr,
    part: tl.constexpr,
    step: tl.constexpr,
):
    row, head, number = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row * length_row)
    start = tl.maximum(length - window, 0)
    g, d, e = tl.arange(0, most_groups), tl.arange(0, most_size), tl.arange(0, most_wide)
    real = (g < groups)[:, None] & (d < size)[None, :]
    places = row * query_row + (head * groups + g)[:, None] * query_head + d[None, :]
    q = tl.load(query + places, mask=real, other=0.0)
    largest = tl.full((most_groups,), float("-inf"), tl.float32)
    total = tl.zeros((most_groups,), tl.float32)
    weighted = tl.zeros((most_groups, most_wide), tl.float32)
    first = tl.maximum(number * part, start // step * step)
    for at in range(first, tl.minimum(number * part + part, length), step):
        place = at + tl.arange(0, step)
        seen = (place < length) & (place >= start)
        block = (
            tl.load(blocks + row * table_row + place // slots, mask=seen, other=0) * heads + head
        )
        slot = place % slots
        k = tl.load(
            keys + (block[None, :] * size + d[:, None]) * slots + slot[None, :],
            mask=seen[None, :] & (d < size)[:, None],
            other=0.0,
        )
        score = multiplied(q, k, tl.zeros((most_groups, step), tl.float32)) * scale
        if capped:  # tanh(z) = 2 sigmoid(2 z) - 1
            score = cap * (2.0 * tl.sigmoid(2.0 * score / cap) - 1.0)
        score = tl.where(seen[None, :], score, float("-inf"))
        above = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp(score - above[:, None])
        shrink = tl.exp(largest - above)
        v = tl.load(
            values + (block[:, None] * slots + slot[:, None]) * wide + e[None, :],
            mask=seen[:, None] & (e < wide)[None, :],
            other=0.0,
        )
        weighted = multiplied(rounded(weight, v.dtype), v, weighted * shrink[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        largest = above
    there = (number.to(tl.int64) * tl.num_programs(0) + row) * heads * groups + head * groups + g
    tl.store(
        sums + there[:, None] * wide + e[None, :],
        weighted,
        mask=(g < groups)[:, None] & (e < wide)[None, :],
    )
    tl.store(scores + 2 * there, largest, mask=g < groups)
    tl.store(scores + 2 * there + 1, total, mask=g < groups)


@DeviceKernel
@triton.jit
def _join(
    sums,
    scores,
    sinks,
    out,
    sunk: tl.constexpr,
    heads: tl.constexpr,
    wide: tl.constexpr,
    most_wide: tl.constexpr,
    parts: tl.constexpr,
    most_parts: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, e = tl.arange(0, most_parts), tl.arange(0, most_wide)
    there = (p.to(tl.int64) * tl.num_programs(0) + row) * heads + head
    largest = tl.load(scores + 2 * there, mask=p < parts, other=float("-inf"))
    total = tl.load(scores + 2 * there + 1, mask=p < parts, other=0.0)
    above = tl.max(largest, axis=0)
    if sunk:
        sink = tl.load(sinks + head).to(tl.float32)
        above = tl.maximum(above, sink)
    weight = tl.exp(largest - above)
    mass = tl.sum(total * weight, axis=0)
    if sunk:
        mass += tl.exp(sink - above)
    parts_sums = tl.load(
        sums + there[:, None] * wide + e[None, :],
        mask=(p < parts)[:, None] & (e < wide)[None, :],
        other=0.0,
    )
    result = rounded(tl.sum(parts_sums * weight[:, None], axis=0) / mass, out.dtype.element_ty)
    tl.store(out + (row * heads + head) * wide + e, result, mask=e < wide)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    lengths: Tensor,
    rules: AttentionRules,
) -> Tensor:
    """Writes key and value into the blocks and attends: (N, H, E).

    query, key, value  (N, H, D), (N, K, D), (N, K, E); the values of a head are contiguous
    keys, values       (blocks, K, D, S, 1), (blocks, K, S, E, 1)
    blocks, lengths    (N, B), (N)
    """
    (N, H, D), (K, E), S = query.shape, value.shape[1:], keys.shape[3]
    tables, strides = (blocks, lengths), (blocks.stride(0), lengths.stride(0))
    size, wide = (max(16, triton.next_power_of_2(width)) for width in (D, E))
    shape = {"heads": K, "slots": S, "size": D, "wide": E}
    written = (*strides, *key.stride()[:2], *value.stride()[:2])
    _write[(N, K)](keys, values, key, value, *tables, *written, most=max(size, wide), **shape)
    places = blocks.shape[1] * S
    part = max(PART, triton.next_power_of_2(places) // MOST_PARTS)
    parts = triton.cdiv(places, part)
    sums = torch.empty(parts, N, H, E, dtype=torch.float32, device=query.device)
    scores = torch.empty(parts, N, H, 2, dtype=torch.float32, device=query.device)
    _part[(N, K, parts)](
        query,
        keys,
        values,
        *tables,
        sums,
        scores,
        *strides,
        *query.stride()[:2],
        2**30 if rules.window is None else rules.window,
        rules.scale,
        1.0 if rules.softcap is None else rules.softcap,
        capped=rules.softcap is not None,
        groups=H // K,
        most_groups=max(16, triton.next_power_of_2(H // K)),
        most_size=size,
        most_wide=wide,
        part=part,
        step=max(16, min(64, _STEP_BYTES // (max(size, wide) * keys.itemsize))),
        enable_fp_fusion=False,
        **shape,
    )
    out = torch.empty(N, H, E, dtype=query.dtype, device=query.device)
    sinks = scores if rules.sinks is None else rules.sinks
    _join[(N, H)](
        sums,
        scores,
        sinks,
        out,
        sunk=rules.sinks is not None,
        heads=H,
        wide=E,
        most_wide=wide,
        parts=parts,
        most_parts=triton.next_power_of_2(parts),
        enable_fp_fusion=False,
    )
    return out
