"""Dropout whose mask is computed from keys: it is never stored and does not depend on the batch.

A value is kept if hash(row key, column) reaches the threshold. The row key identifies a token by
the text up to it (data/batching.py); the seed, the step and the module change the hash too. So the
mask is the same packed or padded, with the prompt computed once or for every row, in any batch
order, in backward, under gradient checkpointing and after a resume.

The hash is two rounds of the 32-bit integer finaliser `lowbias32` (Wellons 2018,
https://nullprogram.com/blog/2018/07/31/) on 64-bit integers, which every device multiplies alike.
In plain torch that takes a dozen passes over 64-bit integers and costs more than the layer. On a
CPU it is one compiled pass (native/layers/dropout.c), on CUDA one in Triton
(cuda/triton_dropout.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.kernels.bindings import row_calls
from veneer.kernels.bindings.arguments import available
from veneer.kernels.bindings.library import on_cpu
from veneer.kernels.bindings.rank_calls import Mask
from veneer.kernels.cuda import launch

_MASK32 = 0xFFFFFFFF
_COMPILED = (torch.float32, torch.bfloat16)


def _mix(value: Tensor) -> Tensor:
    """Computes lowbias32 of the low 32 bits of int64 values."""
    value = value & _MASK32
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK32
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK32
    return value ^ (value >> 16)


def keep_mask(rows: Tensor, columns: int, *, key: int, dropout: float) -> Tensor:
    """Draws (N, columns) bool from row keys (N), True with probability 1 - dropout.

    `key` holds the seed, the step and the module.
    """
    row = _mix(rows + (key & _MASK32))
    column = _mix(torch.arange(columns, device=rows.device) * 0x85EBCA6B + (key >> 32 & _MASK32))
    return _mix(row[:, None] ^ column[None]) >= int(dropout * 2**32)


def drop_out(x: Tensor, rows: Tensor, *, key: int, dropout: float) -> Tensor:
    """Applies dropout: x (N, I), rows (N) row keys -> x / (1 - dropout) where keep_mask keeps, 0
    elsewhere.

    Returns a fresh tensor of x's type. It has no gradient: a node of the graph calls this again on
    the gradient. Raises ValueError unless every row has one key.
    """
    if rows.dtype != torch.int64 or rows.shape != x.shape[:1] or rows.device != x.device:
        raise ValueError(
            f"dropout needs one int64 key a row: {tuple(rows.shape)} keys, {tuple(x.shape)} values"
        )
    row_key, column_key = key & _MASK32, key >> 32 & _MASK32
    if (triton := launch.kernels_for("triton_dropout", x)) is not None and rows.is_contiguous():
        return triton.drop(x, rows, row_key, column_key, dropout)
    contiguous = x.is_contiguous() and rows.is_contiguous()
    compiled = x.dtype in _COMPILED and on_cpu(x) and contiguous and available("veneer_dropout")
    if not compiled:
        return drop_out_reference(x, rows, key=key, dropout=dropout)
    out = torch.empty_like(x)
    row_calls.dropout(x, out, rows, row_key=row_key, column_key=column_key, share=dropout)
    return out


def drop_out_reference(x: Tensor, rows: Tensor, *, key: int, dropout: float) -> Tensor:
    """Defines drop_out, under torch's own autograd."""
    keep = keep_mask(rows, x.shape[1], key=key, dropout=dropout)
    return torch.where(keep, x / (1 - dropout), 0)


@dataclass(frozen=True)
class Dropout:
    """Dropout of the inputs of A.

    rows   (M) row keys
    key    seed, step and module
    share  probability that a value is dropped
    """

    rows: Tensor
    key: int
    share: float

    def apply(self, x_MI: Tensor) -> Tensor:
        return drop_out(x_MI, self.rows, key=self.key, dropout=self.share)

    def mask(self) -> Mask:
        """Returns the mask in the form that products of a small rank take (rank.py)."""
        return self.rows, self.key & _MASK32, self.key >> 32 & _MASK32, self.share

    def apply_reference(self, x_MI: Tensor) -> Tensor:
        return drop_out_reference(x_MI, self.rows, key=self.key, dropout=self.share)
