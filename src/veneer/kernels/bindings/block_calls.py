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
    MOST_LAYERS,
    MOST_STRIDE,
    PAIR_BYTES,
    DropoutMask,
    Mask,
    mask_fields,
)

_RANK_FACTORS = """
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
_RankFactors = structure("RankFactors", _RANK_FACTORS, Mask=DropoutMask)


_Norm = structure(
    "NormOperands", "weight, bias, scale: pointer; is_wide, is_centred; epsilon, offset: float"
)


class NormOperands(NamedTuple):
    """(weight + offset) * x * scale, scale = 1 / root mean square of each row, written or read.
    is_centred: weight * (x - mean) * scale + bias, scale = 1 / deviation of each row, rounded once.

    weight and bias (D) bf16; scale (M) float32; is_wide: x * scale is not rounded before it is
    multiplied. The caller keeps them during the call.
    """

    weight: Tensor
    scale: Tensor
    epsilon: float
    offset: float = 0.0
    is_wide: bool = False
    is_centred: bool = False
    bias: Tensor | None = None


def _norm(norm: NormOperands | None, rows: int, width: int) -> Any:
    """Checks a norm of this number of rows. None: no norm."""
    if norm is None:
        return _Norm()
    weight, scale, epsilon, offset, is_wide, is_centred, bias = norm
    if is_centred and offset:
        raise CallError("a centred norm has no offset")
    places = at(weight, BF16, width), 0 if bias is None else at(bias, BF16, width)
    return _Norm(*places, at(scale, FP32, rows), is_wide, is_centred, epsilon, offset)


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


def _rank_factors(side: RankFactors | None, wide: Tensor, *, across: bool, of_A: bool) -> Any:
    """Checks the rank factors of the rows of `wide` (M, D). of_A: factors are A (R, D), else B
    (D, R). Without factors nothing is computed."""
    rows, width = wide.shape
    if side is None or (not side[0] and side[1].shape == (rows, 0)):
        return ()
    factors, narrow, scale, masks = side
    ranks = tuple(factor.shape[0 if of_A else 1] for factor in factors)
    if not 0 < len(ranks) <= MOST_LAYERS or any(rank % 16 or rank < 16 for rank in ranks):
        raise CallError(f"ranks {ranks} where C takes up to {MOST_LAYERS} multiples of 16")
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


@declare_structure(_RankFactors, _RANK_FACTORS)
def _filled_factors(narrow: Tensor, rows: int, rank: int, across: bool, values: Values) -> Values:
    """values: the fields that _rank_factors has checked."""
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
    RankFactors=_RankFactors,
    NormOperands=_Norm,
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
        "output_norm": _norm(output_norm, *x.shape),
        "norm": _norm(norm, *x.shape),
        "update": _rank_factors(update, x, across=True, of_A=False),
        "next_factors": _rank_factors(next_factors, x, across=True, of_A=True),
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
    RankFactors=_RankFactors,
    NormOperands=_Norm,
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
        "output_norm": _norm(None, *x.shape),
        "norm": _norm(norm, *x.shape),
        "update": _rank_factors(update, x, across=False, of_A=True),
        "next_factors": _rank_factors(next_factors, x, across=False, of_A=False),
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
    activation: 0..2
    body sides
    """,
    RankFactors=_RankFactors,
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
    updates = [_rank_factors(side, gate, across=True, of_A=False) for side in (of_gate, of_up)]
    return {"sides": (*updates, _rank_factors(next_factors, gate, across=True, of_A=True))}


