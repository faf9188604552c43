"""NF4 and FP4 on CUDA by bitsandbytes: weights decoded, and multiplied with a few rows of x.

bitsandbytes packs weights as we do: the first value of a pair in the high half of a byte, one
float32 scale a block, or an 8-bit scale with an outer scale for 256 of them and one offset. Decoded
values have the bits of packed/nf4_reference.py. Its product rounds weights in an order of its own.

It knows two tables of 16 values, and reads from the beginning of a block on. Other tables (MXFP4)
and other starts are left to triton_nf4.py. Tried with bitsandbytes 0.50.2.
"""

import math
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional
from torch import Tensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256


def can_read(weights: Any, start: int) -> bool:
    """True if bitsandbytes reads these NF4Blocks from element `start` on."""
    block, nested = weights.block, weights.nested
    if weights.book is None or block not in BLOCK_SIZES or start % block:
        return False
    return nested is None or (nested.block == NESTED_BLOCK and not start // block % NESTED_BLOCK)


def can_multiply(weights: Any, width: int, start: int) -> bool:
    """True if bitsandbytes multiplies rows of `width` values: no block straddles two rows."""
    return can_read(weights, start) and not width % weights.block


def quant_state(
    weights: Any, shape: tuple[int, ...], dtype: torch.dtype, start: int
) -> tuple[Tensor, functional.QuantState]:
    """Returns the bytes of the elements from `start` on, and the state that describes them."""
    count, block, nested = math.prod(shape), weights.block, weights.nested
    first, last = start // block, -(-(start + count) // block)
    outer = None
    if nested is not None:
        outer = functional.QuantState(
            absmax=nested.scales[first // NESTED_BLOCK : -(-last // NESTED_BLOCK)],
            code=nested.table,
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    state = functional.QuantState(
        absmax=weights.scales[first:last],
        shape=torch.Size(shape),
        code=weights.table,
        blocksize=block,
        quant_type=weights.book,
        dtype=dtype,
        offset=None if nested is None else nested.offset_tensor,
        state2=outer,
    )
    return weights.packed[start // 2 : (start + count + 1) // 2].view(-1, 1), state


def dequantize(weights: Any, out: Tensor, *, start: int) -> Tensor:
    """Computes nf4.dequantize into a contiguous `out` on the weights' device."""
    if not out.is_meta:
        packed, state = quant_state(weights, tuple(out.shape), out.dtype, start)
        functional.dequantize_4bit(packed, state, out=out)
    return out


def product(weights: Any, x: Tensor, outs: int, *, start: int) -> Tensor:
    """Computes nf4.product: x (M, I) -> (M, outs)."""
    packed, state = quant_state(weights, (outs, x.shape[1]), x.dtype, start)
    return bitsandbytes.matmul_4bit(x, packed, state)
