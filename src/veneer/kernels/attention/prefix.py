"""Attention with trained keys and values in front of every document: prefix tuning.

    keys:  [ prefix: M ][ prompt: P ][ document i: L_i ]       softmax(softcap(scale q k^T) + mask,
           sink) v

The prefix is part of the shared prompt, except that it has no queries. So this is packed attention
with a prompt of M + P rows whose first M queries are zeros and whose first M outputs are dropped.
Gradients of the prefix are summed over the documents, like those of the prompt. The M unused rows
cost M (M + P) products a head, which is little.

The prefix takes places 0..M-1 and the prompt starts at place M, so windows count the prefix as
transformers' caches do: a row at place p sees the prefix's key j if p - j < window. Shapes: H query
heads, K key/value heads, N packed rows, D head size, M prefix, P prompt.
"""

import torch
from torch import Tensor

from veneer.kernels.attention.packed import packed_attention
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules


def prefixed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    layout: Group,
    rules: AttentionRules,
) -> Tensor:
    """Attends q (N, H, D) to k and v (N, K, D) and to prefix_k and prefix_v (M, K, D): (N, H,
    D)."""
    M = prefix_k.shape[0]
    out = packed_attention(
        torch.cat([q.new_zeros(M, *q.shape[1:]), q]),
        torch.cat([prefix_k, k]),
        torch.cat([prefix_v, v]),
        layout.behind(M),
        rules,
    )
    return out[M:]


def prefixed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    layout: Group,
    rules: AttentionRules,
) -> Tensor:
    """Computes prefixed_attention plainly: one row and head at a time."""
    P, groups = layout.prompt, q.shape[1] // k.shape[1]
    window, softcap, sinks = rules.window, rules.softcap, rules.sinks
    starts = [(0, 0, P)]  # first row of a document, rows of the prompt that it sees, its length
    for length in layout.lengths:
        starts.append((starts[-1][0] + starts[-1][2], P, length))
    rows = []
    for start, shared, length in starts:
        for i in range(length):
            visible = [*range(shared), *range(start, start + i + 1)]
            keys, values = torch.cat([prefix_k, k[visible]]), torch.cat([prefix_v, v[visible]])
            first = 0 if window is None else max(0, len(keys) - window)
            heads = []
            for h in range(q.shape[1]):
                scores = keys[first:, h // groups] @ q[start + i, h] * rules.scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1]])
                probabilities = torch.softmax(scores, dim=0)[: len(keys) - first]
                heads.append(probabilities @ values[first:, h // groups])
            rows.append(torch.stack(heads))
    filler = q.new_zeros(q.shape[0] - layout.rows, *q.shape[1:])
    return torch.cat([torch.stack(rows), filler])
