"""A state space over whole texts, in chunks (Dao and Gu 2024, arXiv:2405.21060, section 6).

    S[t] = exp(decay[t]) S[t-1] + step[t] x[t] b[t]^T,    y[t] = S[t] c[t]

Within a chunk this is attention without a softmax, whose scores fade with the distance; from chunk
to chunk the state passes. Heads of a group share b and c, so products with them are computed once
for all heads of the group. Backward computes the chunks again from the inputs, which are all that
forward keeps. The loop over tokens defines the result.

Shapes: N texts of T tokens, H heads in G groups, J heads of a group, P values of a head, W width of
its state; K chunks of Q tokens.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST_CHUNK = 64


def state_scan(
    x_NTHP: Tensor,
    step_NTH: Tensor,
    decay_NTH: Tensor,
    b_NTGW: Tensor,
    c_NTGW: Tensor,
    state_NHPW: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns y (N, T, H, P) and the last state (N, H, P, W), both float32, with gradients to all
    inputs. step and decay are float32. Without a state it is zero."""
    if state_NHPW is None:
        texts, _, heads, size = x_NTHP.shape
        state_NHPW = step_NTH.new_zeros(texts, heads, size, b_NTGW.shape[-1])
    y, state = _Scan.apply(x_NTHP, step_NTH, decay_NTH, b_NTGW, c_NTGW, state_NHPW)
    return y, state


def state_scan_reference(
    x_NTHP: Tensor,
    step_NTH: Tensor,
    decay_NTH: Tensor,
    b_NTGW: Tensor,
    c_NTGW: Tensor,
    state_NHPW: Tensor,
) -> tuple[Tensor, Tensor]:
    """Defines state_scan, token by token."""
    heads = x_NTHP.shape[2] // b_NTGW.shape[2]
    b, c = (values.float().repeat_interleave(heads, dim=2) for values in (b_NTGW, c_NTGW))
    state, y = state_NHPW.float(), []
    for t in range(x_NTHP.shape[1]):
        x = x_NTHP[:, t].float() * step_NTH[:, t, :, None]
        state = state * decay_NTH[:, t, :, None, None].exp() + x[..., None] * b[:, t, :, None]
        y.append((state @ c[:, t, ..., None])[..., 0])
    return torch.stack(y, dim=1), state


