"""A token for each row of logits, as its answer's sampling says (decoding/sampling/sampling.py),
many answers at once.

Rows do not see each other: what a row draws is a function of its logits, its settings and its own
random number. A row from which nothing is left out draws in the order of the ids, another in that
of the chances. Shapes: B rows, V ids, C candidates: as many of the likeliest as nearly every cut is
decided among.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.decoding.sampling.sampling import Sampling, TokenChance, uniform
from veneer.decoding.schedule.sequence import Request
from veneer.decoding.schedule.step_plan import SampledToken, SampleResult
from veneer.errors import ConfigError, DivergedError, VeneerError
from veneer.kernels.bindings import draw_calls
from veneer.kernels.bindings.draw_calls import BROKEN, LIKELIEST, NOTHING, How
from veneer.kernels.upload import sent

CANDIDATES = 512


class ChoiceSampler:
    """How one choice of a request draws, with what it has to remember between two draws.

    told   how many alternatives are told; None: no chance either
    least  tokens of the answer before which no stop token may be drawn
    plain  whether, from there on, it draws from the logits as they are, and no chance is told
    """

    def __init__(self, request: Request, choice: int, new: Sequence[int] = ()) -> None:
        """new: tokens that the answer has already, which its check sees first."""
        self.request, self.choice, self.sampling = request, choice, request.sampling
        self.constraint = None if request.constraints is None else request.constraints()
        self.ends = None if request.checks is None else request.checks()
        if self.ends is not None:
            for token in new:
                self.ends(token)
        self.told = request.sampling.logprobs
        self.least = request.min_new_tokens if request.stops else 0
        self._always_edits = request.sampling.edits or self.constraint is not None
        self.plain = self.told is None and not self._always_edits
        self._counts: tuple[Tensor, Tensor] | None = None
        self._counted = 0

    def edits(self, new: Sequence[int]) -> bool:
        """Whether logits are changed before this draw."""
        return self._always_edits or len(new) < self.least

    def edit(self, logits_V: Tensor, new: Sequence[int]) -> None:
        """In place: what is forbidden to -inf, biases, penalties."""
        request, sampling = self.request, self.sampling
        if self.constraint is not None:
            allowed = torch.as_tensor(self.constraint.allowed(new))[: len(logits_V)].to(
                logits_V.device
            )
            logits_V[: len(allowed)].masked_fill_(~allowed, float("-inf"))
            logits_V[len(allowed) :] = float("-inf")
        if len(new) < self.least:
            logits_V[self._ids(request.stops, logits_V)] = float("-inf")
        if sampling.logit_bias:
            for token, bias in sampling.logit_bias:
                logits_V[token : token + 1] += bias  # no row, nothing
        if sampling.penalises:
            prompt, counts = self._count(logits_V, new)
            there = counts > 0
            if sampling.repetition_penalty != 1:
                by = sampling.repetition_penalty
                weaker = torch.where(logits_V > 0, logits_V / by, logits_V * by)
                logits_V.copy_(torch.where(prompt | there, weaker, logits_V))
            logits_V -= sampling.presence_penalty * there + sampling.frequency_penalty * counts

    def chosen(self, token: int, new: Sequence[int], chance: TokenChance | None) -> SampleResult:
        """The token, and whether the answer ends with it by a constraint or a check. Once for each
        token."""
        ends = self.ends is not None and self.ends(token)
        if self.constraint is not None:
            ends |= self.constraint.ended([*new, token])
        return SampledToken(token, ends, chance) if ends or chance is not None else token

    def _ids(self, ids: Sequence[int] | frozenset[int], logits_V: Tensor) -> Tensor:
        return torch.tensor(
            [i for i in ids if i < len(logits_V)], dtype=torch.long, device=logits_V.device
        )

    def _count(self, logits_V: Tensor, new: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Whether each id is in the prompt, and how often it is in the answer: (V) bool and
        float32."""
        if self._counts is None:
            prompt = torch.zeros(len(logits_V), dtype=torch.bool, device=logits_V.device)
            prompt[self._ids(self.request.prompt, logits_V)] = True
            self._counts = prompt, torch.zeros(len(logits_V), device=logits_V.device)
        prompt, counts = self._counts
        later = self._ids(new[self._counted :], logits_V)
        counts.index_add_(0, later, torch.ones(len(later), device=counts.device))
        self._counted = len(new)
        return prompt, counts


Row = tuple[ChoiceSampler, Sequence[int]]
"""How it draws, and the answer so far."""


