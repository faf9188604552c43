"""GGUF blocks: decoded, and multiplied with a few rows of x; compiled and in plain torch.

    value = scale * code + offset     16 or 32 neighbours of a row share scale and offset

A row of I values is I / size blocks, so rows are separate and can be moved as bytes. Both paths
give the same bits: the product of a scale and a code is exact in float32, the sum is rounded once,
and once more to the output type. Shapes: M rows of x, I in_features, O out_features.
Layout of the blocks: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from veneer.kernels.bindings import packed_calls
from veneer.kernels.bindings.arguments import available
from veneer.kernels.cuda import launch
from veneer.kernels.dense import few_rows

Kind = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


@dataclass(frozen=True)
class BlockFormat:
    """A format of blocks.

    number  ggml's number of the type
    size    values of a block
    bytes   bytes of a block
    scales  byte offsets of its fp16 scales
    """

    number: int
    size: int
    bytes: int
    scales: tuple[int, ...] = (0,)


FORMATS: dict[Kind, BlockFormat] = {
    "Q4_0": BlockFormat(2, 32, 18),
    "Q4_1": BlockFormat(3, 32, 20, (0, 2)),
    "Q5_0": BlockFormat(6, 32, 22),
    "Q5_1": BlockFormat(7, 32, 24, (0, 2)),
    "Q8_0": BlockFormat(8, 32, 34),
    "Q4_K": BlockFormat(12, 256, 144, (0, 2)),
    "Q5_K": BlockFormat(13, 256, 176, (0, 2)),
    "Q6_K": BlockFormat(14, 256, 210, (208,)),
}

MAX_ROWS = 64
"""Up to so many rows of x a product straight from the blocks is faster than decoding them first."""
PRODUCTS = (torch.float32, torch.bfloat16)


def in_features(blocks: Tensor, kind: Kind) -> int:
    return blocks.shape[1] // FORMATS[kind].bytes * FORMATS[kind].size


def dequantise(
    blocks: Tensor, kind: Kind, out: Tensor, *, most: int = few_rows.ANY_LEVEL
) -> Tensor:
    """Decodes blocks uint8 (O, bytes of a row) into out (O, I), contiguous; returns it."""
    layout = FORMATS[kind]
    if (triton := launch.kernels_for("triton_gguf", out)) is not None and blocks.is_contiguous():
        return triton.decode(blocks, out, layout.number, layout.size, layout.bytes)
    if blocks.device.type != "cpu" or not is_compiled():
        return out.copy_(dequantise_reference(blocks, kind))
    packed_calls.gguf_dequantise(layout.number, blocks, out, min(most, 3))
    return out


def has_product(x_MI: Tensor, bias: Tensor | None) -> bool:
    """True if `product` is the fast path for x: few rows, on the CPU, with the compiled kernel."""
    fits = all(
        t.device.type == "cpu" and t.dtype is x_MI.dtype for t in (x_MI, bias) if t is not None
    )
    return fits and x_MI.dtype in PRODUCTS and few_rows.takes(len(x_MI), MAX_ROWS) and is_compiled()


def product(
    x_MI: Tensor,
    blocks: Tensor,
    kind: Kind,
    bias: Tensor | None = None,
    *,
    most: int = few_rows.ANY_LEVEL,
) -> Tensor:
    """Returns x W^T + bias (M, O) in x's type; W is read once, as blocks, and never written out.

    The weights are those that `dequantise` gives in x's type. For a bfloat16 x, on AMX tiles or
    with bf16 instructions, they are those of `dequantise_reference`: x is multiplied with whole
    numbers, and scale and offset are applied to the float32 sums.
    """
    x_MI = x_MI.contiguous()
    y_MO = torch.empty(len(x_MI), len(blocks), dtype=x_MI.dtype)
    packed_calls.gguf_rows(FORMATS[kind].number, blocks, x_MI, y_MO, bias, most)
    return y_MO


def first_bad_block(blocks: Tensor, kind: Kind) -> tuple[int, int] | None:
    """Returns (row, block) of the first scale that is not finite, or None."""
    layout = FORMATS[kind]
    by_block = blocks.view(len(blocks), -1, layout.bytes)
    for at in layout.scales:
        bad = ~torch.isfinite(_half(by_block[..., at : at + 2])).squeeze(-1)
        if bad.any():
            row, block = bad.nonzero()[0].tolist()
            return row, block
    return None


def is_compiled() -> bool:
    return available("veneer_gguf_dequantise")


def dequantise_reference(blocks: Tensor, kind: Kind) -> Tensor:
    """Defines `dequantise`: float32 (O, I) in plain torch, on any device."""
    layout = FORMATS[kind]
    codes, scale, offset = _UNPACK[kind](blocks.reshape(-1, layout.bytes))
    values = codes.view(len(codes), scale.shape[1], -1) * scale.unsqueeze(-1)
    if offset is not None:
        values = values + offset.unsqueeze(-1)
    return values.view(len(blocks), -1)


Unpacked = tuple[Tensor, Tensor, Tensor | None]
"""float32 codes (N, size), scale (N, groups) and offset (N, groups) or None of N blocks."""


def _half(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).to(torch.float32)


def _nibbles(packed: Tensor) -> Tensor:
    """Returns the low halves of all bytes, then the high halves."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _four_bits(b: Tensor) -> Unpacked:
    return _nibbles(b[:, 2:]).float() - 8, _half(b[:, :2]), None


