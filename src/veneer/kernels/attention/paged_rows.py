"""Attention of single tokens over keys and values in blocks, with block tables on the device.

Lengths and tables change from token to token. They are read on the device and no shape depends on
them, so a step that calls this can be captured as a CUDA graph once and replayed
(execution/cuda_graphs.py). On CUDA a kernel in Triton computes it (cuda/triton_paged.py) and reads
no block behind the end of a text. Plain torch defines the result and reads all blocks that the
tables have room for.

Shapes: N rows, one token of a sequence each, B blocks that a table has room for, S slots of a
block, K key/value heads, H query heads, D and E head sizes of keys and of values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels.attention.paged import KeyValueBlocks, attend_wide
from veneer.kernels.cuda import launch
from veneer.kernels.rules import AttentionRules

MAX_SIZE = 256
"""Largest D and E in Triton, where one program holds a head's values."""


@dataclass(frozen=True)
class BlockTables:
    """The blocks and the length of each row's text.

    blocks   (N, B) int64; entries behind those of a text may hold anything
    lengths  (N) int64: tokens of each text including the one that is computed, at least 1
    """

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
    """Writes the keys and values of the rows and attends: (N, H, E)."""
    triton = launch.kernels_for("triton_paged", stored.keys, stored.values)
    sizes = query_NHD.shape[2], value_NKD.shape[2]
    if triton is None or query_NHD.dtype is not stored.keys.dtype or max(sizes) > MAX_SIZE:
        return paged_rows_reference(query_NHD, key_NKD, value_NKD, stored, tables, rules)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (query_NHD, key_NKD, value_NKD))
    return triton.attend(q, k, v, stored.keys, stored.values, tables.blocks, tables.lengths, rules)


def paged_rows_reference(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    stored: KeyValueBlocks,
    tables: BlockTables,
    rules: AttentionRules,
) -> Tensor:
    """Defines paged_rows, in plain torch."""
    S, lengths = stored.slots, tables.lengths
    last = lengths - 1
    own = tables.blocks.gather(1, (last // S)[:, None])[:, 0] * S + last % S
    stored.write(own, key_NKD, value_NKD)
    place = torch.arange(tables.blocks.shape[1] * S, device=query_NHD.device)
    hidden = place[None] >= lengths[:, None]
    blocks = tables.blocks.index_select(1, place // S)
    key, value = stored.read(torch.where(hidden, 0, blocks) * S + place % S)
    # A place of another text may hold values that are not finite.
    value = value.masked_fill(hidden[:, :, None, None], 0)
    if rules.window is not None:
        hidden = hidden | (place < lengths[:, None] - rules.window)
    return attend_wide(query_NHD[:, None], key, value, hidden[:, None], rules)[:, 0]
