"""Forward and backward of a decoder layer with LoRA: the steps in their order (see block.py).

Products with the base's weights are computed once over all rows, everything between them for each
part of the rows; a sum and the norms beside it are one pass. Names are those of block.py; o and d
are the outputs of the layers o and down where a norm stands behind them. Shapes: M rows, D hidden,
S head size, R ranks side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.kernels.attention.compiled import packed_forward
from veneer.kernels.bindings import block_calls
from veneer.kernels.dense import rank
from veneer.kernels.dense.block_operands import DOWN, GATES, QKV, Block, O
from veneer.kernels.dense.block_parts import BackwardPass, Kept, Pass, is_adapted


def forward(
    block: Block, x: Tensor, factors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns y and the tensors for backward: a `Kept`, the x A^T of each part, and the tensors
    that attention saves."""
    run, norms, rows = Pass(block, x, factors), block.norms, len(x)
    _, _, n, n_scale, n_narrow = run.add(
        x, [None for _ in run.parts], None, None, norms.before_attention, QKV
    )
    raw = [run.product(number, n) for number in QKV]
    q_scale, k_scale = run.scales(norms.q, raw[0]), run.scales(norms.k, raw[1])
    turned = raw[:2] if norms.q is None else [torch.empty_like(wide) for wide in raw[:2]]
    run.rotate_heads(raw, n_narrow, (q_scale, k_scale), turned)
    q, k, v = (wide.view(rows, -1, block.size) for wide in (*turned, raw[2]))
    out, entropies, out_narrow = torch.empty_like(q), list[Tensor](), list[Tensor]()
    for part in run.parts:
        own_q, own_k, own_v, own_out = (values[part.rows] for values in (q, k, v, out))
        layout, rules = part.part.layout, block.rules
        entropies += packed_forward(own_q, own_k, own_v, layout, rules, out=own_out)[1]
        dropout = part.part.layers[O].dropout
        out_narrow.append(rank.down(own_out.view(len(own_out), -1), part.A[O], dropout=dropout))
    o, updates = run.product(O, out.view(rows, -1)), run.output_factors(O, out_narrow)
    gates_of_h = () if block.is_parallel else GATES
    h, o_scale, m, m_scale, m_narrow = run.add(
        o, updates, x, norms.after_attention, norms.before_feed_forward, gates_of_h
    )
    if block.is_parallel:
        m, m_narrow = n, run.products(n, GATES)
    gate, up = (run.product(number, m) for number in GATES)
    gated, gated_narrow = torch.empty_like(gate), run.narrow([DOWN])
    for part, own_m_narrow, own_gated_narrow in zip(run.parts, m_narrow, gated_narrow, strict=True):
        own_gate, own_up, own_gated = (values[part.rows] for values in (gate, up, gated))
        sides = (
            *part.all_output_factors(GATES, own_m_narrow),
            part.input_factors([DOWN], own_gated_narrow),
        )
        block_calls.gate_forward(own_gate, own_up, own_gated, *sides, is_gelu=block.is_gelu)
    d, updates = run.product(DOWN, gated), run.output_factors(DOWN, gated_narrow)
    y, d_scale, *_ = run.add(d, updates, h, norms.after_feed_forward, None)

    of_n = [*n_narrow, *m_narrow] if block.is_parallel else n_narrow

    def if_needed(x: Tensor, *conditions: object) -> Tensor:
        return x if all(conditions) else x.new_empty(0)

    kept = Kept(
        n_scale=n_scale,
        q_raw=if_needed(raw[0], norms.q),
        q_scale=q_scale,
        k_raw=if_needed(raw[1], norms.k),
        k_scale=k_scale,
        q=if_needed(q, run.keeps_all or not norms.q),
        k=if_needed(k, run.keeps_all or not norms.k),
        v=v,
        out=out,
        o=if_needed(o, norms.after_attention),
        o_scale=o_scale,
        h=if_needed(h, not block.is_parallel),
        m_scale=m_scale,
        gate=gate,
        up=up,
        d=if_needed(d, norms.after_feed_forward),
        d_scale=d_scale,
        n=if_needed(n, run.keeps_all, norms.before_attention, is_adapted(of_n)),
        m=if_needed(m, run.keeps_all, norms.before_feed_forward, is_adapted(m_narrow)),
        gated=if_needed(gated, run.keeps_all, is_adapted(gated_narrow)),
    )
    return [y], [*kept, *n_narrow, *out_narrow, *m_narrow, *gated_narrow, *entropies]


