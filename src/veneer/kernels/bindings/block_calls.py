"""The calls into the kernels between the large products of a decoder layer that trains
(native/layers/block.c).

Values are bf16, factors float32 or bf16. Shapes: M rows, D width, R ranks side by side, H heads of
E.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from veneer.kernels.bindings.arguments import BF16, FP32, CallError, at, number
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare, declare_structure, structure
from veneer.kernels.bindings.rank_calls import (
    MOST,
    MOST_STRIDE,
    PAIR_BYTES,
    DropoutMask,
    Mask,
    mask_fields,
)

_SIDE = """
    factors: pointer*3
    ranks: int*3
    count
    across: flag
    half
    masks: Mask*3
    narrow: bf16[rows@apart, rank] words 4
    apart: rank..2**27
    scale: float
    pairs: unused
    parts = 0
    sizes, starts: unused*3
    check rank: 16..256
    body factors, ranks, count, half, masks, scale
"""
_Side = structure("Side", _SIDE, Mask=DropoutMask)


class Side(NamedTuple):
    """The updates of layers of one input or of one output, side by side, on their way to or from
    the wide side.

    factors: A (R, D) of each, or B (D, R); narrow (M, R) is read or written. masks: one for each
    factor, all of one share, through which it sees the wide side; none: all see it whole.
    """

    factors: Sequence[Tensor]
    narrow: Tensor
    scale: float = 1.0
    masks: Sequence[Mask] = ()


def _side(side: Side | None, wide: Tensor, *, across: bool, of_A: bool) -> Any:
    """Checks a side of rows of `wide` (M, D). of_A: factors are A (R, D), else B (D, R). Without
    factors nothing is read or written."""
    rows, width = wide.shape
    if side is None or (not side[0] and side[1].shape == (rows, 0)):
        return ()
    factors, narrow, scale, masks = side
    ranks = tuple(factor.shape[0 if of_A else 1] for factor in factors)
    if not 0 < len(ranks) <= MOST or any(rank % 16 or rank < 16 for rank in ranks):
        raise CallError(f"ranks {ranks} where C takes up to {MOST} multiples of 16")
    if (dtype := factors[0].dtype) not in (FP32, BF16):
        raise CallError(f"a factor of {dtype} where C takes float32 or bf16")
    if masks and (len(masks) != len(ranks) or len({share for *_, share in masks}) > 1):
        raise CallError(
            f"{len(masks)} masks of {len(ranks)} factors where C takes one of each, of one share"
        )
    shapes = [(rank, width) if of_A else (width, rank) for rank in ranks]
    addresses = [
        at(factor, dtype, *shape, words=PAIR_BYTES)
        for factor, shape in zip(factors, shapes, strict=True)
    ]
    values = {
        "factors": tuple(addresses),
        "ranks": ranks,
        "count": len(ranks),
        "half": dtype is BF16,
        "masks": tuple(mask_fields(mask, rows) for mask in masks),
        "scale": scale / (1 - masks[0][3]) if masks else scale,
    }
    return _filled_side(narrow, rows, sum(ranks), across, values)


@declare_structure(_Side, _SIDE)
def _filled_side(narrow: Tensor, rows: int, rank: int, across: bool, values: Values) -> Values:
    """values: the fields that _side has checked."""
    return values


_SIZES = "rows: 0..2**27; width: 16..2**27 % 16"


@declare(
    "veneer_block_norm_forward(*)",
    f"""
    x: bf16[rows, width] words 4
    beside: bf16[rows, width]?
    weight: bf16[width]?
    normed: unused
    out: bf16[rows, width]? words 4
    scale: f32[rows]?
    before, behind: Side
    {_SIZES}
    epsilon: float
    body before, behind
    """,
    Side=_Side,
)
def norm_forward(
    x: Tensor,
    *,
    before: Side | None = None,
    beside: Tensor | None = None,
    weight: Tensor | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    epsilon: float = 0.0,
    behind: Side | None = None,
) -> Values:
    """x (M, D) += the update of `before` (B of one layer), += beside (M, D): in place, each where
    it is given. Then out (M, D) = weight (D) * x * scale, scale (M) float32 = 1 / root mean square,
    and of out the first products of `behind` (A of each); without a weight none of these."""
    missing = {value is None for value in (weight, out, scale)}
    if len(missing) > 1 or (weight is None and behind is not None):
        raise CallError("a part of a norm")
    return {
        "before": _side(before, x, across=True, of_A=False),
        "behind": _side(behind, x, across=True, of_A=True),
    }


@declare(
    "veneer_block_norm_backward(*)",
    f"""
    x: bf16[rows, width] words 4
    beside: bf16[rows, width]
    weight: bf16[width]
    normed, out: bf16[rows, width]
    scale: f32[rows]
    before, behind: Side
    {_SIZES}
    epsilon = 0: float
    body x, out, before, behind
    """,
    Side=_Side,
)
def norm_backward(
    grad: Tensor,
    normed: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    before: Side,
    beside: Tensor,
    behind: Side | None = None,
) -> Values:
    """grad (M, D) of what the norm gave, += the update of `before` (A of each layer), becomes that
    of normed (M, D) + beside (M, D), in place; of it the first product of `behind` (B of one
    layer)."""
    return {
        "x": grad,
        "out": grad,
        "before": _side(before, grad, across=False, of_A=True),
        "behind": _side(behind, grad, across=False, of_A=False),
    }


@declare(
    "veneer_block_gate_forward(*)",
    f"""
    gate, up: bf16[rows, width]
    out: bf16[rows, width] words 4
    grad_up: unused
    sides: Side*3
    {_SIZES}
    body sides
    """,
    Side=_Side,
)
def gate_forward(
    gate: Tensor, up: Tensor, out: Tensor, of_gate: Side, of_up: Side, behind: Side
) -> Values:
    """gate and up (M, D) += their updates (B of one layer each), in place; out (M, D) = silu(gate)
    * up, and of it the first product of `behind` (A of one layer)."""
    updates = [_side(side, gate, across=True, of_A=False) for side in (of_gate, of_up)]
    return {"sides": (*updates, _side(behind, gate, across=True, of_A=True))}


@declare(
    "veneer_block_gate_backward(*)",
    f"""
    gate, up: bf16[rows, width]
    out, grad_up: bf16[rows, width] words 4
    sides: Side*3
    {_SIZES}
    body out, sides
    """,
    Side=_Side,
)
def gate_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    grad_up: Tensor,
    *,
    before: Side,
    of_gate: Side,
    of_up: Side,
) -> Values:
    """grad (M, D) of silu(gate) * up, += the update of `before` (A of one layer), becomes that of
    gate, in place; grad_up (M, D); of both the first products (B of one layer each)."""
    products = [_side(side, gate, across=False, of_A=False) for side in (of_gate, of_up)]
    return {"out": grad, "sides": (*products, _side(before, gate, across=False, of_A=True))}


@declare(
    "veneer_block_heads(*)",
    """
    x: pointer*3
    heads: int*3
    sides: Side*3
    cos, sin: bf16[rows, size]
    rows: 0..2**27
    size: 32..2**27 % 32
    back: flag
    body x, heads, sides
    """,
    Side=_Side,
)
def heads(
    x: Sequence[Tensor], cos: Tensor, sin: Tensor, sides: Sequence[Side], *, back: bool
) -> Values:
    """q, k and v (M, H E), E a multiple of 32, in place: each += its update (B of one layer), then
    q and k turned by cos and sin (M, E). back: q and k turned back, then each one's first product
    (B again)."""
    if len(x) != MOST or len(sides) != MOST:
        raise CallError(f"{len(x)} of {len(sides)} sides where C takes q, k and v")
    rows, size = cos.shape
    widths = [number(tensor.shape[1], number(size, 1), MOST_STRIDE) for tensor in x]
    if any(width % size for width in widths):
        raise CallError(f"{widths} columns where C takes whole heads of {size}")
    addresses = [
        at(tensor, BF16, rows, width, words=PAIR_BYTES)
        for tensor, width in zip(x, widths, strict=True)
    ]
    updates = zip(sides, x, strict=True)
    return {
        "x": tuple(addresses),
        "heads": tuple(width // size for width in widths),
        "sides": tuple(_side(side, wide, across=not back, of_A=False) for side, wide in updates),
    }