def draw(logits_BV: Tensor, rows: Sequence[Row]) -> list[SampleResult]:
    """What each row draws.

    A row whose logits are no finite numbers, to which nothing is allowed, or whose constraint or
    check fails, gets an error of its own.
    """
    compiled = draw_calls.usable(logits_BV)
    if compiled and all(drawing.plain and len(new) >= drawing.least for drawing, new in rows):
        found = _compiled(logits_BV, rows, [], logits_BV)
        return [
            token if token >= 0 and drawing.ends is None else _chosen(drawing, token, new, None)
            for (drawing, new), token in zip(rows, found, strict=True)
        ]
    faults: dict[int, VeneerError] = {}
    changed = [
        n for n, (d, new) in enumerate(rows) if d.edits(new) or not (compiled or d.sampling.greedy)
    ]
    if changed:
        everyone = len(changed) == len(rows)
        wide = logits_BV.to(torch.float32, copy=True) if everyone else logits_BV[changed].float()
        for n, logits_V in zip(changed, wide, strict=True):
            drawing, new = rows[n]
            if drawing.edits(new):
                try:
                    drawing.edit(logits_V, new)
                except VeneerError as fault:
                    faults[n] = fault
    else:
        wide = logits_BV[:0]
    found = (_compiled if compiled else _by_torch)(logits_BV, rows, changed, wide)
    chances = _chances(logits_BV, [drawing.told for drawing, _ in rows], found)
    return [
        faults.get(n) or _chosen(drawing, token, new, chance)
        for n, ((drawing, new), token, chance) in enumerate(zip(rows, found, chances, strict=True))
    ]


def _compiled(
    logits_BV: Tensor, rows: Sequence[Row], changed: Sequence[int], wide: Tensor
) -> list[int]:
    """A token of each row, BROKEN or NOTHING. wide: those that were changed, as they are to be
    drawn from."""
    ids, edited = logits_BV.shape[1], set(changed)
    hows = [LIKELIEST if n in edited else _how(row, ids) for n, row in enumerate(rows)]
    found = [BROKEN if token == NOTHING else token for token in draw_calls.draw(logits_BV, hows)]
    if changed:
        for n, token in zip(
            changed, draw_calls.draw(wide, [_how(rows[n], ids) for n in changed]), strict=True
        ):
            found[n] = found[n] if found[n] == BROKEN else token
    return found


def _how(row: Row, ids: int) -> How:
    (drawing, new), sampling = row, row[0].sampling
    if sampling.greedy:
        return LIKELIEST
    u = uniform(drawing.request.seed, drawing.choice, len(new))
    return u, sampling.temperature, sampling.top_k or ids, sampling.top_p, sampling.min_p


def _by_torch(
    logits_BV: Tensor, rows: Sequence[Row], changed: Sequence[int], wide: Tensor
) -> list[int]:
    """The same on any device, waiting for it once."""
    tokens = logits_BV.argmax(dim=-1)
    peaks = logits_BV.gather(1, tokens[:, None])[:, 0]  # of a row with a NaN that NaN
    if changed:
        tokens[changed] = _of_changed(wide, [rows[n] for n in changed])
    found: list[int] = torch.where(peaks.isfinite(), tokens, BROKEN).tolist()
    return found


