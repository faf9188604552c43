"""Packed attention by the compiled kernels: bf16 on processors that multiply bf16 pairs
(native/attention/attention.c), on AMX tiles where there are some
(native/attention/attention_tiles.c), float32 on any (native/attention/attention_float.c).

The function of kernels/attention/packed.py for models without sinks. Nothing is
padded to a rectangle, scores that causality or the window hides are not computed, and only a few
rows of scores are in memory at a time. Backward keeps q, k, v, the output and one float32 for each
row and head. The prompt with itself is one call, the documents, which see the whole prompt, are
another. On tiles a row's mean gradient is summed over its rounded output.

Shapes: R rows of a part, H query heads, K key heads, D head size, P keys of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings import attention_calls
from veneer.kernels.bindings.library import has_bf16_products, has_floats, note_flops, on_cpu
from veneer.kernels.bindings.rank_calls import PAIR_BYTES
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules

TASKS = 8
"""If there are fewer documents times key heads, they are split by query rows, so that all threads
have work. Each share holds gradients of all keys, which are summed at the end, so more shares take
longer on few threads."""
HELD_BYTES = 64 * 2**20
"""Most memory for the gradients of shared keys, one per document, before they are summed."""


def usable(q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules) -> bool:
    """True if a kernel computes these: a type that this processor has a kernel for, one head size,
    whole groups of heads."""
    if rules.sinks is not None or (rules.softcap is not None and rules.softcap <= 0):
        return False
    dtype = q.dtype
    if any(x.dtype is not dtype or not on_cpu(x) or x.dim() != 3 for x in (q, k, v)):
        return False
    rows, heads, size = q.shape
    if size % 16 or not k.numel() or k.shape != v.shape or (k.shape[0], k.shape[2]) != (rows, size):
        return False
    if heads % k.shape[1] or (rules.window is not None and rules.window < 1):
        return False
    if dtype is torch.bfloat16:
        return has_bf16_products()
    return dtype is torch.float32 and has_floats()


@dataclass(frozen=True)
class AttentionInputs:
    """Documents, and the prompt's keys and values, which all of them see.

    q                   (R, H, D)
    k, v                (R, K, D)
    before_k, before_v  (P, K, D), or None without a prompt
    starts              first row of every document, then R; int64 on the CPU
    longest             rows of the longest document
    """

    q: Tensor
    k: Tensor
    v: Tensor
    before_k: Tensor | None
    before_v: Tensor | None
    starts: Tensor
    longest: int
    rules: AttentionRules

    def _splits(self, docs: int) -> int:
        return max(1, min(TASKS // max(1, docs * self.k.shape[1]), self.longest // 64))

    def _product_flops(self) -> int:
        before = 0 if self.before_k is None else len(self.before_k)
        return self.rules.product_flops(self.q, before, self.starts.diff().tolist())

    def _before(self) -> tuple[Tensor, Tensor] | None:
        if self.before_k is None or self.before_v is None:
            return None
        return self.before_k, self.before_v

    def forward(self, out: Tensor) -> Tensor:
        """Writes (R, H, D) to the contiguous `out`; returns the log-sum-exp (R, H), float32."""
        lse = torch.empty(self.q.shape[:2], dtype=torch.float32, device=self.q.device)
        note_flops(lambda: 2 * self._product_flops())
        attention_calls.attention_forward(
            self.q,
            self.k,
            self.v,
            self._before(),
            self.starts,
            out,
            lse,
            scale=self.rules.scale,
            window=self.rules.window,
            softcap=self.rules.softcap,
            splits=self._splits(len(self.starts) - 1),
        )
        return lse

    def backward(
        self,
        out: Tensor,
        grad: Tensor,
        lse: Tensor,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor,
        more: Tensor | None,
    ) -> Tensor | None:
        """Writes the gradients of q, k and v in q's type; returns those of before_k and before_v.

        out      (R, H, D), as forward wrote it
        grad     (R, H, D)
        more     (2, R, K, D): gradients to add to those of k and v, or None
        returns  (2, P, K, D) float32, or None without a prompt
        """
        docs, (rows, _, D), K = len(self.starts) - 1, self.q.shape, self.k.shape[1]
        splits = self._splits(docs)
        note_flops(lambda: 5 * self._product_flops())
        device = self.q.device
        own = torch.empty(2, splits, rows, K, D, device=device)
        P = 0 if self.before_k is None else self.before_k.shape[0]
        shared = torch.empty(2, P, K, D, device=device)
        most = max(1, HELD_BYTES // max(1, 8 * splits * K * P * D))
        for start in range(0, docs, most):
            stop = min(start + most, docs)
            of_documents = torch.empty(2, stop - start, splits, K, P, D, device=device)
            attention_calls.attention_backward(
                self.q,
                self.k,
                self.v,
                self._before(),
                self.starts[start : stop + 1],
                out,
                grad,
                lse,
                grad_q=grad_q,
                own=own,
                shared=of_documents,
                scale=self.rules.scale,
                window=self.rules.window,
                softcap=self.rules.softcap,
                splits=splits,
            )
            if P:
                attention_calls.attention_shared(of_documents, shared, add=start > 0)
        attention_calls.attention_summed(own, more, grad_k, grad_v)
        return shared if P else None


def aligned(x: Tensor) -> Tensor:
    """Returns x as the kernel reads it: neighbours in bf16 are pairs in one word."""
    even = x.element_size() == PAIR_BYTES or (x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0)
    fits = even and x.stride(-1) == 1 and x.data_ptr() % PAIR_BYTES == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
    ) -> Tensor:
        q, k, v = aligned(q), aligned(k), aligned(v)
        out, entropies = packed_forward(q, k, v, layout, rules)
        ctx.save_for_backward(q, k, v, out, *entropies)
        ctx.layout, ctx.rules = layout, rules
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *entropies = ctx.saved_tensors
        grad = aligned(grad)
        gradients = packed_backward(q, k, v, out, entropies, grad, ctx.layout, ctx.rules)
        return *gradients, None, None


def packed_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Group,
    rules: AttentionRules,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the output (N, H, D) of aligned rows, zeros on filler, and the log-sum-exps for
    backward.

    out: the output is written there instead of to a fresh tensor
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    attention_calls.zeros(out, layout.rows)
    return out, [part.forward(out[rows]) for rows, part in _parts(q, k, v, layout, rules)]


def packed_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    entropies: Sequence[Tensor],
    grad: Tensor,
    layout: Group,
    rules: AttentionRules,
    *,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the contiguous gradients of q, k and v, zeros on filler.

    into: they are written there instead of to fresh tensors
    """
    grad_q, grad_k, grad_v = into or [
        torch.empty(values.shape, dtype=q.dtype, device=q.device) for values in (q, k, v)
    ]
    for gradient in (grad_q, grad_k, grad_v):
        attention_calls.zeros(gradient, layout.rows)
    of_prompt: Tensor | None = None
    # Documents come first: their gradients of the prompt's keys join the prompt's own part.
    parts = zip(_parts(q, k, v, layout, rules), entropies, strict=True)
    for (rows, part), lse in reversed(list(parts)):
        of_prompt = part.backward(
            out[rows], grad[rows], lse, grad_q[rows], grad_k[rows], grad_v[rows], of_prompt
        )
    return grad_q, grad_k, grad_v


def _parts(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
) -> list[tuple[slice, AttentionInputs]]:
    """Returns rows and inputs of the prompt, if there is one, then of the documents."""
    P = layout.prompt
    rows = slice(P, layout.rows)
    prompt_k, prompt_v = (k[:P], v[:P]) if P else (None, None)
    documents = AttentionInputs(
        q[rows], k[rows], v[rows], prompt_k, prompt_v, layout.starts, max(layout.lengths), rules
    )
    if not P:
        return [(rows, documents)]
    alone = document_starts(layout)[1]
    return [
        (slice(0, P), AttentionInputs(q[:P], k[:P], v[:P], None, None, alone, P, rules)),
        (rows, documents),
    ]


def document_starts(layout: Group) -> tuple[Tensor, Tensor]:
    """Returns the starts of the documents, and those of the prompt as the only document."""
    if "starts" not in layout.derived:
        layout.derived["starts"] = layout.starts, torch.tensor([0, layout.prompt])
    return layout.derived["starts"]


def native_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
) -> Tensor:
    """Computes packed_attention of usable tensors: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
    return _NativeAttention.apply(q, k, v, layout, rules)
