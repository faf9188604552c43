"""The calls into the kernels between the large products of a decoder layer that trains
(native/layers/block.c).

Values are bf16, factors float32 or bf16. Shapes: M rows, D width, R ranks side by side, H heads of
E.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from veneer.kernels.bindings.arguments import BF16, FP32, CallError, at
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare, declare_structure, structure
from veneer.kernels.bindings.rank_calls import (
    MOST_LAYERS,
    MOST_RANK,
    PAIR_BYTES,
    DropoutMask,
    Mask,
    mask_fields,
)
from veneer.kernels.rules import Norm

_RANK_FACTORS = f"""
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
    check rank: 16..{MOST_LAYERS * MOST_RANK}
    body factors, ranks, count, half, masks, scale
"""
RankStruct = structure("RankFactors", _RANK_FACTORS, Mask=DropoutMask)


NormStruct = structure(
    "NormOperands", "weight, bias, scale: pointer; is_wide, is_centred; epsilon, offset: float"
)


class NormOperands(NamedTuple):
    """A norm, weight and bias (D) bf16, and 1 / root mean square of each row, or 1 / deviation of
    each row for a centred norm, written or read: scale (M) float32. The caller keeps them during
    the call."""

    norm: Norm
    scale: Tensor


def norm_struct(norm: NormOperands | None, rows: int, width: int) -> Any:
    """Checks a norm of this number of rows. None: no norm."""
    if norm is None:
        return NormStruct()
    (weight, epsilon, offset, is_wide, is_centred, bias), scale = norm
    places = at(weight, BF16, width), 0 if bias is None else at(bias, BF16, width)
    return NormStruct(*places, at(scale, FP32, rows), is_wide, is_centred, epsilon, offset)


class RankFactors(NamedTuple):
    """One factor of the updates of layers that share an input or an output, side by side. A product
    goes from the wide tensor (M, D) to the narrow one (M, R), or back.

    factors: A (R, D) of each layer, or B (D, R). masks: dropout of the wide tensor, one for each
    factor, all of the same share; empty: no dropout.
    """

    factors: Sequence[Tensor]
    narrow: Tensor
    scale: float = 1.0
    masks: Sequence[Mask] = ()


def rank_struct(side: RankFactors | None, wide: Tensor, *, across: bool, of_A: bool) -> Any:
    """Checks the rank factors of the rows of `wide` (M, D). of_A: factors are A (R, D), else B
    (D, R). Without factors nothing is computed."""
    rows, width = wide.shape
    if side is None or (not side[0] and side[1].shape == (rows, 0)):
        return ()
    factors, narrow, scale, masks = side
    ranks = tuple(factor.shape[0 if of_A else 1] for factor in factors)
    fit = all(rank % 16 == 0 and 16 <= rank <= MOST_RANK for rank in ranks)
    if not (0 < len(ranks) <= MOST_LAYERS and fit):
        raise CallError(
            f"ranks {ranks} where C takes up to {MOST_LAYERS} multiples of 16, each at most"
            f" {MOST_RANK}"
        )
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
    return _filled_factors(narrow, rows, sum(ranks), across, values)


@declare_structure(RankStruct, _RANK_FACTORS)
def _filled_factors(narrow: Tensor, rows: int, rank: int, across: bool, values: Values) -> Values:
    """Fills the structure. values: the fields that rank_struct has checked."""
    return values


_SIZES = "rows: 0..2**27; width: 16..2**27 % 16"


@declare(
    "veneer_block_norm_forward(*)",
    f"""
    x: bf16[rows, width] words 4
    residual: bf16[rows, width]?
    normed: unused
    total: bf16[rows, width] words 4
    out: bf16[rows, width]? words 4
    output_norm, norm: NormOperands
    update, next_factors: RankFactors
    {_SIZES}
    scale: float
    body total, output_norm, norm, update, next_factors
    """,
    RankFactors=RankStruct,
    NormOperands=NormStruct,
)
def norm_forward(
    x: Tensor,
    *,
    update: RankFactors | None = None,
    output_norm: NormOperands | None = None,
    total: Tensor | None = None,
    residual: Tensor | None = None,
    norm: NormOperands | None = None,
    out: Tensor | None = None,
    next_factors: RankFactors | None = None,
    scale: float = 1.0,
) -> Values:
    """Computes, in this order, each step only if its operands are given:

    x (M, D) += update              by B of one layer; in place
    total (M, D) = output_norm(x)   without this norm total is x itself
    total = residual (M, D) + scale * total
    out (M, D) = norm(total)
    narrow of `next_factors`        the products of out (without a norm: of total) with A of each
                                    layer
    """
    if (output_norm is None) != (total is None) or (norm is None) != (out is None):
        raise CallError("a part of a norm")
    if scale != 1.0 and residual is None:
        raise CallError("a scale without a residual")
    return {
        "total": x if total is None else total,
        "output_norm": norm_struct(output_norm, *x.shape),
        "norm": norm_struct(norm, *x.shape),
        "update": rank_struct(update, x, across=True, of_A=False),
        "next_factors": rank_struct(next_factors, x, across=True, of_A=True),
    }


@declare(
    "veneer_block_norm_backward(*)",
    f"""
    x: bf16[rows, width] words 4
    residual, normed: bf16[rows, width]?
    total: unused
    out: bf16[rows, width] words 4
    output_norm, norm: NormOperands
    update, next_factors: RankFactors
    {_SIZES}
    scale: float
    body out, output_norm, norm, update, next_factors
    """,
    RankFactors=RankStruct,
    NormOperands=NormStruct,
)
def norm_backward(
    x: Tensor,
    *,
    update: RankFactors | None = None,
    norm: NormOperands | None = None,
    normed: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    next_factors: RankFactors | None = None,
    scale: float = 1.0,
) -> Values:
    """Computes, in this order, each step only if its operands are given:

    x (M, D) += update               by A of each layer; in place
    out (M, D) = gradient of normed  x is the gradient of norm(normed); without a norm
                                     out = scale * x
    out += residual (M, D)
    narrow of `next_factors`         the product of out with B of one layer

    Without `out` the result is written to x.
    """
    if (norm is None) != (normed is None) or (norm is not None and scale != 1.0):
        raise CallError("a part of a norm, or a norm with a scale")
    return {
        "out": x if out is None else out,
        "output_norm": norm_struct(None, *x.shape),
        "norm": norm_struct(norm, *x.shape),
        "update": rank_struct(update, x, across=False, of_A=True),
        "next_factors": rank_struct(next_factors, x, across=False, of_A=False),
    }


@declare(
    "veneer_block_gate_forward(*)",
    f"""
    gate: bf16[rows, width]
    up: bf16[rows, width]?
    out: bf16[rows, width] words 4
    grad_up: unused
    sides: RankFactors*3
    {_SIZES}
    activation: 0..4
    body sides
    """,
    RankFactors=RankStruct,
)
def gate_forward(
    gate: Tensor,
    up: Tensor | None,
    out: Tensor,
    of_gate: RankFactors,
    of_up: RankFactors | None,
    next_factors: RankFactors,
    *,
    activation: int,
) -> Values:
    """Adds their updates (B of one layer each) to gate and up (M, D), in place. Then computes out
    (M, D) = activation(gate) * up, or without up activation(gate), and its product with A of one
    layer (`next_factors`). activation: a number of row_calls.py."""
    if (up is None) != (of_up is None):
        raise CallError("a part of a gate")
    updates = [rank_struct(side, gate, across=True, of_A=False) for side in (of_gate, of_up)]
    return {"sides": (*updates, rank_struct(next_factors, gate, across=True, of_A=True))}


@declare(
    "veneer_block_gate_backward(*)",
    f"""
    gate: bf16[rows, width]
    up: bf16[rows, width]?
    out: bf16[rows, width] words 4
    grad_up: bf16[rows, width]? words 4
    sides: RankFactors*3
    {_SIZES}
    activation: 0..4
    body out, sides
    """,
    RankFactors=RankStruct,
)
def gate_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    grad_up: Tensor | None,
    *,
    update: RankFactors,
    of_gate: RankFactors,
    of_up: RankFactors | None,
    activation: int,
) -> Values:
    """Adds `update` (by A of one layer) to grad (M, D), the gradient of gate_forward's
    out. Then writes the gradient of gate over it and that of up to grad_up (M, D), and computes the
    products of both with B of one layer each (`of_gate`, `of_up`); without up only those of
    gate."""
    if len({up is None, grad_up is None, of_up is None}) > 1:
        raise CallError("a part of a gate")
    products = [rank_struct(side, gate, across=False, of_A=False) for side in (of_gate, of_up)]
    return {"out": grad, "sides": (*products, rank_struct(update, gate, across=False, of_A=True))}
