"""Packed attention by the compiled kernels: bf16 on processors that multiply bf16 pairs
(native/attention/attention.c), on AMX tiles where there are some
(native/attention/attention_tiles.c), float32 on any (native/attention/attention_float.c).

The same function as kernels/attention/packed.py's, for models without soft caps and sinks: no
padding to a rectangle, nothing computed that causality or the window hides, scores of a few rows at
a time. Kept for backward: q, k, v, what came out and one float32 a row and head. Each part is one
call: the prompt with itself; the documents, which see the prompt whole. On tiles a row's mean
gradient is summed over its output as it was rounded. Shapes: R rows of a part, H query heads, K key
heads, D head size, P keys seen whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings import attention_calls
from veneer.kernels.bindings.library import has_bf16, has_floats, note_flops, on_cpu
from veneer.kernels.bindings.rank_calls import PAIR_BYTES
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules

TASKS = 8
"""Fewer documents times key heads than this are split by query rows, so that all threads have work.
Each share holds gradients of all keys, which are summed up: more of them take longer on few
threads."""
HELD_BYTES = 64 * 2**20
"""Most memory for the gradients of shared keys, one per document, before they are summed."""


def usable(q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules) -> bool:
    """Whether a kernel computes what these are: of a type that has one on this processor, one head
    size, whole groups of heads."""
    if rules.softcap is not None or rules.sinks is not None:
        return False
    dtype = q.dtype
    if any(x.dtype is not dtype or not on_cpu(x) or x.dim() != 3 for x in (q, k, v)):
        return False
    rows, heads, size = q.shape
    if size % 16 or not k.numel() or k.shape != v.shape or (k.shape[0], k.shape[2]) != (rows, size):
        return False
    if heads % k.shape[1] or (rules.window is not None and rules.window < 1):
        return False
    return has_bf16() if dtype is torch.bfloat16 else dtype is torch.float32 and has_floats()


@dataclass(frozen=True)
class AttentionInputs:
    """Documents and the keys that all of them see whole.

    q (R, H, D), k and v (R, K, D); before_k and before_v (P, K, D) or None
    starts: first row of every document, then R; int64 on the CPU. longest: of the documents, rows
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
        """FLOP of one q k^T over the keys that each query row sees. Forward takes two such
        products, backward five."""
        before, pairs = 0 if self.before_k is None else self.before_k.shape[0], 0
        for length in (self.starts[1:] - self.starts[:-1]).tolist():
            most = self.rules.window or before + length
            rising = min(
                length, max(0, most - before)
            )  # rows that see one key more than the row above
            pairs += rising * before + rising * (rising + 1) // 2 + (length - rising) * most
        return 2 * pairs * self.q.shape[1] * self.q.shape[2]

    def _before(self) -> tuple[Tensor, Tensor] | None:
        return (
            None
            if self.before_k is None or self.before_v is None
            else (self.before_k, self.before_v)
        )

    def forward(self, out: Tensor) -> Tensor:
        """Write (R, H, D) to the contiguous `out`; returns the log-sum-exp (R, H), float32, for
        backward."""
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
        """out: what forward wrote, grad (R, H, D), more (2, R, K, D) or None: gradients of k and v
        from elsewhere -> those of before_k and before_v (2, P, K, D) float32. The others are
        written, in q's type."""
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
            held = torch.empty(2, stop - start, splits, K, P, D, device=device)
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
                shared=held,
                scale=self.rules.scale,
                window=self.rules.window,
                splits=splits,
            )
            if P:
                attention_calls.attention_shared(held, shared, add=start > 0)
        attention_calls.attention_summed(own, more, grad_k, grad_v)
        return shared if P else None


def aligned(x: Tensor) -> Tensor:
    """x as the kernel reads it: bf16 neighbours in pairs, one word each."""
    even = x.element_size() == PAIR_BYTES or (x.stride(0) % 2 == 0 and x.stride(1) % 2 == 0)
    fits = even and x.stride(-1) == 1 and x.data_ptr() % PAIR_BYTES == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
    ) -> Tensor:
        q, k, v = aligned(q), aligned(k), aligned(v)
        out, kept = packed_forward(q, k, v, layout, rules)
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.layout, ctx.rules = layout, rules
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        return (
            *packed_backward(q, k, v, out, kept, aligned(grad), ctx.layout, ctx.rules),
            None,
            None,
        )


def packed_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
) -> tuple[Tensor, list[Tensor]]:
    """(N, H, D) of aligned rows, zeros on filler, and what `packed_backward` wants."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attention_calls.zeros(out, layout.rows)
    return out, [part.forward(out[rows]) for rows, part in _parts(q, k, v, layout, rules)]


def packed_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: Sequence[Tensor],
    grad: Tensor,
    layout: Group,
    rules: AttentionRules,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v, without gaps; zeros on filler."""
    found = [torch.empty(each.shape, dtype=q.dtype, device=q.device) for each in (q, k, v)]
    for each in found:
        attention_calls.zeros(each, layout.rows)
    from_documents: Tensor | None = None
    # The documents come first: what they send back to the prompt's keys joins the prompt's own
    # part.
    parts = zip(_parts(q, k, v, layout, rules), kept, strict=True)
    for (rows, part), lse in reversed(list(parts)):
        own = [each[rows] for each in found]
        from_documents = part.backward(
            out[rows], grad[rows], lse, own[0], own[1], own[2], from_documents
        )
    return found[0], found[1], found[2]


def _parts(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
) -> list[tuple[slice, AttentionInputs]]:
    """The prompt's part, if there is a prompt, then the documents'."""
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
    """Of the documents, and of the prompt as a document."""
    if "starts" not in layout.derived:
        layout.derived["starts"] = layout.starts, torch.tensor([0, layout.prompt])
    found: tuple[Tensor, Tensor] = layout.derived["starts"]
    return found


def native_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules
) -> Tensor:
    """packed_attention of kernels/attention/packed.py where it is `usable`: q (N, H, D), k and v
    (N, K, D) -> (N, H, D)."""
    apply: Any = _NativeAttention.apply
    return apply(q, k, v, layout, rules)
