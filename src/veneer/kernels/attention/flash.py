"""Packed attention on CUDA by torch's own flash kernels, which never hold scores.

    documents   every row of the batch sees its own document, causally: one call over all of them,
                the prompt among them
    prompt      every row of a document sees the prompt whole: one call, unless a window ends within
                it

The two are joined by their log-sum-exp, and each one's backward is given the joint output and
log-sum-exp: its probabilities are then those of the whole row, and the gradients of the two add up.
A window that is shorter than what a row may see ends at another key of the prompt for every row:
then the last keys of the prompt stand before each document's own, in one call. Sinks take their
share of the joint sum afterwards.

Kept for backward: q, k, v, the output and one float32 a row and head. Has never run on a GPU: on a
CPU the tests put an exact function in the kernels' place (tests/support/flash_reference.py).
Shapes: as in kernels/attention/packed.py. S sequences.
"""

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from veneer.kernels.bindings.library import note_flops, on_cuda
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules
from veneer.kernels.upload import sent

MOST_SIZE = 256
"""Values of a head that the kernels take."""
ON_FEW_GPUS = range(200, 225)
"""Sizes whose backward torch 2.9 has for an A100 or H100 alone."""
MOST_PLACES = 2**31
"""Values of their backward's float32 sums (`_summed`) from which it reads past its memory
(flash-attention's 32-bit offsets)."""


@dataclass(frozen=True)
class SequenceEnds:
    """Sequences of queries and of keys, end to end. *_ends: (S + 1) int32, from 0; longest_*: rows.

    causal: the last query of a sequence sees its last key. before: keys before its own that a row
    sees besides; None: all.
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
    def given(self) -> tuple[Tensor, Tensor, int, int, float, bool]:
        """As both kernels take them: without dropout."""
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
    """Shape of the float32 sums of queries' gradients that backward holds: rows between the
    sequences, heads as wide as its tiles."""
    return (
        rows + 128 * sequences,
        heads,
        -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64,
    )


def _held_by_backward(q: Tensor, k: Tensor, spans: SequenceEnds) -> tuple[Tensor, ...]:
    """What the kernel allocates beside its results, for a plan: the sums, a float a row and head,
    and keys' and values' gradients of each query head."""
    sums = q.new_empty(
        _summed(len(q), len(spans.query_ends) - 1, *q.shape[1:]), dtype=torch.float32
    )
    each = () if q.shape[1] == k.shape[1] else [k.new_empty(len(k), *q.shape[1:]) for _ in range(2)]
    return sums, sums[..., 0].contiguous(), *each


class FlashOps:
    """aten::_flash_attention_forward and _backward; tests put an exact function in their place."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spans: SequenceEnds, scale: float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Output (rows, H, D), log-sum-exp (H, rows) float32, and what backward wants besides."""
        found = torch.ops.aten._flash_attention_forward(
            q, k, v, *spans.given, False, scale=scale, **spans.window
        )
        out, entropy, *state, _ = found
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
        """Gradients of q, k, v where `out` and `entropy` are those of the whole row."""
        held = _held_by_backward(*inputs[:2], spans) if grad.is_meta else ()
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad, *inputs, out, entropy, *spans.given, *state, scale=scale, **spans.window
        )
        del held
        return found


ATEN = FlashOps()


def declined(q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules) -> str | None:
    """Why these are not the flash kernels'; None where they are."""
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
    planned = q.is_meta  # perhaps elsewhere than here: then for a GPU that has them
    if not planned and not torch.backends.cuda.is_flash_attention_available():
        return "a torch without flash kernels"
    here = not planned or torch.cuda.is_available()
    if here and torch.cuda.get_device_capability(None if planned else q.device) < (8, 0):
        return "a GPU older than Ampere"
    return None


@dataclass(frozen=True)
class _FlashPasses:
    """own: every row with its document, or with what a window lets it see. places: rows of k and v
    that stand there, None: as they are. prompt: the documents' rows with the prompt; None where
    there is none, or `own` holds it."""

    own: SequenceEnds
    places: Tensor | None
    prompt: SequenceEnds | None


def _plan(layout: Group, window: int | None, device: torch.device) -> _FlashPasses:
    P, lengths = layout.prompt, list(layout.lengths)
    rows = [P, *lengths] if P else lengths
    if window is None or window >= P + max(lengths):
        prompt = SequenceEnds.of([sum(lengths)], [P], device, causal=False) if P else None
        return _FlashPasses(SequenceEnds.of(rows, rows, device), None, prompt)
    tail = min(P, window - 1)  # of the prompt, what the first row of a document sees
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


