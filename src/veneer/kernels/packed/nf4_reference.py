"""4-bit weights in plain torch: defines the fast paths of nf4.py and runs where there are none.

Element i of the flat weight is nibble i of `packed`, for even i the high half of byte i // 2. It is
looked up in a table of 16 values and multiplied by the scale of block i // block, in float32, and
rounded once to the output type.
"""

import torch
from torch import Tensor

SMALLEST = 1e-38
"""Blocks of smaller values read back as zero: its reciprocal is the largest finite one."""


def scales_of(scales: Tensor, nested: tuple[Tensor, Tensor, int, float] | None) -> Tensor:
    """Returns the scales in float32.

    nested: (table (256), outer scales, block, offset), by which uint8 scales are decoded.
    """
    if nested is None:
        return scales
    table, outer, block, offset = nested
    spread = outer.repeat_interleave(block)[: scales.numel()]
    return table[scales.int()] * spread + offset


def quantize(
    values: Tensor, thresholds: Tensor, codes: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Returns (packed uint8 (ceil(n / 2)), absmax float32 (blocks)) of a tensor with n elements.

    thresholds: (15), ascending. codes: (16), the 4-bit code by the number of thresholds strictly
    below. As in bitsandbytes, a whole block is multiplied by the reciprocal of its absmax; a short
    last block is divided, by no less than 1e-38.
    """
    flat = values.detach().reshape(-1).float()
    n = flat.numel()
    whole = n // block * block
    blocks = flat[:whole].view(-1, block)
    absmax = blocks.abs().amax(1) if whole else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST)).unsqueeze(1)).clamp(-1, 1).view(-1)
    if whole < n:
        last = flat[whole:].abs().max().clamp(min=SMALLEST)
        absmax = torch.cat([absmax, last.view(1)])
        scaled = torch.cat([scaled, (flat[whole:] / last).clamp(-1, 1)])
    if n % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    code = codes[torch.bucketize(scaled, thresholds)].to(torch.uint8)
    return (code[::2] << 4) | code[1::2], absmax


def dequantize(
    packed: Tensor,
    scales: Tensor,
    table: Tensor,
    block: int,
    *,
    start: int,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decodes `count` elements of the flat weight from `start` on; scales are float32."""
    first, last = start // 2, (start + count + 1) // 2
    part = packed[first:last]
    nibbles = torch.stack([part >> 4, part & 15], dim=1).view(-1)[start - 2 * first :][:count]
    numbers = torch.arange(start, start + count, device=packed.device) // block
    return (table[nibbles.int()] * scales[numbers]).to(dtype)
