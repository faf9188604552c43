"""GGUF blocks on CUDA, decoded in one kernel to the bits of packed/gguf.py and native/gguf/gguf.c.

    value = scale * code + offset     one rounding in float32, one more to the output type

Each lane decodes a value: from the value's place in its block it finds the byte, and the scale that
16 or 32 neighbours share. This kernel stays ours because the package gguf decodes on a CPU alone.
Layout of the blocks:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Shapes: N blocks, i the place of a
value in its block, `block` the address of its block.
"""

import triton
import triton.language as tl
from torch import Tensor

from veneer.kernels.cuda.triton_numbers import DeviceKernel, rounded

_VALUES = 1024

# ggml's numbers of the formats, as in gguf.FORMATS
_Q4_1 = tl.constexpr(3)
_Q5_0 = tl.constexpr(6)
_Q5_1 = tl.constexpr(7)
_Q8_0 = tl.constexpr(8)
_Q5_K = tl.constexpr(13)
_Q6_K = tl.constexpr(14)


@triton.jit
def _byte(block, at, inside):
    return tl.load(block + at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _half(block, at, inside):
    """Reads two bytes as fp16, in float32."""
    word = _byte(block, at, inside) | (_byte(block, at + 1, inside) << 8)
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _signed(byte):
    return (byte ^ 128) - 128


@triton.jit
def _no_offset(i):
    """Returns -0, an offset that keeps every bit, even the sign of a zero.

    It is made from its bits, because Triton 3.7 turns `-0.0` into 0.
    """
    return ((i & 0).to(tl.uint32) | 0x80000000).to(tl.float32, bitcast=True)


@triton.jit
def _of_32(block, i, inside, kind: tl.constexpr):
    """Reads code, scale and offset from blocks of 32 values."""
    scale, offset = _half(block, 0, inside), _no_offset(i)
    if kind == _Q8_0:
        code = _signed(_byte(block, 2 + i, inside))
    else:
        shifted: tl.constexpr = (kind == _Q4_1) | (kind == _Q5_1)
        five: tl.constexpr = (kind == _Q5_0) | (kind == _Q5_1)
        scales: tl.constexpr = 4 if shifted else 2
        nibbles: tl.constexpr = scales + 4 if five else scales
        code = (_byte(block, nibbles + i % 16, inside) >> (i // 16 * 4)) & 15
        if five:
            code |= ((_byte(block, scales + i // 8, inside) >> (i % 8)) & 1) << 4
        if shifted:
            offset = _half(block, 2, inside)
        else:
            code -= 16 if five else 8
    return code, scale, offset


@triton.jit
def _of_256(block, i, inside, kind: tl.constexpr):
    """Reads code, scale and offset from blocks of 256 values, whose scales are scaled too."""
    if kind == _Q6_K:
        half, at = i // 128, i % 128
        low = (_byte(block, half * 64 + at % 64, inside) >> (at // 64 * 4)) & 15
        high = (_byte(block, 128 + half * 32 + at % 32, inside) >> (at // 32 * 2)) & 3
        code, offset = (low | (high << 4)) - 32, _no_offset(i)
        scale = _signed(_byte(block, 192 + i // 16, inside)).to(tl.float32) * _half(
            block, 208, inside
        )
    else:
        group = i // 32
        nibbles: tl.constexpr = 48 if kind == _Q5_K else 16
        code = (_byte(block, nibbles + group // 2 * 32 + i % 32, inside) >> (group % 2 * 4)) & 15
        if kind == _Q5_K:
            code |= ((_byte(block, 16 + i % 32, inside) >> group) & 1) << 4
        # Twelve bytes of scales and minima; the low bits of the last four groups are in the last
        # four bytes.
        late = group >= 4
        low = _byte(block, 4 + group, inside)
        above = _byte(block, 8 + group, inside)
        first = _byte(block, tl.where(late, group, 4 + group), inside)
        inner = tl.where(late, (above & 15) | ((first >> 6) << 4), low & 63)
        least = tl.where(late, (above >> 4) | ((low >> 6) << 4), above & 63)
        scale = _half(block, 0, inside) * inner.to(tl.float32)
        # Triton computes -x as 0 - x, which loses the sign of a zero.
        offset = _half(block, 2, inside) * least.to(tl.float32) * -1.0
    return code, scale, offset


@DeviceKernel
@triton.jit
def _decode(
    blocks,
    out,
    count,
    kind: tl.constexpr,
    length: tl.constexpr,
    bytes_of: tl.constexpr,
    size: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = place < count
    block, i = blocks + place // length * bytes_of, (place % length).to(tl.int32)
    if length == 32:
        code, scale, offset = _of_32(block, i, inside, kind)
    else:
        code, scale, offset = _of_256(block, i, inside, kind)
    value = scale * code.to(tl.float32) + offset
    tl.store(out + place, rounded(value, out.dtype.element_ty), mask=inside)


def decode(blocks: Tensor, out: Tensor, number: int, length: int, bytes_of: int) -> Tensor:
    """Decodes blocks (N * bytes_of uint8) into out (N * length values), both contiguous.

    number: ggml's number of the format.
    """
    count = out.numel()
    _decode[(triton.cdiv(count, _VALUES),)](
        blocks,
        out,
        count,
        kind=number,
        length=length,
        bytes_of=bytes_of,
        size=_VALUES,
        enable_fp_fusion=False,
    )
    return out
