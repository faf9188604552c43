"""The calls into the kernels for products with a small rank (native/layers/rank.c).

Shapes: M rows, I and O widths, R rank.
"""

from collections.abc import Sequence

from torch import Tensor

from veneer.kernels.bindings.arguments import FP32, INT64, CallError, at, number
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare, structure
from veneer.kernels.bindings.row_calls import dropout_threshold

PAIR_BYTES = 4
"""Two bf16 neighbours are read as one word."""
MOST_RANK, MOST_LAYERS = 256, 3
"""The largest rank; the most layers with the same input. Also in native/layers/rank.h."""
MOST_STRIDE = 2**27
"""Values from one row of a tensor to the next: 16 rows are gathered with indices of 32 bits."""

DropoutMask = structure(
    "DropoutMask", "keys: pointer; row_key, column_key, threshold: uint32; rows, columns: pointer"
)
Mask = tuple[Tensor, int, int, float]
"""A dropout mask: (int64 keys of the rows (M), key of all rows, key of all columns, share that is
dropped)."""


def mask_fields(mask: Mask, rows: int) -> tuple[int, int, int, int]:
    """Returns the fields of a DropoutMask for this number of rows."""
    keys, row_key, column_key, share = mask
    most = 2**32 - 1
    return (
        at(keys, INT64, rows),
        number(row_key, 0, most),
        number(column_key, 0, most),
        dropout_threshold(share),
    )


_NARROW = "narrow: bf16[rows@apart, rank] words 4"
_SIZES = """
    width: 16..2**27 % 16
    rank: 16..256 % 16
    apart: rank..2**27
"""
_MASKED = "scale: float; mask: Mask; pairs: unused; body narrow, mask, scale"


def _fields_with_factor(x: str) -> str:
    return f"""
    x: {x}
    factor: F{{rank * width}}
    {_NARROW}
    grads, ranks: unused*3
    count, transposed, add = 0
    rows
    {_SIZES}
    across: flag
    half = F
    {_MASKED}
    body factor, across
    """


def _masked(mask: Mask | None, x: Tensor, scale: float) -> Values:
    """Returns the mask, and the scale divided by the share that is kept."""
    if mask is None:
        return {"mask": (), "scale": scale}
    return {"mask": mask_fields(mask, len(x)), "scale": scale / (1 - mask[3])}


def _factor(factor: Tensor, outs: int, ins: int) -> Values:
    """Takes W^T (outs, ins), or a transposed view of W (ins, outs)."""
    across = factor.is_contiguous()
    if factor.shape != (outs, ins) or (across and factor.data_ptr() % PAIR_BYTES):
        raise CallError(f"factor is {list(factor.shape)} where C takes words of {[outs, ins]}")
    return {"factor": factor if across else factor.mT, "across": across}


@declare("veneer_rank_down(*)", _fields_with_factor("bf16[rows, width] words 4"), Mask=DropoutMask)
def rank_down(
    x: Tensor, factor: Tensor, out: Tensor, scale: float, mask: Mask | None = None
) -> Values:
    """Computes out (M, R) = scale * drop(x) (M, I) factor^T; factor (R, I)."""
    sizes = out.shape[1], x.shape[1]
    return {"narrow": out, **_factor(factor, *sizes), **_masked(mask, x, scale)}


@declare("veneer_rank_up(*)", _fields_with_factor("bf16[rows, width]; body x"), Mask=DropoutMask)
def rank_up(d: Tensor, factor: Tensor, y: Tensor, scale: float, mask: Mask | None = None) -> Values:
    """Adds drop(scale * d (M, R) factor^T) to y (M, O); factor (O, R)."""
    sizes = y.shape[1], d.shape[1]
    return {"x": y, "narrow": d, **_factor(factor, *sizes), **_masked(mask, y, scale)}


@declare(
    "veneer_rank_gradient(*)",
    f"""
    x: bf16[rows, width]
    factor: unused
    {_NARROW}
    grads: pointer*3
    ranks: int*3
    count
    transposed, add: flag
    rows: 1..2**27
    {_SIZES}
    across, half = 0
    {_MASKED}
    body grads, ranks, count
    """,
    Mask=DropoutMask,
)
def rank_gradient(
    u: Tensor,
    x: Tensor,
    outs: Sequence[Tensor],
    scale: float,
    mask: Mask | None = None,
    *,
    transposed: bool,
    add: bool,
) -> Values:
    """Computes scale * u^T drop(x), x (M, I): the gradients of up to MOST_LAYERS factors with the
    same x.

    u (M, R): those of all factors side by side. outs: float32 (R, I) for each factor, or (I, R) if
    transposed. add: adds the gradients to outs.
    """
    width = x.shape[1]
    ranks = tuple(out.shape[int(transposed)] for out in outs)
    if sum(ranks) != u.shape[1] or any(rank % 16 for rank in ranks) or len(ranks) > MOST_LAYERS:
        raise CallError(f"ranks {ranks} where C takes up to {MOST_LAYERS} multiples of 16")
    shapes = [(width, rank) if transposed else (rank, width) for rank in ranks]
    grads = tuple(at(out, FP32, *shape) for out, shape in zip(outs, shapes, strict=True))
    sides = {"narrow": u, "grads": grads, "ranks": ranks, "count": len(ranks)}
    return {**sides, **_masked(mask, x, scale)}