def _four_bits_offset(b: Tensor) -> Unpacked:
    return _nibbles(b[:, 4:]).float(), _half(b[:, :2]), _half(b[:, 2:4])


def _fifth_bit(four_bytes: Tensor) -> Tensor:
    """Spreads the bits of little-endian words, each shifted to bit 4: (N, 4) -> (N, 32)."""
    places = torch.arange(8, dtype=torch.uint8, device=four_bytes.device)
    return ((four_bytes.unsqueeze(-1) >> places) & 1).flatten(1) << 4


def _five_bits(b: Tensor) -> Unpacked:
    return (_nibbles(b[:, 6:]) | _fifth_bit(b[:, 2:6])).float() - 16, _half(b[:, :2]), None


def _five_bits_offset(b: Tensor) -> Unpacked:
    return (_nibbles(b[:, 8:]) | _fifth_bit(b[:, 4:8])).float(), _half(b[:, :2]), _half(b[:, 2:4])


def _eight_bits(b: Tensor) -> Unpacked:
    return b[:, 2:].view(torch.int8).float(), _half(b[:, :2]), None


def _six_bit_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """Decodes eight scales and eight minima of 6 bits each from (N, 12)."""
    low, high, rest = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = torch.cat([low & 63, (rest & 15) | (low >> 6) << 4], dim=1)
    return scales.float(), torch.cat([high & 63, (rest >> 4) | (high >> 6) << 4], dim=1).float()


def _k_offsets(b: Tensor) -> tuple[Tensor, Tensor]:
    scales, minima = _six_bit_scales(b[:, 4:16])
    return _half(b[:, :2]) * scales, -(_half(b[:, 2:4]) * minima)


def _four_bits_k(b: Tensor) -> Unpacked:
    return _nibbles(b[:, 16:].reshape(-1, 4, 32)).flatten(1).float(), *_k_offsets(b)


def _five_bits_k(b: Tensor) -> Unpacked:
    low = _nibbles(b[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    places = torch.arange(8, dtype=torch.uint8, device=b.device).unsqueeze(-1)
    return (low | ((b[:, None, 16:48] >> places) & 1) << 4).flatten(1).float(), *_k_offsets(b)


def _six_bits_k(b: Tensor) -> Unpacked:
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=b.device).unsqueeze(-1)
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> places) & 3
    scales = b[:, 192:208].contiguous().view(torch.int8).float() * _half(b[:, 208:])
    return (low | high << 4).flatten(1).float() - 32, scales, None


_UNPACK: dict[Kind, Callable[[Tensor], Unpacked]] = {
    "Q4_0": _four_bits,
    "Q4_1": _four_bits_offset,
    "Q5_0": _five_bits,
    "Q5_1": _five_bits_offset,
    "Q8_0": _eight_bits,
    "Q4_K": _four_bits_k,
    "Q5_K": _five_bits_k,
    "Q6_K": _six_bits_k,
}