def _product_flops(q: Tensor, layout: Group, window: int | None) -> int:
    """Of q k^T once, over the keys that each row sees; forward takes two such products, backward
    five."""
    pairs, documents = (
        0,
        [(0, layout.prompt), *((layout.prompt, length) for length in layout.lengths)],
    )
    for before, length in documents:
        most = window or before + length
        rising = min(length, max(0, most - before))  # rows that see one key more than the row above
        pairs += rising * before + rising * (rising + 1) // 2 + (length - rising) * most
    return 2 * pairs * q.shape[1] * q.shape[2]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        layout: Group,
        scale: float,
        window: int | None,
        flash: FlashOps,
    ) -> Tensor:
        key = "flash", window, q.device
        if key not in layout.derived:
            layout.derived[key] = _plan(layout, window, q.device)
        plan: _FlashPasses = layout.derived[key]
        note_flops(lambda: 2 * _product_flops(q, layout, window))
        rows, P = layout.rows, layout.prompt
        own_q, own_k, own_v = q[:rows], *_placed(k[:rows], v[:rows], plan.places)
        out, entropy, state = flash.forward(own_q, own_k, own_v, plan.own, scale)
        seen: tuple[Tensor, ...] = ()
        if plan.prompt is not None:
            shared, over, seen = flash.forward(q[P:rows], k[:P], v[:P], plan.prompt, scale)
            both = torch.logaddexp(entropy[:, P:], over)
            out[P:] = _share(out[P:], entropy[:, P:] - both) + _share(shared, over - both)
            entropy[:, P:] = both
        if sinks is not None:
            both = torch.logaddexp(entropy, sinks.to(entropy.dtype)[:, None])
            out, entropy = _share(out, entropy - both), both
        whole = _filled(out, q)  # kept once: what comes behind keeps the same
        ctx.save_for_backward(q, k, v, sinks, whole, entropy, *state, *seen)
        ctx.plan, ctx.layout, ctx.scale, ctx.flash, ctx.states = (
            plan,
            layout,
            scale,
            flash,
            len(state),
        )
        ctx.window = window
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, whole, entropy, *states = ctx.saved_tensors
        plan: _FlashPasses = ctx.plan
        flash: FlashOps = ctx.flash
        rows, P = ctx.layout.rows, ctx.layout.prompt
        note_flops(lambda: 5 * _product_flops(q, ctx.layout, ctx.window))
        out, g, scale = whole[:rows], grad[:rows].contiguous(), ctx.scale
        state, seen = tuple(states[: ctx.states]), tuple(states[ctx.states :])
        inputs = q[:rows], *_placed(k[:rows], v[:rows], plan.places)
        d_q, d_k, d_v = flash.backward(g, inputs, out, entropy, state, plan.own, scale)
        if plan.places is not None:
            d_k, d_v = (_gathered(each, plan.places, rows) for each in (d_k, d_v))
        if plan.prompt is not None:
            over = entropy[:, P:].contiguous()
            by_prompt = flash.backward(
                g[P:], (q[P:rows], k[:P], v[:P]), out[P:], over, seen, plan.prompt, scale
            )
            d_q[P:] += by_prompt[0]
            d_k[:P] += by_prompt[1]
            d_v[:P] += by_prompt[2]
        d_sinks = None
        if sinks is not None:  # softmax's derivative in a column whose value is zero
            wide = entropy.dtype
            given = (g.to(wide) * out.to(wide)).sum(-1).T
            share = torch.exp(sinks.to(wide)[:, None] - entropy)
            d_sinks = -(share * given).sum(-1).to(sinks.dtype)
        found = [_filled(each, of) for each, of in ((d_q, q), (d_k, k), (d_v, v))]
        return *found, d_sinks, None, None, None, None


def _placed(k: Tensor, v: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
    return (k, v) if places is None else (k.index_select(0, places), v.index_select(0, places))


def _share(out: Tensor, exponent: Tensor) -> Tensor:
    """out (rows, H, D) times exp(exponent (H, rows)), in out's type."""
    return (out * exponent.exp().T[..., None]).to(out.dtype)


def _gathered(grad: Tensor, places: Tensor, rows: int) -> Tensor:
    """The sum of what each row got where it stood, in float32."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(rows, *grad.shape[1:], dtype=wide, device=grad.device)
    return total.index_add_(0, places, grad.to(wide)).to(grad.dtype)


def _filled(rows: Tensor, of: Tensor) -> Tensor:
    """With zeros for the filler that `of` has."""
    if rows.shape[0] == of.shape[0]:
        return rows
    whole = rows.new_empty(of.shape[0], *rows.shape[1:])
    whole[: rows.shape[0]] = rows
    whole[rows.shape[0] :] = 0
    return whole


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Group, rules: AttentionRules, flash: FlashOps = ATEN
) -> Tensor:
    """As packed_attention, of what `declined` does not refuse."""
    apply: Any = _Flash.apply
    return apply(q, k, v, rules.sinks, layout, rules.scale, rules.window, flash)
