"""What torch's flash kernels compute, exactly and one sequence at a time: put in their place where
there is no CUDA."""

from itertools import pairwise

import torch

from veneer.kernels.attention.flash import FlashOps


class Exact(FlashOps):
    """kernels/attention/flash.py's Aten, in the inputs' own type."""

    def forward(self, q, k, v, spans, scale):
        out, entropy = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])
        for queries, keys in sequences(spans):
            scores = masked(q[queries], k[keys], spans, scale)
            entropy[:, queries] = torch.logsumexp(scores, dim=-1)
            weights = torch.exp(scores - entropy[:, queries, None])
            out[queries] = torch.einsum("hij,jhd->ihd", weights, repeated(v[keys], q))
        return out, entropy, (torch.zeros(2), torch.zeros(0))

    def backward(self, grad, inputs, out, entropy, state, spans, scale):
        q, k, v = inputs
        assert len(state) == 2
        d_q, d_k, d_v = (torch.zeros_like(tensor) for tensor in inputs)
        given = (grad * out).sum(-1).T  # (H, rows): of the whole row, whatever part of it this is
        for queries, keys in sequences(spans):
            scores = masked(q[queries], k[keys], spans, scale)
            weights = torch.exp(scores - entropy[:, queries, None])
            d_weights = torch.einsum("ihd,jhd->hij", grad[queries], repeated(v[keys], q))
            d_scores = weights * (d_weights - given[:, queries, None]) * scale
            d_q[queries] = torch.einsum("hij,jhd->ihd", d_scores, repeated(k[keys], q))
            d_k[keys] += summed(torch.einsum("hij,ihd->jhd", d_scores, q[queries]), k)
            d_v[keys] += summed(torch.einsum("hij,ihd->jhd", weights, grad[queries]), v)
        return d_q, d_k, d_v


def sequences(spans):
    ends = list(zip(spans.query_ends.tolist(), spans.key_ends.tolist(), strict=True))
    assert ends[0] == (0, 0)
    assert spans.longest_query == max(b[0] - a[0] for a, b in pairwise(ends))
    assert spans.longest_key == max(b[1] - a[1] for a, b in pairwise(ends))
    for (q_start, k_start), (q_end, k_end) in pairwise(ends):
        yield slice(q_start, q_end), slice(k_start, k_end)


def masked(q, k, spans, scale):
    """(H, rows, keys), the last row beside the last key."""
    scores = torch.einsum("ihd,jhd->hij", q, repeated(k, q)) * scale
    rows, keys = (
        torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0],
        torch.arange(k.shape[0])[None],
    )
    hidden = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    if spans.causal:
        hidden |= keys > rows
    if spans.before is not None:
        hidden |= keys < rows - spans.before
    return scores.masked_fill(hidden, float("-inf"))


def repeated(keys, q):
    return keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)


def summed(grad, like):
    """(keys, H, D) -> (keys, K, D)."""
    return grad.view(grad.shape[0], like.shape[1], -1, grad.shape[2]).sum(2)
