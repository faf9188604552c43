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
from veneer.kernels.layers.block_operands import DOWN, QKV, Block, O
from veneer.kernels.layers.block_parts import BackwardPass, Kept, Pass, is_adapted


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
    of_h = (None, ()) if block.is_parallel else (norms.before_feed_forward, block.gates)
    h, o_scale, m, m_scale, m_narrow = run.add(o, updates, x, norms.after_attention, *of_h)
    if block.shares_norm:
        m, m_narrow = n, run.products(n, block.gates)
    elif block.is_parallel:
        _, _, m, m_scale, m_narrow = run.add(
            x, [None for _ in run.parts], None, None, norms.before_feed_forward, block.gates
        )
    gate, *ups = (run.product(number, m) for number in block.gates)
    up = ups[0] if ups else None
    gated, gated_narrow = torch.empty_like(gate), run.narrow([DOWN])
    for part, own_m_narrow, own_gated_narrow in zip(run.parts, m_narrow, gated_narrow, strict=True):
        of_gate, *of_up = part.all_output_factors(block.gates, own_m_narrow)
        block_calls.gate_forward(
            gate[part.rows],
            None if up is None else up[part.rows],
            gated[part.rows],
            of_gate,
            of_up[0] if of_up else None,
            part.input_factors([DOWN], own_gated_narrow),
            activation=block.activation,
        )
    d, updates = run.product(DOWN, gated), run.output_factors(DOWN, gated_narrow)
    y, d_scale, *_ = run.add(d, updates, h, norms.after_feed_forward, None)

    of_n = [*n_narrow, *m_narrow] if block.shares_norm else n_narrow

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
        up=x.new_empty(0) if up is None else up,
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
        [next(rest) for _ in run.parts] for _ in (QKV, O, block.gates, DOWN)
    )
    grad_d, grad_narrow = run.through_last_norm(
        DOWN, grad, norms.after_feed_forward, kept.d, kept.d_scale
    )
    grad_gate = run.input_gradient([DOWN], [grad_d])
    up, grad_up = (None, None) if len(block.gates) == 1 else (kept.up, torch.empty_like(kept.up))
    run.write(
        [DOWN],
        run.recompute_gated(kept, gated_narrow),
        grad_narrow,
        [grad_d],
        gated_narrow,
        add=add,
    )
    grad_m_narrow = run.narrow(block.gates)
    for part, own_grad_narrow, own_grad_m_narrow in zip(
        run.parts, grad_narrow, grad_m_narrow, strict=True
    ):
        of_gate, *of_up = part.all_output_factors(block.gates, own_grad_m_narrow)
        block_calls.gate_backward(
            grad_gate[part.rows],
            kept.gate[part.rows],
            None if up is None else up[part.rows],
            None if grad_up is None else grad_up[part.rows],
            update=part.input_factors([DOWN], own_grad_narrow),
            of_gate=of_gate,
            of_up=of_up[0] if of_up else None,
            activation=block.activation,
        )
    of_n = [*n_narrow, *m_narrow] if block.shares_norm else n_narrow
    n = run.recompute_norm(norms.before_attention, x, kept.n, of_n)
    h = x if block.is_parallel else kept.h
    m = n
    if not block.shares_norm:
        m = run.recompute_norm(norms.before_feed_forward, h, kept.m, m_narrow)
    grads_of_gates = [grad_gate] if grad_up is None else [grad_gate, grad_up]
    run.write(block.gates, m, grad_m_narrow, grads_of_gates, m_narrow, add=add)
    grad_m = run.input_gradient(block.gates, grads_of_gates)
    if block.is_parallel:
        grad_h, (grad_o, grad_narrow) = grad, run.through_last_norm(O, grad, None, grad, grad)
        if block.shares_norm:
            run.add_updates(grad_m, block.gates, grad_m_narrow)
        else:
            run.through_norm(
                grad_m, block.gates, grad_m_narrow, norms.before_feed_forward, x, kept.m_scale, grad
            )
            grad_h = grad_m
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
    grad_x = run.input_gradient(QKV, grads, grad_m if block.shares_norm else None)
    run.through_norm(grad_x, QKV, grad_narrow, norms.before_attention, x, kept.n_scale, grad_h)
    return [grad_x]
