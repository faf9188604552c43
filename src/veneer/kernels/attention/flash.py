"""Packed attention on CUDA by torch's flash kernels, which do not store scores.

    documents   each row attends causally to its own document: one call over all documents and the
                prompt
    prompt      each row of a document attends to the whole prompt: one call

The two results are joined by their log-sum-exp. Each backward gets the joint output and
log-sum-exp, so its probabilities are those of the whole row, and the gradients of both add up. A
window that ends within the prompt ends at another key for each row: then the last keys of the
prompt are copied in front of each document, and one call computes all. Sinks take their share of
the joint sum afterwards.

Saved for backward: q, k, v, the output, and one float32 per row and head. This has never run on a
GPU: on a CPU the tests replace the kernels by an exact function
(tests/support/kernels/flash_reference.py).
Shapes: as in kernels/attention/packed.py. S sequences.
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.library import note_flops, on_cuda
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules
from veneer.kernels.upload import sent
from veneer.private.torch import FLASH_BACKWARD, FLASH_FORWARD

MOST_SIZE = 256
"""Largest head size of the kernels."""
ON_FEW_GPUS = range(200, 225)
"""Head sizes whose backward torch 2.9 has only for A100 and H100."""
MOST_PLACES = 2**31
"""Most values of the backward's float32 sums (`_summed`): above, flash-attention's 32-bit offsets
overflow."""


@dataclass(frozen=True)
class SequenceEnds:
    """Sequences of queries and of keys, end to end.

    *_ends     (S + 1) int32, from 0
    longest_*  rows of the longest sequence
    causal     the last query of a sequence sees its last key
    before     number of earlier keys that a row sees; None: all
    """

    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    causal: bool
    before: int | None

    @classmethod
    def of(
        cls,
        queries: list[int],
        keys: list[int],
        device: torch.device,
        *,
        causal: bool = True,
        before: int | None = None,
    ) -> "SequenceEnds":
        ends = [list(accumulate(lengths, initial=0)) for lengths in (queries, keys)]
        both = sent(torch.tensor(ends, dtype=torch.int32), device)
        return cls(both[0], both[1], max(queries), max(keys), causal, before)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int, float, bool]:
        """Arguments of both kernels, without dropout."""
        return (
            self.query_ends,
            self.key_ends,
            self.longest_query,
            self.longest_key,
            0.0,
            self.causal,
        )

    @property
    def window(self) -> dict[str, int]:
        return (
            {} if self.before is None else {"window_size_left": self.before, "window_size_right": 0}
        )


def _summed(rows: int, sequences: int, heads: int, size: int) -> tuple[int, int, int]:
    """Returns the shape of backward's float32 sums of query gradients, with padding rows between
    sequences and heads as wide as its tiles."""
    return (
        rows + 128 * sequences,
        heads,
        -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64,
    )


def _held_by_backward(q: Tensor, k: Tensor, spans: SequenceEnds) -> tuple[Tensor, ...]:
    """Returns the temporary tensors of the backward kernel, for planning: the sums, one float per
    row and head, and key and value gradients of each query head."""
    sums = q.new_empty(
        _summed(len(q), len(spans.query_ends) - 1, *q.shape[1:]), dtype=torch.float32
    )
    per_head = (
        () if q.shape[1] == k.shape[1] else [k.new_empty(len(k), *q.shape[1:]) for _ in range(2)]
    )
    return sums, sums[..., 0].contiguous(), *per_head


class FlashOps:
    """aten::_flash_attention_forward and _backward. Tests replace them by an exact function."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spans: SequenceEnds, scale: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Returns output (rows, H, D), log-sum-exp (H, rows) float32, and state for backward."""
        results = FLASH_FORWARD(q, k, v, *spans.arguments, False, scale=scale, **spans.window)
        out, entropy, *state, _ = results
        return out, entropy, tuple(state)

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        entropy: Tensor,
        state: tuple[Tensor, ...],
        spans: SequenceEnds,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v. `out` and `entropy` are those of whole rows."""
        temporaries = _held_by_backward(*inputs[:2], spans) if grad.is_meta else ()
        gradients: tuple[Tensor, Tensor, Tensor] = FLASH_BACKWARD(
            grad, *inputs, out, entropy, *spans.arguments, *state, scale=scale, **spans.window
        )
        del temporaries
        return gradients


ATEN = FlashOps()


def declined(q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules) -> str | None:
    """Says why the flash kernels do not take these. None if they do."""
    if not on_cuda(q):
        return "not on CUDA"
    if rules.softcap is not None:
        return "a soft cap on scores"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"numbers of {q.dtype}"
    size = q.shape[2]
    if v.shape[2] != size or size % 8 or size > MOST_SIZE or size in ON_FEW_GPUS:
        return f"heads of {size} and {v.shape[2]} values"
    if math.prod(_summed(layout.rows, 1 + len(layout.lengths), q.shape[1], size)) >= MOST_PLACES:
        return "more rows than their backward can address"
    planned = q.is_meta  # a plan may be for another machine with a suitable GPU
    if not planned and not torch.backends.cuda.is_flash_attention_available():
        return "a torch without flash kernels"
    here = not planned or torch.cuda.is_available()
    if here and torch.cuda.get_device_capability(None if planned else q.device) < (8, 0):
        return "a GPU older than Ampere"
    return None


@dataclass(frozen=True)
class _FlashPasses:
    """The kernel calls of a layout.

    documents  each row with its document, or with what a window lets it see
    places     rows of k and v that this call reads; None: all rows in order
    prompt     the documents' rows with the prompt; None if `documents` covers it
    """

    documents: SequenceEnds
    places: Tensor | None
    prompt: SequenceEnds | None


def _plan(layout: Group, window: int | None, device: torch.device) -> _FlashPasses:
    P, lengths = layout.prompt, list(layout.lengths)
    rows = [P, *lengths] if P else lengths
    if window is None or window >= P + max(lengths):
        prompt = SequenceEnds.of([sum(lengths)], [P], device, causal=False) if P else None
        return _FlashPasses(SequenceEnds.of(rows, rows, device), None, prompt)
    tail = min(P, window - 1)  # prompt rows that the first row of a document sees
    if not tail:
        return _FlashPasses(SequenceEnds.of(rows, rows, device, before=window - 1), None, None)
    starts = accumulate(lengths, initial=P)
    shared = list(range(P - tail, P))
    places = [*range(P)]
    for start, length in zip(starts, lengths, strict=False):
        places += [*shared, *range(start, start + length)]
    keys = [P, *(tail + length for length in lengths)]
    return _FlashPasses(
        SequenceEnds.of(rows, keys, device, before=window - 1),
        sent(torch.tensor(places), device),
        None,
    )


def _product_flops(q: Tensor, layout: Group, rules: AttentionRules) -> int:
    """Operations of one product q k^T over the visible keys."""
    P = layout.prompt
    return rules.product_flops(q, 0, [P]) + rules.product_flops(q, P, layout.lengths)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        layout: Group,
        rules: AttentionRules,
        flash: FlashOps,
    ) -> Tensor:
        key, scale = ("flash", rules.window, q.device), rules.scale
        if key not in layout.derived:
            layout.derived[key] = _plan(layout, rules.window, q.device)
        plan: _FlashPasses = layout.derived[key]
        note_flops(lambda: 2 * _product_flops(q, layout, rules))
        rows, P = layout.rows, layout.prompt
        doc_q, doc_k, doc_v = q[:rows], *_placed(k[:rows], v[:rows], plan.places)
        out, entropy, state = flash.forward(doc_q, doc_k, doc_v, plan.documents, scale)
        prompt_state: tuple[Tensor, ...] = ()
        if plan.prompt is not None:
            shared, prompt_entropy, prompt_state = flash.forward(
                q[P:rows], k[:P], v[:P], plan.prompt, scale
            )
            both = torch.logaddexp(entropy[:, P:], prompt_entropy)
            out[P:] = _share(out[P:], entropy[:, P:] - both) + _share(shared, prompt_entropy - both)
            entropy[:, P:] = both
        if sinks is not None:
            both = torch.logaddexp(entropy, sinks.to(entropy.dtype)[:, None])
            out, entropy = _share(out, entropy - both), both
        whole = _filled(out, q)  # saved once: the next layer saves the same tensor
        ctx.save_for_backward(q, k, v, sinks, whole, entropy, *state, *prompt_state)
        ctx.plan, ctx.layout, ctx.flash, ctx.states = plan, layout, flash, len(state)
        ctx.rules = replace(rules, sinks=None)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, whole, entropy, *states = ctx.saved_tensors
        plan: _FlashPasses = ctx.plan
        flash: FlashOps = ctx.flash
        rows, P = ctx.layout.rows, ctx.layout.prompt
        note_flops(lambda: 5 * _product_flops(q, ctx.layout, ctx.rules))
        out, g, scale = whole[:rows], grad[:rows].contiguous(), ctx.rules.scale
        state, prompt_state = tuple(states[: ctx.states]), tuple(states[ctx.states :])
        inputs = q[:rows], *_placed(k[:rows], v[:rows], plan.places)
        d_q, d_k, d_v = flash.backward(g, inputs, out, entropy, state, plan.documents, scale)
        if plan.places is not None:
            d_k, d_v = (_gathered(grad, plan.places, rows) for grad in (d_k, d_v))
        if plan.prompt is not None:
            over = entropy[:, P:].contiguous()
            by_prompt = flash.backward(
                g[P:], (q[P:rows], k[:P], v[:P]), out[P:], over, prompt_state, plan.prompt, scale
            )
            d_q[P:] += by_prompt[0]
            d_k[:P] += by_prompt[1]
            d_v[:P] += by_prompt[2]
        d_sinks = None
        if sinks is not None:  # softmax's derivative in a column whose value is zero
            wide = entropy.dtype
            weighted = (g.to(wide) * out.to(wide)).sum(-1).T
            share = torch.exp(sinks.to(wide)[:, None] - entropy)
            d_sinks = -(share * weighted).sum(-1).to(sinks.dtype)
        gradients = [_filled(grad, like) for grad, like in ((d_q, q), (d_k, k), (d_v, v))]
        return *gradients, d_sinks, None, None, None


def _placed(k: Tensor, v: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
    return (k, v) if places is None else (k.index_select(0, places), v.index_select(0, places))


def _share(out: Tensor, exponent: Tensor) -> Tensor:
    """Multiplies out (rows, H, D) by exp(exponent (H, rows)), in out's type."""
    return (out * exponent.exp().T[..., None]).to(out.dtype)


def _gathered(grad: Tensor, places: Tensor, rows: int) -> Tensor:
    """Sums the gradients of each row over its copies, in float32."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(rows, *grad.shape[1:], dtype=wide, device=grad.device)
    return total.index_add_(0, places, grad.to(wide)).to(grad.dtype)


def _filled(rows: Tensor, like: Tensor) -> Tensor:
    """Adds zero rows up to the rows of `like`."""
    if rows.shape[0] == like.shape[0]:
        return rows
    whole = rows.new_empty(like.shape[0], *rows.shape[1:])
    whole[: rows.shape[0]] = rows
    whole[rows.shape[0] :] = 0
    return whole


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules, flash: FlashOps = ATEN
) -> Tensor:
    """Computes packed_attention for inputs that `declined` does not refuse."""
    return _Flash.apply(q, k, v, rules.sinks, layout, rules, flash)