def backward(
    block: Block,
    x: Tensor,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad: Tensor,
    grad_factors: Sequence[Tensor],
    *,
    needs_x: bool,
    add: bool,
) -> list[Tensor]:
    """Returns the gradient of x if it is needed.

    saved         what forward returned for backward
    grad_factors  where the gradients of the factors are written; `add` adds to what they hold
    """
    run = BackwardPass(block, x, factors, grad_factors)
    norms, rest = block.norms, iter(saved)
    kept = Kept(*(next(rest) for _ in Kept._fields))
    n_narrow, out_narrow, m_narrow, gated_narrow = (
        [next(rest) for _ in run.parts] for _ in (QKV, O, GATES, DOWN)
    )
    grad_d, grad_narrow = run.through_last_norm(
        DOWN, grad, norms.after_feed_forward, kept.d, kept.d_scale
    )
    grad_gate, grad_up = run.input_gradient([DOWN], [grad_d]), torch.empty_like(kept.up)
    run.write(
        [DOWN],
        run.recompute_gated(kept, gated_narrow),
        grad_narrow,
        [grad_d],
        gated_narrow,
        add=add,
    )
    grad_m_narrow = run.narrow(GATES)
    for part, own_grad_narrow, own_grad_m_narrow in zip(
        run.parts, grad_narrow, grad_m_narrow, strict=True
    ):
        own = [values[part.rows] for values in (grad_gate, kept.gate, kept.up, grad_up)]
        of_gate, of_up = part.all_output_factors(GATES, own_grad_m_narrow)
        block_calls.gate_backward(
            own[0],
            own[1],
            own[2],
            own[3],
            update=part.input_factors([DOWN], own_grad_narrow),
            of_gate=of_gate,
            of_up=of_up,
            is_gelu=block.is_gelu,
        )
    of_n = [*n_narrow, *m_narrow] if block.is_parallel else n_narrow
    n = run.recompute_norm(norms.before_attention, x, kept.n, of_n)
    m = (
        n
        if block.is_parallel
        else run.recompute_norm(norms.before_feed_forward, kept.h, kept.m, m_narrow)
    )
    run.write(GATES, m, grad_m_narrow, [grad_gate, grad_up], m_narrow, add=add)
    grad_m = run.input_gradient(GATES, [grad_gate, grad_up])
    if block.is_parallel:
        run.add_updates(grad_m, GATES, grad_m_narrow)
        grad_h, (grad_o, grad_narrow) = grad, run.through_last_norm(O, grad, None, grad, grad)
    else:
        grad_o, grad_narrow = run.through_norms(grad_m, grad_m_narrow, grad, kept)
        grad_h = grad_m
    run.write([O], kept.out.view(len(x), -1), grad_narrow, [grad_o], out_narrow, add=add)
    grad_heads = run.attention_gradients(run.input_gradient([O], [grad_o]), grad_narrow, kept, rest)
    grads, grad_narrow = [values.view(len(x), -1) for values in grad_heads], run.narrow(QKV)
    scales, raw = (kept.q_scale, kept.k_scale), (kept.q_raw, kept.k_raw)
    run.rotate_heads(grads, grad_narrow, scales, raw, back=True)
    run.write(QKV, n, grad_narrow, grads, n_narrow, add=add)
    if not needs_x:
        return []
    grad_x = run.input_gradient(QKV, grads, grad_m if block.is_parallel else None)
    run.through_norm(grad_x, QKV, grad_narrow, norms.before_attention, x, kept.n_scale, grad_h)
    return [grad_x]
