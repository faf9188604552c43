"""The calls into the kernels between the large products of a decoder layer that trains
(native/layers/block.c).

Each function states the shapes that C takes for granted; arguments.py refuses everything else.
Values are bf16, factors float32 or bf16. Shapes: M rows, D width, R ranks side by side, H heads of
E.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from veneer.kernels.bindings.arguments import (
    BF16,
    FP32,
    CallError,
    at,
    call,
    number,
    numbers,
    pointers,
    reachable,
)
from veneer.kernels.bindings.calls import (
    MOST,
    MOST_RANK,
    MOST_STRIDE,
    PAIR_BYTES,
    DropoutMask,
    Mask,
    masked,
)


class _Side(ctypes.Structure):
    _fields_ = [
        ("factors", ctypes.c_void_p * MOST),
        ("ranks", ctypes.c_int64 * MOST),
        *numbers("count across half"),
        ("masks", DropoutMask * MOST),
        *pointers("narrow"),
        *numbers("apart"),
        ("scale", ctypes.c_float),
        *pointers("pairs"),
        *numbers("parts"),
        ("sizes", ctypes.c_int64 * MOST),
        ("starts", ctypes.c_int64 * MOST),
    ]


class _Norms(ctypes.Structure):
    _fields_ = [
        *pointers("x beside weight normed out scale"),
        ("before", _Side),
        ("behind", _Side),
        *numbers("rows width"),
        ("epsilon", ctypes.c_float),
    ]


class _Gates(ctypes.Structure):
    _fields_ = [*pointers("gate up out grad_up"), ("sides", _Side * 3), *numbers("rows width")]


class _Heads(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p * MOST),
        ("heads", ctypes.c_int64 * MOST),
        ("sides", _Side * MOST),
        *pointers("cos sin"),
        *numbers("rows size back"),
    ]


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


def _side(given: Any, side: Side, rows: int, width: int, *, across: bool, wide_first: bool) -> None:
    """wide_first: factors are B (D, R); else A (R, D). Without factors nothing is read, nor
    written."""
    factors, narrow, scale, masks = side
    if not factors and narrow.shape == (rows, 0):
        return
    ranks = [each.shape[int(wide_first)] for each in factors]
    apart, inner = narrow.stride()
    if narrow.shape != (rows, sum(ranks)) or narrow.dtype is not BF16 or not reachable(narrow):
        raise CallError(
            f"{tuple(narrow.shape)} {narrow.dtype} where C takes {(rows, sum(ranks))} bf16"
        )
    if inner != 1 or apart % 2 or narrow.data_ptr() % PAIR_BYTES:
        raise CallError(f"steps of {narrow.stride()} where C takes pairs of neighbours")
    if (
        not 0 < len(ranks) <= MOST
        or not 0 < sum(ranks) <= MOST_RANK
        or any(r % 16 or r < 16 for r in ranks)
    ):
        raise CallError(f"ranks {ranks} where C takes up to {MOST} multiples of 16")
    if (first := factors[0]).dtype is not FP32 and first.dtype is not BF16:
        raise CallError(f"a factor of {first.dtype} where C takes float32 or bf16")
    for place, (factor, rank) in enumerate(zip(factors, ranks, strict=True)):
        shape = (width, rank) if wide_first else (rank, width)
        given.factors[place], given.ranks[place] = (
            at(factor, first.dtype, *shape, words=PAIR_BYTES),
            rank,
        )
    if masks and (len(masks) != len(ranks) or len({share for *_, share in masks}) > 1):
        raise CallError(
            f"{len(masks)} masks of {len(ranks)} factors where C takes one of each, of one share"
        )
    for place, mask in enumerate(masks):
        left = masked(given.masks[place], mask, rows)
        scale = scale / left if place == 0 else scale
    given.count, given.across, given.half = len(ranks), int(across), int(first.dtype is BF16)
    given.narrow, given.apart, given.scale = (
        narrow.data_ptr(),
        number(apart, sum(ranks), MOST_STRIDE),
        scale,
    )


def _wide(x: Tensor) -> tuple[int, int]:
    """(M, D) of rows whose width fills registers."""
    rows, width = x.shape
    if number(width, 16, MOST_STRIDE) % 16:
        raise CallError(f"width {width} where C takes multiples of 16")
    return number(rows, 0, MOST_STRIDE), width


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
) -> None:
    """x (M, D) += the update of `before` (B of one layer), += beside (M, D): in place, each where
    it is given. Then out (M, D) = weight (D) * x * scale, scale (M) float32 = 1 / root mean square,
    and of out the first products of `behind` (A of each); without a weight none of these."""
    rows, width = _wide(x)
    given = _Norms(
        x=at(x, BF16, rows, width, words=PAIR_BYTES), rows=rows, width=width, epsilon=epsilon
    )
    if before is not None:
        _side(given.before, before, rows, width, across=True, wide_first=True)
    if beside is not None:
        given.beside = at(beside, BF16, rows, width)
    if weight is not None and out is not None and scale is not None:
        given.weight, given.scale = at(weight, BF16, width), at(scale, FP32, rows)
        given.out = at(out, BF16, rows, width, words=PAIR_BYTES)
        if behind is not None:
            _side(given.behind, behind, rows, width, across=True, wide_first=False)
    elif any(each is not None for each in (weight, out, scale, behind)):
        raise CallError("a part of a norm")
    call("veneer_block_norm_forward", ctypes.byref(given))


def norm_backward(
    grad: Tensor,
    normed: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    before: Side,
    beside: Tensor,
    behind: Side | None = None,
) -> None:
    """grad (M, D) of what the norm gave, += the update of `before` (A of each layer), becomes that
    of normed (M, D) + beside (M, D), in place; of it the first product of `behind` (B of one
    layer)."""
    rows, width = _wide(grad)
    given = _Norms(rows=rows, width=width, x=at(grad, BF16, rows, width, words=PAIR_BYTES))
    given.out, given.normed, given.beside = (
        given.x,
        at(normed, BF16, rows, width),
        at(beside, BF16, rows, width),
    )
    given.weight, given.scale = at(weight, BF16, width), at(scale, FP32, rows)
    _side(given.before, before, rows, width, across=False, wide_first=False)
    if behind is not None:
        _side(given.behind, behind, rows, width, across=False, wide_first=True)
    call("veneer_block_norm_backward", ctypes.byref(given))


def gate_forward(
    gate: Tensor, up: Tensor, out: Tensor, of_gate: Side, of_up: Side, behind: Side
) -> None:
    """gate and up (M, D) += their updates (B of one layer each), in place; out (M, D) = silu(gate)
    * up, and of it the first product of `behind` (A of one layer)."""
    rows, width = _wide(gate)
    given = _Gates(
        rows=rows, width=width, gate=at(gate, BF16, rows, width), up=at(up, BF16, rows, width)
    )
    given.out = at(out, BF16, rows, width, words=PAIR_BYTES)
    for place, side in enumerate((of_gate, of_up)):
        _side(given.sides[place], side, rows, width, across=True, wide_first=True)
    _side(given.sides[2], behind, rows, width, across=True, wide_first=False)
    call("veneer_block_gate_forward", ctypes.byref(given))


def gate_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    grad_up: Tensor,
    *,
    before: Side,
    of_gate: Side,
    of_up: Side,
) -> None:
    """grad (M, D) of silu(gate) * up, += the update of `before` (A of one layer), becomes that of
    gate, in place; grad_up (M, D); of both the first products (B of one layer each)."""
    rows, width = _wide(grad)
    given = _Gates(
        rows=rows, width=width, gate=at(gate, BF16, rows, width), up=at(up, BF16, rows, width)
    )
    given.out = at(grad, BF16, rows, width, words=PAIR_BYTES)
    given.grad_up = at(grad_up, BF16, rows, width, words=PAIR_BYTES)
    for place, side in enumerate((of_gate, of_up)):
        _side(given.sides[place], side, rows, width, across=False, wide_first=True)
    _side(given.sides[2], before, rows, width, across=False, wide_first=False)
    call("veneer_block_gate_backward", ctypes.byref(given))


def heads(
    x: Sequence[Tensor], cos: Tensor, sin: Tensor, sides: Sequence[Side], *, back: bool
) -> None:
    """q, k and v (M, H E), E a multiple of 32, in place: each += its update (B of one layer), then
    q and k turned by cos and sin (M, E). back: q and k turned back, then each one's first product
    (B again)."""
    rows, size = cos.shape
    if number(size, 32) % 32:
        raise CallError(f"heads of {size} where C takes multiples of 32")
    given = _Heads(rows=number(rows, 0, MOST_STRIDE), size=size, back=int(back))
    given.cos, given.sin = at(cos, BF16, rows, size), at(sin, BF16, rows, size)
    for place, (each, side) in enumerate(zip(x, sides, strict=True)):
        own = number(each.shape[1], size, MOST_STRIDE)
        given.x[place], given.heads[place] = (
            at(each, BF16, rows, own, words=PAIR_BYTES),
            own // size,
        )
        if own % size:
            raise CallError(f"{own} columns where C takes whole heads of {size}")
        _side(given.sides[place], side, rows, own, across=not back, wide_first=True)
    if len(x) != MOST:
        raise CallError(f"{len(x)} where C takes q, k and v")
    call("veneer_block_heads", ctypes.byref(given))