@declare(
    "veneer_block_gate_backward(*)",
    f"""
    gate: bf16[rows, width]
    up: bf16[rows, width]?
    out: bf16[rows, width] words 4
    grad_up: bf16[rows, width]? words 4
    sides: RankFactors*3
    {_SIZES}
    activation: 0..2
    body out, sides
    """,
    RankFactors=_RankFactors,
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
    products = [_rank_factors(side, gate, across=False, of_A=False) for side in (of_gate, of_up)]
    return {"out": grad, "sides": (*products, _rank_factors(update, gate, across=False, of_A=True))}


@declare(
    "veneer_block_heads(*)",
    """
    x: pointer*3
    out, normed: pointer*2
    norms: NormOperands*2
    spans: int*2
    heads: int*3
    sides: RankFactors*3
    cos, sin: F[rows, turned]?
    turned
    neighbours: flag
    is_wide: flag
    rows: 0..2**27
    size: 16..2**27 % 16
    back: flag
    body x, out, normed, norms, spans, heads, sides, cos, sin, turned, is_wide, rows
    """,
    RankFactors=_RankFactors,
    NormOperands=_Norm,
)
def heads(
    x: Sequence[Tensor],
    size: int,
    angles: tuple[Tensor, Tensor] | None,
    sides: Sequence[RankFactors],
    *,
    norms: Sequence[NormOperands | None] = (None, None),
    norm_rows: Sequence[Tensor | None] = (None, None),
    neighbours: bool,
    back: bool,
) -> Values:
    """Forward: adds its update (B of one layer) to each of q, k and v (M, H E), in place. Then q
    and k go through their norms into `norm_rows` (M, H E) and are rotated; without norms they are
    rotated in place. E = size, a multiple of 16. angles: cosines and sines (M, R), bf16 or float32,
    of the first R dimensions of each head: i with R / 2 + i, or 2 i with 2 i + 1 (neighbours). A
    norm is over one head or over all heads of a row.

    back: x are gradients. Those of q and k are rotated back and taken through the norms of
    `norm_rows`; then the product of each of the three with B of its layer is computed.
    """
    lengths = len(x), len(sides), len(norms), len(norm_rows)
    if lengths != (MOST_LAYERS, MOST_LAYERS, 2, 2) or type(back) is not bool:
        raise CallError(f"{len(x)} of {len(sides)} sides where C takes q, k and v")
    rows, size = len(x[0]), number(size, 1)
    widths = [number(tensor.shape[1], size, MOST_STRIDE) for tensor in x]
    if any(width % size for width in widths):
        raise CallError(f"{widths} columns where C takes whole heads of {size}")
    spans, places = [0, 0], [0, 0]
    for place, (norm, tensor) in enumerate(zip(norms, norm_rows, strict=True)):
        if (norm is None) != (tensor is None):
            raise CallError("a part of a norm")
        if norm is not None and tensor is not None:
            weight, *_ = norm
            spans[place] = number(weight.numel(), size, widths[place])
            if widths[place] % spans[place]:
                raise CallError(f"a norm of {spans[place]} of {widths[place]} values")
            places[place] = at(tensor, BF16, rows, widths[place], words=PAIR_BYTES)
    updates = zip(sides, x, strict=True)
    addresses = [
        at(tensor, BF16, rows, width, words=PAIR_BYTES)
        for tensor, width in zip(x, widths, strict=True)
    ]
    counts = [
        rows * width // span if span else 0 for width, span in zip(widths, spans, strict=False)
    ]
    cos, sin = (None, None) if angles is None else angles
    if (cos is None) != (sin is None):
        raise CallError("cosines without sines")
    turned = 0 if cos is None else number(cos.shape[-1], 2, size)
    if turned % 2:
        raise CallError(f"{turned} dimensions of a head are no pairs")
    return {
        "x": tuple(addresses),
        "out": (0, 0) if back else tuple(places),
        "normed": tuple(places) if back else (0, 0),
        "norms": tuple(map(_norm, norms, counts, spans)),
        "spans": tuple(spans),
        "heads": tuple(width // size for width in widths),
        "sides": tuple(
            _rank_factors(side, wide, across=not back, of_A=False) for side, wide in updates
        ),
        "cos": cos,
        "sin": sin,
        "turned": turned,
        "rows": rows,
        "is_wide": cos is not None and cos.dtype is FP32,
    }
