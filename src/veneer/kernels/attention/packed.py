"""Attention over packed documents that share a prompt.

    softmax(softcap(scale q k^T) + mask, sink) v

A row of the prompt attends causally to the prompt. Row i of a document attends to the whole prompt
and to rows 0..i of its own document.

This file computes batched matrix products over blocks of query rows. At the lengths of fine-tuning
rows that is several times faster on a CPU than torch's fused flash kernel, most of all in backward
(docs/log.md). It repeats no keys for grouped query heads, and knows windows, soft caps and sinks.
On processors that multiply bf16 pairs a compiled kernel takes its place
(kernels/attention/compiled.py), on CUDA torch's flash kernels (kernels/attention/flash.py) or its
flex attention (kernels/attention/flex.py). Backward keeps q, k and v alone and recomputes the
probabilities of one block at a time.

Shapes: H query heads, K key/value heads, G = H / K, N packed rows, D head size (E that of the
values, if it differs), L longest document, P prompt, B batch.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.attention import flex
from veneer.kernels.attention.compiled import native_attention, usable
from veneer.kernels.attention.flash import declined, flash_attention
from veneer.kernels.layout import Group, round_up
from veneer.kernels.rules import AttentionRules
from veneer.private.torch import SOFTMAX_BACKWARD

BLOCK = 256
"""Query rows per block. It limits the scores in memory to docs * H * BLOCK * (P + L) values."""


def _probabilities(
    q: Tensor,
    k: Tensor,
    sinks: Tensor | None,
    rules: AttentionRules,
    *,
    first: int,
    place: int,
    groups: int,
) -> tuple[Tensor, Tensor | None]:
    """Computes softmax: q (B, G * rows, D), k (B, keys, D) -> probabilities (B, G * rows, keys, + 1
    with sinks), and the tanh of the soft cap. Sinks are trained values, so they come with the
    tensors.

    Row i of every group is at position place + i, the keys are at `first` and behind it.
    """
    capped = None
    if rules.softcap is None:
        unread = q.new_empty(1, 1, 1)  # not read, because beta is 0
        scores = torch.baddbmm(unread, q, k.transpose(1, 2), beta=0, alpha=rules.scale)
    else:
        capped = torch.bmm(q, k.transpose(1, 2)).mul_(rules.scale / rules.softcap).tanh_()
        scores = capped * rules.softcap
    _hide(scores.unflatten(1, (groups, -1)), place - first, rules.window)
    if sinks is not None:  # one more column, which takes probability and has no value
        scores = torch.cat([scores, sinks.expand(scores.shape[0], -1, 1)], dim=-1)
    return torch.softmax(scores, dim=-1), capped


def _hide(scores: Tensor, own: int, window: int | None) -> None:
    """Sets scores (B, G, rows, keys) that a row does not see to -inf, in place.

    The key of row i is number own + i. Every row of a block sees most keys: only the triangles
    at both ends are masked.
    """
    rows, keys = scores.shape[-2:]
    later = torch.ones(rows, keys - own - 1, dtype=torch.bool, device=scores.device).triu_()
    scores[..., own + 1 :].masked_fill_(later, float("-inf"))
    if window is not None and (width := rows + own - window) > 0:
        before = torch.ones(rows, width, dtype=torch.bool, device=scores.device).tril_(own - window)
        scores[..., :width].masked_fill_(before, float("-inf"))


def _grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """Stacks the query heads of each key head: (docs, L, H, D) -> (docs * K, G * L, D)."""
    docs, length, heads, size = rows.shape
    split = rows.view(docs, length, kv_heads, heads // kv_heads, size)
    return split.permute(0, 2, 3, 1, 4).reshape(docs * kv_heads, -1, size)


def _ungrouped(rows: Tensor, docs: int, kv_heads: int, length: int) -> Tensor:
    """Inverts _grouped: (docs * K, G * L, D) -> (docs, L, H, D)."""
    split = rows.view(docs, kv_heads, -1, length, rows.shape[-1])
    return split.permute(0, 3, 1, 2, 4).reshape(docs, length, -1, rows.shape[-1])


def _square(rows: Tensor, layout: Group) -> Tensor:
    """Cuts out the documents, padded to one length: (N, heads, D) -> (docs, L, heads, D)."""
    documents = rows[layout.prompt : layout.rows]
    if layout.to_square is not None:
        documents = documents.index_select(0, layout.to_square)
    return documents.view(len(layout.lengths), layout.longest, *rows.shape[1:])


def _square_gradient(square: Tensor, layout: Group) -> Tensor:
    """Drops the padding of documents: (docs, L, heads, D) -> (sum of L, heads, D)."""
    flat = square.reshape(-1, *square.shape[2:])
    return flat if layout.from_square is None else flat.index_select(0, layout.from_square)


def _keys(rows: Tensor, layout: Group) -> Tensor:
    """Joins the prompt's keys and each document's: (N, K, D) -> (docs * K, keys, D).

    Zeros fill up a multiple of 32: softmax over another width is 1.6 times slower on a CPU.
    """
    square = _square(rows, layout)
    docs, length, heads, size = square.shape
    end = layout.prompt + length
    keys = rows.new_zeros(docs, heads, round_up(end), size)
    keys[:, :, layout.prompt : end] = square.transpose(1, 2)
    keys[:, :, : layout.prompt] = rows[: layout.prompt].transpose(0, 1)
    return keys.view(docs * heads, -1, size)


def _prompt_keys(rows: Tensor, layout: Group) -> Tensor:
    """Cuts out the prompt's keys, with zeros up to a multiple of 32: (N, K, D) -> (K, keys, D)."""
    keys = rows.new_zeros(rows.shape[1], round_up(layout.prompt), rows.shape[2])
    keys[:, : layout.prompt] = rows[: layout.prompt].transpose(0, 1)
    return keys


