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
from veneer.kernels.layers.block_heads import attention_gradients, head_gradients, rotated_heads
from veneer.kernels.layers.block_operands import Block
from veneer.kernels.layers.block_parts import BackwardPass, Kept, Pass


def forward(
    block: Block, x: Tensor, factors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns y, or h and m of a layer without its feed-forward block; and the tensors for
    backward: a `Kept`, the x A^T of each part, and the tensors that attention saves."""
    run, norms, rows = Pass(block, x, factors), block.norms, len(x)
    _, _, n, n_scale, n_narrow = run.add(
        x, [None for _ in run.parts], None, None, norms.before_attention, block.heads
    )
    raw = [run.product(number, n) for number in block.heads]
    q_raw, k_raw = raw[0], raw[0 if block.group else 1]
    q_scale, k_scale = run.scales(norms.q, q_raw), run.scales(norms.k, k_raw)
    q, k, v = rotated_heads(run, raw, n_narrow, (q_scale, k_scale))
    out, entropies, out_narrow = x.new_empty(q.shape), list[Tensor](), list[Tensor]()
    for part in run.parts:
        own_q, own_k, own_v, own_out = (values[part.rows] for values in (q, k, v, out))
        layout, rules = part.part.layout, block.rules
        entropies += packed_forward(own_q, own_k, own_v, layout, rules, out=own_out)[1]
        wide, dropout = own_out.view(len(own_out), -1), part.part.layers[block.o].dropout
        out_narrow.append(rank.down(wide, part.A[block.o], dropout=dropout))
    o = run.product(block.o, out.view(rows, -1))
    updates = run.output_factors(block.o, out_narrow)
    of_h = (None, ()) if block.is_parallel else (norms.before_feed_forward, block.gates)
    h, o_scale, m, m_scale, m_narrow = run.add(o, updates, x, norms.after_attention, *of_h)
    if block.shares_norm:
        m, m_narrow = n, run.products(n, block.gates)
    elif block.is_parallel:
        _, _, m, m_scale, m_narrow = run.add(
            x, [None for _ in run.parts], None, None, norms.before_feed_forward, block.gates
        )
    kept = Kept(*(x.new_empty(0) for _ in Kept._fields))._replace(
        n_scale=n_scale,
        q_raw=if_needed(q_raw, norms.q),
        q_scale=q_scale,
        k_raw=if_needed(k_raw, norms.k),
        k_scale=k_scale,
        q=if_needed(q, not norms.q),
        k=if_needed(k, not norms.k),
        v=v,
        out=out,
        o=if_needed(o, norms.after_attention),
        o_scale=o_scale,
        h=if_needed(h, not block.is_parallel, block.has_feed_forward, not norms.after_attention),
        m_scale=m_scale,
    )
    if not block.has_feed_forward:
        return [h, m], [*kept, *n_narrow, *out_narrow, *entropies]
    y, of_feed_forward, gated_narrow = _feed_forward(run, h, m, m_narrow)
    kept = kept._replace(**of_feed_forward)
    return [y], [*kept, *n_narrow, *out_narrow, *entropies, *m_narrow, *gated_narrow]


def _feed_forward(
    run: Pass, h: Tensor, m: Tensor, m_narrow: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Returns y, the fields of `Kept` that the feed-forward block writes, and the product of the
    input of `down` with its A, of each part."""
    block, norm = run.block, run.block.norms.after_feed_forward
    gate, *ups = (run.product(number, m) for number in block.gates)
    up = ups[0] if ups else None
    gated, gated_narrow = torch.empty_like(gate), run.narrow([block.down])
    for part, own_m_narrow, own_gated_narrow in zip(run.parts, m_narrow, gated_narrow, strict=True):
        of_gate, *of_up = part.all_output_factors(block.gates, own_m_narrow)
        block_calls.gate_forward(
            gate[part.rows],
            None if up is None else up[part.rows],
            gated[part.rows],
            of_gate,
            of_up[0] if of_up else None,
            part.input_factors([block.down], own_gated_narrow),
            activation=block.activation,
        )
    d, updates = run.product(block.down, gated), run.output_factors(block.down, gated_narrow)
    y, d_scale, *_ = run.add(d, updates, h, norm, None)
    kept = {
        "gate": gate,
        "up": h.new_empty(0) if up is None else up,
        "d": if_needed(d, norm),
        "d_scale": d_scale,
    }
    return y, kept, gated_narrow


def if_needed(x: Tensor, *conditions: object) -> Tensor:
    """Returns x if all conditions hold, otherwise an empty tensor."""
    return x if all(conditions) else x.new_empty(0)


def backward(
    block: Block,
    x: Tensor,
    h: Tensor | None,
    factors: Sequence[Tensor],
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    grad_factors: Sequence[Tensor],
    *,
    needs_x: bool,
    add: bool,
) -> list[Tensor]:
    """Returns the gradient of x if it is needed.

    h             what forward returned of a layer without its feed-forward block
    saved         what forward returned for backward
    grads         gradients of what forward returned
    grad_factors  where the gradients of the factors are written; `add` adds to what they hold
    """
    run = BackwardPass(block, x, factors, grad_factors)
    norms, rest = block.norms, iter(saved)
    kept = Kept(*(next(rest) for _ in Kept._fields))
    n_narrow, out_narrow = ([next(rest) for _ in run.parts] for _ in range(2))
    entropies = [
        next(rest) for part in run.parts for _ in range(2 if part.part.layout.prompt else 1)
    ]
    grad = grads[0]
    if h is not None:
        kept, grad_m, grad_m_narrow = kept._replace(h=h), grads[1], run.narrow(())
        n = run.recompute_norm(norms.before_attention, x, n_narrow)
    else:
        m_narrow, gated_narrow = ([next(rest) for _ in run.parts] for _ in range(2))
        if norms.after_attention:
            kept = kept._replace(h=run.recompute_sum(kept.o))
        grads_of_gates, grad_m_narrow = _through_feed_forward(run, kept, grad, gated_narrow, add)
        of_n = [*n_narrow, *m_narrow] if block.shares_norm else n_narrow
        n = run.recompute_norm(norms.before_attention, x, of_n)
        m, normed = n, x if block.is_parallel else kept.h
        if not block.shares_norm:
            m = run.recompute_norm(norms.before_feed_forward, normed, m_narrow)
        run.write(block.gates, m, grad_m_narrow, grads_of_gates, m_narrow, add=add)
        grad_m = run.input_gradient(block.gates, grads_of_gates)
    if block.is_parallel:
        grad_h, (grad_o, grad_narrow) = grad, run.through_last_norm(block.o, grad, None, grad, grad)
        if block.shares_norm:
            run.add_updates(grad_m, block.gates, grad_m_narrow)
        else:
            run.through_norm(
                grad_m, block.gates, grad_m_narrow, norms.before_feed_forward, x, kept.m_scale, grad
            )
            grad_h = grad_m
    else:
        grad_h = grad_m if block.has_feed_forward else torch.empty_like(grad_m)
        grad_o, grad_narrow = run.through_norms(grad_m, grad_m_narrow, grad, kept, grad_h)
    run.write([block.o], kept.out.view(len(x), -1), grad_narrow, [grad_o], out_narrow, add=add)
    grad_out = run.input_gradient([block.o], [grad_o])
    grad_heads = attention_gradients(run, grad_out, grad_narrow, kept, iter(entropies))
    own_grads, grad_narrow = head_gradients(run, grad_heads, kept)
    run.write(block.heads, n, grad_narrow, own_grads, n_narrow, add=add)
    if not needs_x:
        return []
    grad_x = run.input_gradient(block.heads, own_grads, grad_m if block.shares_norm else None)
    run.through_norm(
        grad_x, block.heads, grad_narrow, norms.before_attention, x, kept.n_scale, grad_h
    )
    return [grad_x]


def _through_feed_forward(
    run: BackwardPass, kept: Kept, grad: Tensor, gated_narrow: Sequence[Tensor], add: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Writes the gradients of the factors of `down`. Returns the gradients of gate and up, and
    their products with B of each part."""
    block, down = run.block, [run.block.down]
    norm = block.norms.after_feed_forward
    grad_d, grad_narrow = run.through_last_norm(block.down, grad, norm, kept.d, kept.d_scale)
    grad_gate = run.input_gradient(down, [grad_d])
    up, grad_up = (None, None) if len(block.gates) == 1 else (kept.up, torch.empty_like(kept.up))
    gated = run.recompute_gated(kept, gated_narrow)
    run.write(down, gated, grad_narrow, [grad_d], gated_narrow, add=add)
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
            update=part.input_factors(down, own_grad_narrow),
            of_gate=of_gate,
            of_up=of_up[0] if of_up else None,
            activation=block.activation,
        )
    return [grad_gate] if grad_up is None else [grad_gate, grad_up], grad_m_narrow