def _of_changed(wide_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """(B) tokens from logits as they are to be drawn from, float32."""
    tokens = wide_BV.argmax(dim=-1)
    possible = wide_BV.gather(1, tokens[:, None])[:, 0] > float("-inf")
    for cut in (False, True):
        some = [
            n for n, (d, _) in enumerate(rows) if not d.sampling.greedy and d.sampling.cuts is cut
        ]
        if some:
            drawn = [
                uniform(d.request.seed, d.choice, len(new)) for d, new in (rows[n] for n in some)
            ]
            tokens[some] = sampled(
                wide_BV[some], [rows[n][0].sampling for n in some], drawn, cut=cut
            )
    return torch.where(possible, tokens, NOTHING)


def sampled(
    logits_BV: Tensor, samplings: Sequence[Sampling], drawn: Sequence[float], *, cut: bool
) -> Tensor:
    """(B) tokens. drawn: a number in [0, 1) for each row; cut: whether tokens are left out, in all
    rows alike."""
    settings = [(s.temperature, s.top_k or logits_BV.shape[1], s.top_p, s.min_p) for s in samplings]
    numbers = sent(
        torch.tensor([(u, *each) for u, each in zip(drawn, settings, strict=True)]),
        logits_BV.device,
    )
    u, temperature, top_k, top_p, min_p = numbers.T[:, :, None]
    # the shift keeps the quotient finite at the top
    below = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature
    chances_BV = torch.softmax(below, dim=-1)
    if not cut:
        reach_BV = chances_BV.cumsum(dim=-1)
        return _place(reach_BV, u, reach_BV[:, -1:])
    few = min(CANDIDATES, chances_BV.shape[1])
    tokens, decided = _cut(chances_BV, u, top_k, top_p, min_p, *chances_BV.topk(few, dim=-1))
    if few < chances_BV.shape[1]:
        rest = (~decided).nonzero()[:, 0]
        if len(rest):
            own = [each[rest] for each in (chances_BV, u, top_k, top_p, min_p)]
            tokens[rest] = _cut(*own, *own[0].sort(dim=-1, descending=True, stable=True))[0]
    return tokens


def _cut(
    chances_BV: Tensor,
    u: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    best_BC: Tensor,
    ids_BC: Tensor,
) -> tuple[Tensor, Tensor]:
    """(B) tokens from the likeliest C, and whether these were enough to say. Settings are (B,
    1)."""
    C = best_BC.shape[1]
    reach_BC = best_BC.cumsum(dim=-1)
    place = torch.arange(C, device=best_BC.device)
    kept = (best_BC >= min_p * best_BC[:, :1]) & (place < top_k)
    count = kept.sum(dim=-1, keepdim=True)
    all_kept = count == C
    told = ~all_kept | (top_k <= C) | (chances_BV.shape[1] == C)  # how many min_p and top_k leave
    total = torch.where(told, reach_BC.gather(1, count - 1), 1.0)
    # in front of each: what is likelier
    left = (kept & (reach_BC - best_BC < top_p * total)).sum(dim=-1, keepdim=True).clamp_min(1)
    end = reach_BC.gather(1, left - 1)
    enough = told | ((min_p == 0) & (top_k >= chances_BV.shape[1]) & (left < C))
    return ids_BC.gather(1, _place(reach_BC, u, end)[:, None])[:, 0], enough[:, 0]


def _place(reach: Tensor, u: Tensor, total: Tensor) -> Tensor:
    """(B) the first place whose reach is above u * total, which rounding must not let come to the
    total itself."""
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reach.contiguous(), target.contiguous(), right=True)[:, 0]


def _chances(
    logits_BV: Tensor, told: Sequence[int | None], tokens: Sequence[int]
) -> list[TokenChance | None]:
    rows = [n for n, many in enumerate(told) if many is not None and tokens[n] >= 0]
    found: list[TokenChance | None] = [None] * len(told)
    if rows:
        logs = torch.log_softmax(logits_BV[rows].float(), dim=-1)
        own = torch.tensor([tokens[n] for n in rows], device=logs.device)
        most = min(max(told[n] or 0 for n in rows), logs.shape[1])
        best, ids = logs.topk(most, dim=-1)
        for n, log, values, names in zip(
            rows,
            logs.gather(1, own[:, None])[:, 0].tolist(),
            best.tolist(),
            ids.tolist(),
            strict=True,
        ):
            pairs = tuple(zip(names, values, strict=True))[: told[n]]
            found[n] = TokenChance(tokens[n], log, pairs)
    return found


def _chosen(
    drawing: ChoiceSampler, token: int, new: Sequence[int], chance: TokenChance | None
) -> SampleResult:
    if token == BROKEN:
        return DivergedError(
            "the model's logits are no finite numbers", next_step="Look at the adapter's values."
        )
    if token == NOTHING:
        return ConfigError(
            "no token may follow",
            next_step="Allow one: a constraint or min_new_tokens forbids each.",
        )
    try:
        return drawing.chosen(token, new, chance)
    except VeneerError as fault:
        return fault


def draw_reference(logits_V: Tensor, sampling: Sampling, u: float) -> int:
    """One row drawn plainly, from logits that are edited already: what `sampled` computes for
    many."""
    if sampling.greedy:
        return int(logits_V.argmax())
    chances = torch.softmax(
        (logits_V.double() - logits_V.max()) / sampling.temperature, dim=-1
    ).tolist()
    order = list(range(len(chances)))
    if sampling.cuts:
        order.sort(key=lambda i: -chances[i])
        order = [i for i in order if chances[i] >= sampling.min_p * chances[order[0]]]
        order = order[: sampling.top_k or None]
        total, before = sum(chances[i] for i in order), 0.0
        left: list[int] = []
        for i in order:
            if left and before >= sampling.top_p * total:
                break
            left.append(i)
            before += chances[i]
        order = left
    total, at = sum(chances[i] for i in order), 0.0
    for i in order:
        at += chances[i]
        if u * total < at:
            return i
    return next(i for i in reversed(order) if chances[i] > 0)
