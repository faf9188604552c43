"""Calls the kernels over q, k and v of a decoder layer that trains: their updates, norms and
rotation, forward and backward (native/layers/block.c).

Values are bf16, factors float32 or bf16. Shapes: M rows, H heads of E.
"""

from collections.abc import Sequence

from torch import Tensor

from veneer.kernels.bindings.arguments import BF16, FP32, CallError, at, number
from veneer.kernels.bindings.block_calls import (
    NormOperands,
    NormStruct,
    RankFactors,
    RankStruct,
    norm_struct,
    rank_struct,
)
from veneer.kernels.bindings.checks import Values
from veneer.kernels.bindings.declarations import declare
from veneer.kernels.bindings.rank_calls import MOST_LAYERS, MOST_STRIDE, PAIR_BYTES


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
    norms_last: flag
    back: flag
    body x, out, normed, norms, spans, heads, sides, cos, sin, turned, is_wide, rows
    """,
    RankFactors=RankStruct,
    NormOperands=NormStruct,
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
    norms_last: bool = False,
    back: bool,
) -> Values:
    """Forward: adds its update (B of one layer) to each of q, k and v (M, H E), in place. Then q
    and k go through their norms into `norm_rows` (M, H E) and are rotated; without norms they are
    rotated in place. E = size, a multiple of 16. angles: cosines and sines (M, R), bf16 or float32,
    of the first R dimensions of each head: i with R / 2 + i, or 2 i with 2 i + 1 (neighbours). A
    norm is over one head or over all heads of a row.

    norms_last: q and k are rotated in place first, then they go through their norms. `norm_rows` of
    `back` are then the rotated ones.

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
            (weight, *_), _ = norm
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
    return {
        "x": tuple(addresses),
        "out": (0, 0) if back else tuple(places),
        "normed": tuple(places) if back else (0, 0),
        "norms": tuple(map(norm_struct, norms, counts, spans)),
        "spans": tuple(spans),
        "heads": tuple(width // size for width in widths),
        "sides": tuple(
            rank_struct(side, wide, across=not back, of_A=False) for side, wide in updates
        ),
        **_rotation(angles, size),
        "rows": rows,
    }


@declare(
    "veneer_block_heads_joined(*)",
    """
    x: bf16[rows, width] words 4
    out: pointer
    grads: pointer*3
    side: RankFactors
    cos, sin: F[rows, turned]?
    turned
    neighbours: flag
    is_wide: flag
    rows: 0..2**27
    groups, heads
    size: 16..2**27 % 16
    body out, groups, heads, grads, side, cos, sin, turned, is_wide
    """,
    RankFactors=RankStruct,
)
def heads_joined(
    x: Tensor,
    size: int,
    angles: tuple[Tensor, Tensor] | None,
    side: RankFactors,
    *,
    group: int = 1,
    out: Tensor | None = None,
    grads: Sequence[Tensor] | None,
    neighbours: bool,
) -> Values:
    """Forward, without `grads`: adds the update (B of one layer) to x (M, K (G + 2) E), which holds
    G heads of q, one of k and one of v of one group after the other, and rotates q and k, in place;
    then copies q to `out` (M, K G, E), if there is one. G = group, E = size, a multiple of 16.
    angles: as in `heads`.

    Backward: writes to x the gradients of q (M, K G, E), k and v (M, K, E) by group, those of q and
    k rotated back, and computes the product of x with B of the layer.
    """
    size, group = number(size, 1), number(group, 1)
    groups, gap = divmod(number(x.shape[1], 1, MOST_STRIDE), (group + 2) * size)
    if gap:
        raise CallError(f"{x.shape[1]} columns where C takes whole groups of {group + 2} heads")
    if grads is not None and (len(grads) != MOST_LAYERS or out is not None):
        raise CallError(f"{len(grads)} gradients where C takes q, k and v")
    addresses: tuple[int, ...] = (0, 0, 0)
    if grads is not None:
        counts = groups * group, groups, groups
        addresses = tuple(
            at(grad, BF16, len(x), count, size, words=PAIR_BYTES)
            for grad, count in zip(grads, counts, strict=True)
        )
    return {
        "out": 0 if out is None else at(out, BF16, len(x), groups * group, size, words=PAIR_BYTES),
        "groups": groups,
        "heads": group,
        "grads": addresses,
        "side": rank_struct(side, x, across=grads is None, of_A=False),
        **_rotation(angles, size),
    }


def _rotation(angles: tuple[Tensor, Tensor] | None, size: int) -> Values:
    """Checks cosines and sines for heads of this size."""
    cos, sin = (None, None) if angles is None else angles
    if (cos is None) != (sin is None):
        raise CallError("cosines without sines")
    turned = 0 if cos is None else number(cos.shape[-1], 2, size)
    if turned % 2:
        raise CallError(f"{turned} rotated dimensions of a head are not pairs")
    is_wide = cos is not None and cos.dtype is FP32
    return {"cos": cos, "sin": sin, "turned": turned, "is_wide": is_wide}
