"""Computes q, k and v of a decoder layer with LoRA (block.py), after their updates, norms and
rotation, and the backward of these steps.

q, k and v are the outputs of three layers, or of one that computes them by group: some heads of q,
their k and v, then those of the next group. Then attention reads them where they are, as views, but
for q of more than one head a group.
Shapes: M rows, H query heads, K key heads, S head size, R ranks side by side.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from veneer.kernels.attention.compiled import packed_backward
from veneer.kernels.bindings import head_calls
from veneer.kernels.bindings.block_calls import RankFactors
from veneer.kernels.dense import rank
from veneer.kernels.layers.block_parts import BackwardPass, Kept, Pass

Heads = tuple[Tensor, Tensor, Tensor]


def rotated_heads(
    run: Pass, raw: Sequence[Tensor], narrow: Sequence[Tensor], scales: Sequence[Tensor]
) -> Heads:
    """Adds the updates to the outputs of the layers. Returns q (M, H, S), k and v (M, K, S) after
    norms and rotation. narrow: x A^T of the updates; scales: of the norms of q and k, written."""
    block = run.block
    if block.group:
        *q_heads, k, v = raw[0].view(run.rows, -1, block.group + 2, block.size).unbind(2)
        out = None
        if block.group > 1:
            out = k.new_empty(run.rows, k.shape[1] * block.group, block.size)
        _rotate_by_group(run, raw[0], narrow, out)
        return (q_heads[0] if out is None else out), k, v
    turned = raw[:2] if block.norms.q is None else [torch.empty_like(wide) for wide in raw[:2]]
    _rotate(run, raw, narrow, scales, turned)
    q, k, v = (wide.view(run.rows, -1, block.size) for wide in (*turned, raw[2]))
    return q, k, v


def attention_gradients(
    run: BackwardPass,
    grad: Tensor,
    grad_narrow: Sequence[Tensor],
    kept: Kept,
    entropies: Iterator[Tensor],
) -> list[Tensor]:
    """Returns the gradients of q, k and v. grad: that of the input of the layer o, without its
    updates."""
    (q, k), o = _recomputed(run, kept), run.block.o
    grad_heads = [values.new_empty(values.shape) for values in (q, k, kept.v)]
    for part, own_grad_narrow in zip(run.parts, grad_narrow, strict=True):
        wide, layout = grad[part.rows], part.part.layout
        rank.add_up(wide, own_grad_narrow, part.A[o].T, dropout=part.part.layers[o].dropout)
        own_q, own_k, own_v, out = (values[part.rows] for values in (q, k, kept.v, kept.out))
        packed_backward(
            own_q,
            own_k,
            own_v,
            out,
            [next(entropies) for _ in range(2 if layout.prompt else 1)],
            wide.view(own_q.shape),
            layout,
            run.block.rules,
            into=[values[part.rows] for values in grad_heads],
        )
    return grad_heads


def head_gradients(
    run: BackwardPass, grad_heads: Sequence[Tensor], kept: Kept
) -> tuple[list[Tensor], list[Tensor]]:
    """Takes the gradients of q, k and v back through rotation and norms. Returns those of the
    layers' outputs, and their products with B of each part."""
    rows, grad_narrow = run.rows, run.narrow(run.block.heads)
    if run.block.group:
        joined = grad_heads[0].new_empty(rows, sum(heads[0].numel() for heads in grad_heads))
        _rotate_by_group(run, joined, grad_narrow, None, grad_heads)
        return [joined], grad_narrow
    grads = [values.view(rows, -1) for values in grad_heads]
    scales, raw = (kept.q_scale, kept.k_scale), (kept.q_raw, kept.k_raw)
    _rotate(run, grads, grad_narrow, scales, raw, back=True)
    return grads, grad_narrow


def _recomputed(run: Pass, kept: Kept) -> tuple[Tensor, Tensor]:
    """Returns q and k after their norms and their rotation."""
    norms = run.block.norms.q, run.block.norms.k
    if norms[0] is None:
        return kept.q, kept.k
    raw = kept.q_raw, kept.k_raw
    turned = torch.empty_like(raw[0]), torch.empty_like(raw[1])
    scales = run.scales(norms[0], raw[0]), run.scales(norms[1], raw[1])
    last = run.block.norms_last  # then q and k before their norms are rotated already
    _rotate(run, [*raw, kept.v.view(run.rows, -1)], None, scales, turned, turns=not last)
    q, k = (wide.view(run.rows, -1, run.block.size) for wide in turned)
    return q, k


def _rotate(
    run: Pass,
    heads: Sequence[Tensor],
    narrow: Sequence[Tensor] | None,
    scales: Sequence[Tensor],
    norm_rows: Sequence[Tensor],
    *,
    turns: bool = True,
    back: bool = False,
) -> None:
    """Calls head_calls.heads for each part. narrow: x A^T of the updates; None: they are added
    already. scales, norm_rows: those of q and k, read only if these have norms. turns: q and k are
    rotated."""
    norms = run.block.norms.q, run.block.norms.k
    for number, part in enumerate(run.parts):
        part_heads = [wide[part.rows] for wide in heads]
        sides = (
            [RankFactors([], wide.new_empty(len(wide), 0)) for wide in part_heads]
            if narrow is None
            else part.all_output_factors(run.block.heads, narrow[number])
        )
        pairs = [*zip(norms, scales, norm_rows, strict=True)]
        head_calls.heads(
            part_heads,
            run.block.size,
            part.part.angles if turns else None,
            sides,
            norms=[run.norm_of(norm, scale, part) for norm, scale, _ in pairs],
            norm_rows=[None if norm is None else wide[part.rows] for norm, _, wide in pairs],
            neighbours=run.block.neighbours,
            norms_last=run.block.norms_last,
            back=back,
        )


def _rotate_by_group(
    run: Pass,
    joined: Tensor,
    narrow: Sequence[Tensor],
    out: Tensor | None,
    grads: Sequence[Tensor] | None = None,
) -> None:
    """Calls head_calls.heads_joined for each part. joined: q, k and v by group, or where their
    gradients `grads` go."""
    for part, own_narrow in zip(run.parts, narrow, strict=True):
        head_calls.heads_joined(
            joined[part.rows],
            run.block.size,
            part.part.angles,
            part.output_factors(0, own_narrow),
            group=run.block.group,
            out=None if out is None else out[part.rows],
            grads=None if grads is None else [values[part.rows] for values in grads],
            neighbours=run.block.neighbours,
        )
