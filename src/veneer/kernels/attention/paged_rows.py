"""Attention of single tokens over keys and values in blocks whose tables lie on the device.

What changes from token to token (lengths, tables) is read there, and no shape depends on it, so a
step that calls this can be captured as a graph once and replayed (execution/cuda_graphs.py). In
Triton on CUDA (cuda/triton_paged.py), which reads no block behind a text's end; elsewhere, and for
the meaning, plain torch, which reads all that the tables have room for.

Shapes: N rows, one token of a sequence each, B blocks that a table has room for, S slots of a
block, K key/value heads, H query heads, D and E head sizes of keys and of values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels.attention.paged import KeyValueBlocks, attend_wide
from veneer.kernels.cuda import launch
from veneer.kernels.rules import AttentionRules

MOST_SIZE = 256
"""D and E in Triton: a head's values stay in one program."""


@dataclass(frozen=True)
class BlockTables:
    """blocks (N, B) int64, whatever behind those that a text has; lengths (N) int64: tokens of each
    text with the one that is computed, at least 1. A row's blocks lie side by side."""

    blocks: Tensor
    lengths: Tensor


def paged_rows(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    stored: KeyValueBlocks,
    tables: BlockTables,
    rules: AttentionRules,
) -> Tensor:
    """Write the rows' keys and values, and attend: (N, H, E)."""
    triton = launch.kernels_for("triton_paged", stored.keys, stored.values)
    sizes = query_NHD.shape[2], value_NKD.shape[2]
    if triton is None or query_NHD.dtype is not stored.keys.dtype or max(sizes) > MOST_SIZE:
        return paged_rows_reference(query_NHD, key_NKD, value_NKD, stored, tables, rules)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (query_NHD, key_NKD, value_NKD))
    found: Tensor = triton.attend(
        q, k, v, stored.keys, stored.values, tables.blocks, tables.lengths, rules
    )
    return found


def paged_rows_reference(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    stored: KeyValueBlocks,
    tables: BlockTables,
    rules: AttentionRules,
) -> Tensor:
    """The same in torch: the meaning of paged_rows."""
    S, lengths = stored.slots, tables.lengths
    last = lengths - 1
    own = tables.blocks.gather(1, (last // S)[:, None])[:, 0] * S + last % S
    stored.write(own, key_NKD, value_NKD)
    place = torch.arange(tables.blocks.shape[1] * S, device=query_NHD.device)
    hidden = place[None] >= lengths[:, None]
    blocks = tables.blocks.index_select(1, place // S)
    key, value = stored.read(torch.where(hidden, 0, blocks) * S + place % S)
    value = value.masked_fill(hidden[:, :, None, None], 0)  # of another text, perhaps no numbers
    if rules.window is not None:
        hidden = hidden | (place < lengths[:, None] - rules.window)
    return attend_wide(query_NHD[:, None], key, value, hidden[:, None], rules)[:, 0]