def _blocks(length: int) -> list[tuple[int, int]]:
    """Returns (start, stop) of the query blocks of a document of `length` rows."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _rows(grouped: Tensor, groups: int, start: int, stop: int) -> Tensor:
    """Cuts rows start..stop out of every group: (B, G * L, D) -> (B, G * rows, D)."""
    length = grouped.shape[1] // groups
    if start == 0 and stop == length:
        return grouped
    batch, _, size = grouped.shape
    return grouped.view(batch, groups, length, size)[:, :, start:stop].reshape(batch, -1, size)


@dataclass(frozen=True)
class _Rectangle:
    """A rectangle of attention: the prompt with itself, or all documents with prompt and
    themselves."""

    rules: AttentionRules
    q: Tensor
    k: Tensor
    v: Tensor
    prompt: int
    groups: int

    @property
    def length(self) -> int:
        return self.q.shape[1] // self.groups

    def _window_start(self, start: int) -> int:
        """Returns the first key that a row of this block sees; earlier keys are not multiplied."""
        window = self.rules.window
        return 0 if window is None else max(0, self.prompt + start - window + 1)

    def _block(
        self, start: int, stop: int, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        first, last = self._window_start(start), round_up(self.prompt + stop)
        q = _rows(self.q, self.groups, start, stop)
        k, v = self.k[:, first:last], self.v[:, first:last]
        if sinks is not None:
            rows = stop - start
            heads = sinks.view(-1, self.groups).repeat(q.shape[0] * self.groups // sinks.numel(), 1)
            sinks = heads.repeat_interleave(rows, dim=1)[..., None]
        place, groups = self.prompt + start, self.groups
        return (
            *(q, k, v),
            *_probabilities(q, k, sinks, self.rules, first=first, place=place, groups=groups),
        )

    def forward(self, sinks: Tensor | None) -> Tensor:
        out = self.q.new_empty(*self.q.shape[:2], self.v.shape[2])
        view = out.view(out.shape[0], self.groups, self.length, -1)
        for start, stop in _blocks(self.length):
            _, _, v, probabilities, _ = self._block(start, stop, sinks)
            if sinks is not None:
                probabilities = probabilities[..., :-1]
            view[:, :, start:stop] = torch.bmm(probabilities, v).view(
                out.shape[0], self.groups, stop - start, -1
            )
        return out

    def backward(
        self, grad: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        grad_q, grad_k, grad_v = (
            torch.empty_like(self.q),
            torch.zeros_like(self.k),
            torch.zeros_like(self.v),
        )
        grad_sinks = None if sinks is None else torch.zeros_like(sinks)
        view = grad_q.view(grad_q.shape[0], self.groups, self.length, -1)
        for start, stop in _blocks(self.length):
            first, last = self._window_start(start), round_up(self.prompt + stop)
            q, k, v, probabilities, capped = self._block(start, stop, sinks)
            g = _rows(grad, self.groups, start, stop)
            of_values = probabilities if sinks is None else probabilities[..., :-1]
            grad_v[:, first:last] += torch.bmm(of_values.transpose(1, 2), g)
            grad_p = torch.bmm(g, v.transpose(1, 2))
            if sinks is not None:
                grad_p = F.pad(grad_p, (0, 1))
            grad_s = SOFTMAX_BACKWARD(grad_p, probabilities, -1, probabilities.dtype)
            if sinks is not None and grad_sinks is not None:
                per_row = grad_s[..., -1].view(
                    -1, sinks.numel() // self.groups, self.groups, stop - start
                )
                grad_sinks += per_row.sum(dim=(0, 3)).view(-1)
                grad_s = grad_s[..., :-1]
            grad_s = grad_s if capped is None else grad_s * (1 - capped * capped)
            block_q = torch.bmm(grad_s, k).mul_(self.rules.scale)
            view[:, :, start:stop] = block_q.view(block_q.shape[0], self.groups, stop - start, -1)
            grad_k[:, first:last] += torch.bmm(grad_s.transpose(1, 2), q).mul_(self.rules.scale)
        return grad_q, grad_k, grad_v, grad_sinks


def _parts(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
) -> list[_Rectangle]:
    """Returns the rectangle of the prompt, if there is one, and that of the documents."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    parts = []
    if P := layout.prompt:
        prompt_k, prompt_v = _prompt_keys(k, layout), _prompt_keys(v, layout)
        prompt_q = _grouped(q[None, :P], kv_heads)
        parts.append(_Rectangle(rules, prompt_q, prompt_k, prompt_v, 0, groups))
    square_q = _grouped(_square(q, layout), kv_heads)
    parts.append(_Rectangle(rules, square_q, _keys(k, layout), _keys(v, layout), P, groups))
    return parts


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        layout: Group,
        rules: AttentionRules,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.layout, ctx.rules = layout, replace(rules, sinks=None)
        out = q.new_empty(*q.shape[:2], v.shape[2])
        parts = _parts(q, k, v, layout, rules)
        documents = parts[-1].forward(sinks)
        out[layout.rows :] = 0
        out[layout.prompt : layout.rows] = _square_gradient(
            _ungrouped(documents, len(layout.lengths), k.shape[1], layout.longest), layout
        )
        if layout.prompt:
            out[: layout.prompt] = _ungrouped(
                parts[0].forward(sinks), 1, k.shape[1], layout.prompt
            )[0]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        q, k, v, sinks = ctx.saved_tensors
        layout: Group = ctx.layout
        P, docs, kv_heads = layout.prompt, len(layout.lengths), k.shape[1]
        parts = _parts(q, k, v, layout, ctx.rules)
        square = _square(grad, layout)
        if layout.from_square is not None:
            # Padding repeats a real row, whose gradient must not count twice.
            square = torch.zeros_like(square)
            square.flatten(0, 1).index_copy_(0, layout.from_square, grad[P : layout.rows])
        d_q, d_k, d_v, d_sinks = parts[-1].backward(_grouped(square, kv_heads), sinks)
        grad_q, grad_k, grad_v = (
            torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)
        )
        grad_q[P : layout.rows] = _square_gradient(
            _ungrouped(d_q, docs, kv_heads, layout.longest), layout
        )
        for filler in (grad_q, grad_k, grad_v):
            filler[layout.rows :] = 0
        for target, value in ((grad_k, d_k), (grad_v, d_v)):
            split = value.view(docs, kv_heads, round_up(P + layout.longest), -1)
            target[P : layout.rows] = _square_gradient(
                split[:, :, P : P + layout.longest].transpose(1, 2), layout
            )
            if P:  # every document sees the prompt, whose gradient is the sum over documents
                wide = torch.promote_types(target.dtype, torch.float32)
                target[:P] = split[:, :, :P].sum(dim=0, dtype=wide).transpose(0, 1).to(target.dtype)
        if P:
            p_q, p_k, p_v, p_sinks = parts[0].backward(_grouped(grad[None, :P], kv_heads), sinks)
            grad_q[:P] = _ungrouped(p_q, 1, kv_heads, P)[0]
            grad_k[:P] += p_k[:, :P].transpose(0, 1)
            grad_v[:P] += p_v[:, :P].transpose(0, 1)
            d_sinks = None if d_sinks is None or p_sinks is None else d_sinks + p_sinks
        return grad_q, grad_k, grad_v, d_sinks, None, None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
) -> Tensor:
    """Attends: q (N, H, D), k (N, K, D), v (N, K, E) -> (N, H, E)."""
    if usable(q, k, v, rules):
        return native_attention(q, k, v, layout, rules)
    if declined(q, k, v, layout, rules) is None:
        return flash_attention(q, k, v, layout, rules)
    if flex.declined(q, k, v, layout, rules, plain_attention) is None:
        if q.is_meta:  # in a plan: it keeps the same tensors
            return flash_attention(q, k, v, layout, replace(rules, softcap=None))
        return flex.flex_packed_attention(q, k, v, layout, rules)
    return plain_attention(q, k, v, layout, rules)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
) -> Tensor:
    """Computes packed_attention by batched products, even where another path is faster."""
    return _PackedAttention.apply(q, k, v, rules.sinks, layout, rules)


def packed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
) -> Tensor:
    """Defines packed_attention, one document at a time in plain torch."""
    P, groups = layout.prompt, q.shape[1] // k.shape[1]
    window, softcap, sinks = rules.window, rules.softcap, rules.sinks
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    def attend(rows: Tensor, start: int) -> Tensor:
        """rows: indices of the prompt and a document; those before `start` are keys alone."""
        scores = torch.einsum("ihd,jhd->hij", q[rows[start:]], k[rows]) * rules.scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(len(rows))
        seen = place[None] <= place[start:, None]
        if window is not None:
            seen = seen & (place[None] > place[start:, None] - window)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat(
                [scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], dim=-1
            )
        probabilities = torch.softmax(scores, dim=-1)[..., : len(rows)]
        return torch.einsum("hij,jhd->ihd", probabilities, v[rows])

    prompt = torch.arange(P)
    out = [attend(prompt, 0)] if P else []
    start = P
    for length in layout.lengths:
        out.append(attend(torch.cat([prompt, torch.arange(start, start + length)]), P))
        start += length
    filler = q.new_zeros(q.shape[0] - layout.rows, q.shape[1], v.shape[2])
    return torch.cat([*out, filler])
