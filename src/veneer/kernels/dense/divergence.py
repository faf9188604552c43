"""Divergence between the next tokens that a teacher and a student expect, over the whole
vocabulary and a few rows at a time.

    p = softmax(z_teacher / T),  q = softmax(z_student / T),  m = beta p + (1 - beta) q

    forward          KL(p || q)                                    d/dz = q - p
    reverse          KL(q || p)                                    d/dz = q (g - sum(q g)),
                                                                   g = log q - log p
    jensen_shannon   beta KL(p || m) + (1 - beta) KL(q || m)       g = (1 - beta) (log q - log m)

Every value is multiplied by T^2, so that gradients keep their size at any temperature T; d/dz is
then multiplied by T. No token is left out: a sum over the likeliest tokens alone is no divergence
and may be negative. Columns that only one of the two vocabularies has, as where a head is padded,
are left out of both distributions.

Logits exist for one chunk of rows. If both read the same weights, one product computes the logits
of both. Forward computes the gradient of the student's hidden states while the logits are there.
The teacher has no gradient.
Sources: Hinton et al. 2015, arXiv:1503.02531, section 2 (T^2); Agarwal et al. 2023,
arXiv:2306.13649, eq. 1 (generalised Jensen-Shannon).
Shapes: M rows, D hidden, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings.library import chunk_starts, on_cpu
from veneer.kernels.dense.frozen import times
from veneer.kernels.dense.loss import Head, wide_type
from veneer.kernels.layout import round_up

DivergenceKind = Literal["forward", "reverse", "jensen_shannon"]

CHUNK, CHUNK_ELSEWHERE = 64, 256
"""Rows per chunk, of student and teacher each. A chunk holds about six float32 tensors of its
logits: 75 MB at V = 49,152."""


@dataclass(frozen=True)
class Divergence:
    """Computes a divergence at a temperature.

    beta: the teacher's share of the mixture of jensen_shannon, between 0 and 1
    """

    kind: DivergenceKind = "forward"
    temperature: float = 1.0
    beta: float = 0.5

    def of_logits(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Returns the divergence of every row, (M), in plain operations; for autograd."""
        log_q, log_p = self._log_probabilities(student, teacher)
        return self._values(log_q, log_p, self._log_mixture(log_q, log_p)) * self.temperature**2

    def with_gradient(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the divergence of every row, (M), and the gradient of the student's logits."""
        log_q, log_p = self._log_probabilities(student, teacher)
        log_m = self._log_mixture(log_q, log_p)
        values = self._values(log_q, log_p, log_m)
        q = log_q.exp()
        if self.kind == "forward":
            gradient = q.sub_(log_p.exp_())
        else:
            slope = _difference(log_q, log_m, q)
            if self.kind == "jensen_shannon":
                slope = (1 - self.beta) * slope
            gradient = q * (slope - (q * slope).sum(dim=-1, keepdim=True))
        gradient = gradient.mul_(self.temperature)
        missing = student.shape[1] - log_q.shape[1]
        return values * self.temperature**2, F.pad(gradient, (0, missing)) if missing else gradient

    def _log_probabilities(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log q and log p over the columns that both vocabularies have."""
        columns = min(student.shape[1], teacher.shape[1])
        wide = [z[:, :columns].to(wide_type(z.dtype)) for z in (student, teacher)]
        if self.temperature != 1.0:
            wide = [z / self.temperature for z in wide]
        return wide[0].log_softmax(dim=-1), wide[1].log_softmax(dim=-1)

    def _values(self, log_q: Tensor, log_p: Tensor, log_m: Tensor) -> Tensor:
        if self.kind == "forward":
            return _kl(log_p, log_q)
        if self.kind == "reverse":
            return _kl(log_q, log_p)
        return self.beta * _kl(log_p, log_m) + (1 - self.beta) * _kl(log_q, log_m)

    def _log_mixture(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Returns log m of jensen_shannon; of the other kinds log p."""
        if self.kind != "jensen_shannon":
            return log_p
        beta = torch.tensor(self.beta, dtype=log_q.dtype, device=log_q.device)
        return torch.logaddexp(log_p + beta.log(), log_q + torch.log1p(-beta))


def _difference(log_a: Tensor, log_b: Tensor, a: Tensor) -> Tensor:
    """Returns log a - log b, and 0 where a is 0: a token that neither knows has no difference."""
    return torch.where(a > 0, log_a - log_b, 0.0)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Returns KL(a || b) of every row, (M)."""
    a = log_a.exp()
    return (a * _difference(log_a, log_b, a)).sum(dim=-1)


@dataclass(frozen=True)
class TeacherRows:
    """Holds the hidden states (M, D) of a teacher's rows, and the head that they go through.

    columns: number of columns that are compared; None: all
    """

    states: Tensor
    head: Head
    columns: int | None = None

    def logits(self, rows: slice) -> Tensor:
        return self.head.of(rows).logits(self.states[rows])[:, : self.columns]

    def shares(self, head: Head) -> bool:
        """Returns whether this head computes the same logits from the same hidden states."""
        return self.columns is None and _is_same(head, self.head)


@dataclass(frozen=True)
class TeacherLogits:
    """Holds the logits (M, V) of a teacher's rows, of a model with a head of its own kind."""

    whole: Tensor

    def logits(self, rows: slice) -> Tensor:
        return self.whole[rows]


Teacher = TeacherRows | TeacherLogits


def frozen_head_divergence(
    h: Tensor, head: Head, teacher: Teacher, divergence: Divergence
) -> Tensor:
    """Returns the divergence of every row, (M) float32 (float64 for float64), with a gradient of
    the student's hidden states h (M, D) alone."""
    return _FrozenHeadDivergence.apply(h, head, teacher, divergence)


def trained_head_divergence(
    h: Tensor, head: Head, teacher: Teacher, divergence: Divergence
) -> Tensor:
    """Computes the same under a head that trains; backward recomputes the logits."""
    from torch.utils.checkpoint import checkpoint

    def of_rows(states: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            expected = teacher.logits(rows)
        return logit_divergence(head.of(rows).logits(states), expected, divergence)

    size = _chunk(h)
    chunks = [slice(start, start + size) for start in range(0, len(h), size)]
    return torch.cat(
        [
            checkpoint(of_rows, h[rows], rows, use_reentrant=False, preserve_rng_state=False)
            for rows in chunks
        ]
    )


def logit_divergence(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """Returns the divergence of every row, (M), with a gradient of the student's logits (M, V)."""
    return _LogitDivergence.apply(student, teacher, divergence)


def head_divergence_reference(
    h: Tensor, head: Head, teacher: Teacher, divergence: Divergence
) -> Tensor:
    """Defines the divergence of every row, with all logits at once under torch's autograd."""
    expected = teacher.logits(slice(None)).detach()
    return divergence.of_logits(head.logits(h), expected)


def _chunk(h: Tensor) -> int:
    return CHUNK if on_cpu(h) else CHUNK_ELSEWHERE


class _LogitDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
        values, gradient = divergence.with_gradient(student, teacher)
        ctx.save_for_backward(gradient.to(student.dtype))
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * weights[:, None]).to(gradient.dtype), None, None


class _FrozenHeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, head: Head, teacher: Teacher, divergence: Divergence
    ) -> Tensor:
        assert head.beside is None
        values = torch.empty(len(h), dtype=wide_type(h.dtype), device=h.device)
        grad = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        shared = teacher if isinstance(teacher, TeacherRows) and teacher.shares(head) else None
        chunk = _chunk(h)
        at_once = 1 if shared is None else 2
        buffer = h.new_empty(round_up(min(chunk, len(h)) * at_once), head.width)
        for start in chunk_starts(range(0, len(h), chunk)):
            rows = slice(start, start + chunk)
            states = h[rows]
            count = len(states)
            if shared is not None:
                both = torch.cat([states, shared.states[rows]])
                z = _logits_into(buffer, both, head)
                z_student, z_teacher = z[:count], z[count : 2 * count]
            else:
                z_student = _logits_into(buffer, states, head)[:count]
                z_teacher = teacher.logits(rows)
            if grad is None:
                values[rows] = divergence.of_logits(z_student, z_teacher)
                continue
            values[rows], d_z = divergence.with_gradient(z_student, z_teacher)
            if head.softcap is not None:
                d_z = d_z * (1 - (z_student.to(d_z.dtype) / head.softcap) ** 2)
            grad[rows] = times(d_z.to(h.dtype), head.weight, None).mul_(head.scale)
        ctx.save_for_backward(grad)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_h,) = ctx.saved_tensors
        # float32: bf16 would round the weights of all rows alike.
        return (grad_h * weights[:, None]).to(grad_h.dtype), None, None, None


def _is_same(head: Head, other: Head) -> bool:
    """Whether both heads compute the same logits from the same hidden states, row by row."""
    return (
        type(head) is type(other) is Head
        and head.weight is other.weight
        and head.bias is other.bias
        and (head.scale, head.softcap, head.beside) == (other.scale, other.softcap, other.beside)
    )


def _logits_into(buffer: Tensor, h: Tensor, head: Head) -> Tensor:
    """Computes logits in a buffer that is used again. h is filled up to one of few shapes."""
    padded = round_up(len(h))
    return head.logits_into(buffer[:padded], F.pad(h, (0, 0, 0, padded - len(h))))
