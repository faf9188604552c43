"""Dropout whose mask is computed from keys, so that it is never stored and never depends on the batch.

A value is kept if hash(row key, column) is above the threshold. The row key names the document, the position
in it, the step and the module, so the mask is the same packed or padded, in any batch order, in backward, under
gradient checkpointing, and after a resume. Two rounds of the 32-bit integer finaliser `lowbias32`
(Wellons 2018, https://nullprogram.com/blog/2018/07/31/) on 64-bit integers, which every device multiplies alike.
"""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _mix(value: Tensor) -> Tensor:
    """lowbias32 of the low 32 bits of int64 values."""
    value = value & _MASK32
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK32
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK32
    return value ^ (value >> 16)


def row_keys(documents: Tensor, positions: Tensor) -> Tensor:
    """(N) int64 document keys and positions -> (N) int64 keys below 2**32."""
    return _mix(_mix(documents ^ (documents >> 32)) + positions * 0x9E3779B1)


def keep_mask(rows: Tensor, columns: int, *, key: int, dropout: float) -> Tensor:
    """(N) row keys -> (N, columns) bool, True with probability 1 - dropout. `key`: step and module."""
    row = _mix(rows + (key & _MASK32))
    column = _mix(torch.arange(columns, device=rows.device) * 0x85EBCA6B + (key >> 32 & _MASK32))
    return _mix(row[:, None] ^ column[None]) >= int(dropout * 2**32)