class _Chunks(NamedTuple):
    """The inputs in chunks, as forward and backward both compute them.

    x       (N, K, H, Q, P), times the step
    b, c    (N, K, G, Q, W)
    sums    (N, K, H, Q), sums of decay within a chunk
    fading  (N, K, H, Q, Q), exp(sums[i] - sums[j]) for j <= i, else 0
    to_end  (N, K, H, Q), exp(sums of the tokens behind)
    """

    x: Tensor
    b: Tensor
    c: Tensor
    sums: Tensor
    fading: Tensor
    to_end: Tensor

    @classmethod
    def of(cls, x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> "_Chunks":
        length = _chunk_length(x.shape[1])
        sums = _chunked(decay, length).cumsum(-1)
        distances = sums[..., :, None] - sums[..., None, :]
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu_(1)
        return cls(
            _chunked(x.float() * step[..., None], length),
            _chunked(b.float(), length),
            _chunked(c.float(), length),
            sums,
            distances.masked_fill_(later, -torch.inf).exp_(),
            (sums[..., -1:] - sums).exp_(),
        )

    @property
    def groups(self) -> int:
        return self.b.shape[2]

    def scores(self) -> Tensor:
        """Returns (N, K, G, 1, Q, Q)."""
        return (self.c @ self.b.mT)[:, :, :, None]

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the states (N, K, G, W, J P) before each chunk, of that before the first
        (N, G, W, J P), and the last one."""
        added = self.b.mT @ _by_group(self.x * self.to_end[..., None], self.groups)
        before = []
        for number, kept in enumerate(self.kept(state).unbind(1)):
            before.append(state)
            state = state * kept + added[:, number]
        return torch.stack(before, dim=1), state

    def kept(self, state: Tensor) -> Tensor:
        """Returns what a chunk keeps of each value of a state, (N, K, G, 1, J P)."""
        kept = self.sums[..., -1].exp()
        size = self.groups * state.shape[-1] // kept.shape[-1]
        return kept.repeat_interleave(size, dim=-1).unflatten(-1, (self.groups, 1, -1))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, step, decay, b, c, state)
        chunks = _Chunks.of(x, step, decay, b, c)
        before, last = chunks.states(_grouped(state, chunks.groups))
        y = _by_head(chunks.c @ before, x.shape[2]) * chunks.sums.exp()[..., None]
        y += (chunks.scores() * _of_groups(chunks.fading, chunks.groups)).flatten(2, 3) @ chunks.x
        return _joined(y, x.shape[1]), _ungrouped(last, x.shape[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        x, step, decay, b, c, state = ctx.saved_tensors
        tokens, heads = x.shape[1:3]
        chunks = _Chunks.of(x, step, decay, b, c)
        groups, from_start = chunks.groups, chunks.sums.exp()
        before, _ = chunks.states(_grouped(state, groups))
        grad = _chunked(grad_y, chunks.sums.shape[-1])

        # Within chunks: y = (scores * fading) x.
        scores, fading = chunks.scores(), _of_groups(chunks.fading, groups)
        weights = (scores * fading).flatten(2, 3)
        grad_x = weights.mT @ grad
        grad_weights = grad @ chunks.x.mT
        of_pairs = weights.mul_(grad_weights)
        grad_sums = of_pairs.sum(-1) - of_pairs.sum(-2)
        grad_scores = (_of_groups(grad_weights, groups) * fading).sum(3)
        grad_c, grad_b = grad_scores @ chunks.b, grad_scores.mT @ chunks.c

        # From the state before each chunk: y = exp(sums) (c before).
        grad_sums += (_by_head(chunks.c @ before, heads) * grad).sum(-1) * from_start
        grad = _by_group(grad * from_start[..., None], groups)
        grad_c += grad @ before.mT
        grad_before = chunks.c.mT @ grad

        # The states, from the last to the first.
        grad_state, grad_added, kept = _grouped(grad_last, groups), [], chunks.kept(before)
        for number in reversed(range(before.shape[1])):
            grad_added.append(grad_state)
            grad_state = grad_state * kept[:, number] + grad_before[:, number]
        to_added = torch.stack(grad_added[::-1], dim=1)
        of_kept = (to_added * before * kept).sum(3).unflatten(-1, (-1, x.shape[3])).sum(-1)
        grad_sums[..., -1] += of_kept.flatten(2)

        # What a chunk adds: b^T (x to_end).
        grad_b += _by_group(chunks.x * chunks.to_end[..., None], groups) @ to_added.mT
        to_x = _by_head(chunks.b @ to_added, heads) * chunks.to_end[..., None]
        grad_x += to_x
        to_ends = (to_x * chunks.x).sum(-1)
        grad_sums -= to_ends
        grad_sums[..., -1] += to_ends.sum(-1)

        grad_decay = _joined(grad_sums.flip(-1).cumsum(-1).flip(-1), tokens)
        joined_x = _joined(grad_x, tokens)
        return (
            (joined_x * step[..., None]).to(x.dtype),
            (joined_x * x).sum(-1),
            grad_decay,
            _joined(grad_b, tokens).to(b.dtype),
            _joined(grad_c, tokens).to(c.dtype),
            _ungrouped(grad_state, heads).to(state.dtype),
        )


def _chunk_length(tokens: int) -> int:
    """Returns the length of chunks that are equally long but for the last."""
    return -(-tokens // -(-tokens // LONGEST_CHUNK))


def _chunked(values: Tensor, length: int) -> Tensor:
    """Returns values (N, T, H, ...) as (N, K, H, Q, ...), zeros behind a text."""
    missing = -values.shape[1] % length
    padded = F.pad(values, [0, 0] * (values.dim() - 2) + [0, missing]) if missing else values
    return padded.unflatten(1, (-1, length)).transpose(2, 3).contiguous()


def _joined(values: Tensor, tokens: int) -> Tensor:
    """Returns values (N, K, H, Q, ...) as (N, T, H, ...)."""
    return values.transpose(2, 3).flatten(1, 2)[:, :tokens].contiguous()


def _of_groups(values: Tensor, groups: int) -> Tensor:
    """Returns values (N, K, H, ...) as (N, K, G, J, ...)."""
    return values.unflatten(2, (groups, -1))


def _by_group(values: Tensor, groups: int) -> Tensor:
    """Returns values (N, K, H, Q, P) as (N, K, G, Q, J P)."""
    return _of_groups(values, groups).transpose(3, 4).flatten(4)


def _by_head(values: Tensor, heads: int) -> Tensor:
    """Returns values (N, K, G, Q, J P) as (N, K, H, Q, P)."""
    own = heads // values.shape[2]
    return values.unflatten(-1, (own, -1)).transpose(3, 4).flatten(2, 3)


def _grouped(state: Tensor, groups: int) -> Tensor:
    """Returns a state (N, H, P, W) as (N, G, W, J P), float32."""
    return state.float().unflatten(1, (groups, -1)).flatten(2, 3).mT


def _ungrouped(state: Tensor, heads: int) -> Tensor:
    """Returns a state (N, G, W, J P) as (N, H, P, W)."""
    own = heads // state.shape[1]
    return state.mT.unflatten(2, (own, -1)).flatten(1, 2).contiguous()
