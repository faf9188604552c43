"""Draws a token from each row of logits by its answer's sampling (decoding/sampling/sampling.py).

Rows are independent: a draw depends on the row's logits, settings and random number only. Of equal
values the one with the smallest id is the likeliest. Without top_k, top_p and min_p, tokens are
drawn in the order of ids, else in the order of probability.
Shapes: B rows, V ids, C candidates: the likeliest ids, among which nearly every cut is decided.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.decoding.sampling.sampling import Sampling, TokenChance, uniform
from veneer.decoding.schedule.sequence import Request
from veneer.decoding.schedule.step_plan import SampledToken, SampleResult
from veneer.errors import ConfigError, DivergedError, VeneerError
from veneer.kernels.bindings import draw_calls
from veneer.kernels.bindings.draw_calls import BROKEN, LIKELIEST, NO_TOKEN, DrawSettings
from veneer.kernels.upload import sent

CANDIDATES = 512
SCORED_ROWS = 64
"""Rows whose probabilities exist at once while a prompt is scored: 50 MB at V = 200,000."""


class ChoiceSampler:
    """Draws the tokens of one choice of a request, and remembers what it needs between draws.

    alternatives  number of likely alternatives to report; None: no probabilities are reported
    least         number of tokens before which no stop token may be drawn
    plain         whether, from then on, it draws from unchanged logits and reports nothing
    """

    def __init__(self, request: Request, choice: int, new: Sequence[int] = ()) -> None:
        """new: tokens that the answer has already; its check gets them first."""
        self.request, self.choice, self.sampling = request, choice, request.sampling
        self.constraint = None if request.constraints is None else request.constraints()
        self.ends = None if request.checks is None else request.checks()
        if self.ends is not None:
            for token in new:
                self.ends(token)
        self.alternatives = request.sampling.logprobs
        self.least = request.min_new_tokens if request.stops else 0
        self._always_edits = request.sampling.edits or self.constraint is not None
        self.plain = self.alternatives is None and not self._always_edits
        self._counts: tuple[Tensor, Tensor] | None = None
        self._counted = 0

    def edits(self, new: Sequence[int]) -> bool:
        """Whether logits are changed before this draw."""
        return self._always_edits or len(new) < self.least

    def edit(self, logits_V: Tensor, new: Sequence[int]) -> None:
        """Edits logits in place: forbidden tokens to -inf, biases, penalties."""
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
                logits_V[token : token + 1] += bias  # an id without a logit is ignored
        if sampling.penalises:
            prompt, counts = self._count(logits_V, new)
            in_answer = counts > 0
            if sampling.repetition_penalty != 1:
                penalty = sampling.repetition_penalty
                penalised = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
                logits_V.copy_(torch.where(prompt | in_answer, penalised, logits_V))
            logits_V -= sampling.presence_penalty * in_answer + sampling.frequency_penalty * counts

    def chosen(self, token: int, new: Sequence[int], chance: TokenChance | None) -> SampleResult:
        """Returns the drawn token, and whether the answer ends with it. Call once for each
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
        """Returns (V) bool, ids in the prompt; (V) float32, counts of ids in the answer."""
        if self._counts is None:
            prompt = torch.zeros(len(logits_V), dtype=torch.bool, device=logits_V.device)
            prompt[self._ids(self.request.prompt, logits_V)] = True
            self._counts = prompt, torch.zeros(len(logits_V), device=logits_V.device)
        prompt, counts = self._counts
        uncounted = self._ids(new[self._counted :], logits_V)
        counts.index_add_(0, uncounted, torch.ones(len(uncounted), device=counts.device))
        self._counted = len(new)
        return prompt, counts


Row = tuple[ChoiceSampler, Sequence[int]]
"""A sampler, and the answer so far."""


def draw(logits_BV: Tensor, rows: Sequence[Row]) -> list[SampleResult]:
    """Draws a token for each row.

    A row gets its own error if its logits are not finite, no token is allowed, or its constraint or
    check fails.
    """
    compiled = draw_calls.can_draw(logits_BV)
    if compiled and all(sampler.plain and len(new) >= sampler.least for sampler, new in rows):
        tokens = _draw_compiled(logits_BV, rows, [], logits_BV)
        return [
            token if token >= 0 and sampler.ends is None else _result(sampler, token, new, None)
            for (sampler, new), token in zip(rows, tokens, strict=True)
        ]
    errors: dict[int, VeneerError] = {}
    changed = [
        n
        for n, (sampler, new) in enumerate(rows)
        if sampler.edits(new) or not (compiled or sampler.sampling.greedy)
    ]
    if changed:
        all_change = len(changed) == len(rows)
        wide = logits_BV.to(torch.float32, copy=True) if all_change else logits_BV[changed].float()
        for n, logits_V in zip(changed, wide, strict=True):
            sampler, new = rows[n]
            if sampler.edits(new):
                try:
                    sampler.edit(logits_V, new)
                except VeneerError as error:
                    errors[n] = error
    else:
        wide = logits_BV[:0]
    tokens = (_draw_compiled if compiled else _draw_by_torch)(logits_BV, rows, changed, wide)
    chances = _chances(logits_BV, [sampler.alternatives for sampler, _ in rows], tokens)
    return [
        errors.get(n) or _result(sampler, token, new, chance)
        for n, ((sampler, new), token, chance) in enumerate(zip(rows, tokens, chances, strict=True))
    ]


def _draw_compiled(
    logits_BV: Tensor, rows: Sequence[Row], changed: Sequence[int], wide: Tensor
) -> list[int]:
    """Returns a token for each row, BROKEN or NO_TOKEN. wide: the logits of changed rows, after
    edits."""
    ids, edited = logits_BV.shape[1], set(changed)
    settings = [
        LIKELIEST if n in edited else _draw_settings(row, ids) for n, row in enumerate(rows)
    ]
    tokens = [
        BROKEN if token == NO_TOKEN else token for token in draw_calls.draw(logits_BV, settings)
    ]
    if changed:
        redrawn = draw_calls.draw(wide, [_draw_settings(rows[n], ids) for n in changed])
        for n, token in zip(changed, redrawn, strict=True):
            tokens[n] = tokens[n] if tokens[n] == BROKEN else token
    return tokens


def _draw_settings(row: Row, ids: int) -> DrawSettings:
    sampler, new = row
    sampling = sampler.sampling
    if sampling.greedy:
        return LIKELIEST
    u = uniform(sampler.request.seed, sampler.choice, len(new))
    return u, sampling.temperature, sampling.top_k or ids, sampling.top_p, sampling.min_p


def _draw_by_torch(
    logits_BV: Tensor, rows: Sequence[Row], changed: Sequence[int], wide: Tensor
) -> list[int]:
    """Draws as _draw_compiled does, in torch, on any device, with one synchronisation."""
    tokens = logits_BV.argmax(dim=-1)
    peaks = logits_BV.gather(1, tokens[:, None])[:, 0]  # NaN for a row with a NaN
    if changed:
        tokens[changed] = _draw_changed(wide, [rows[n] for n in changed])
    return torch.where(peaks.isfinite(), tokens, BROKEN).tolist()


def _draw_changed(wide_BV: Tensor, rows: Sequence[Row]) -> Tensor:
    """Returns (B) tokens from edited logits, float32."""
    tokens = wide_BV.argmax(dim=-1)
    possible = wide_BV.gather(1, tokens[:, None])[:, 0] > float("-inf")
    for cut in (False, True):
        numbers = [
            n
            for n, (sampler, _) in enumerate(rows)
            if not sampler.sampling.greedy and sampler.sampling.cuts is cut
        ]
        if numbers:
            drawn = [
                uniform(sampler.request.seed, sampler.choice, len(new))
                for sampler, new in (rows[n] for n in numbers)
            ]
            tokens[numbers] = sampled(
                wide_BV[numbers], [rows[n][0].sampling for n in numbers], drawn, cut=cut
            )
    return torch.where(possible, tokens, NO_TOKEN)


def sampled(
    logits_BV: Tensor, samplings: Sequence[Sampling], drawn: Sequence[float], *, cut: bool
) -> Tensor:
    """Samples (B) tokens. drawn: a number in [0, 1) for each row. cut: whether top_k, top_p or
    min_p leave tokens out."""
    settings = [(s.temperature, s.top_k or logits_BV.shape[1], s.top_p, s.min_p) for s in samplings]
    numbers = sent(
        torch.tensor([(u, *row) for u, row in zip(drawn, settings, strict=True)]), logits_BV.device
    )
    u, temperature, top_k, top_p, min_p = numbers.T[:, :, None]
    # the shift keeps the quotient finite at the top
    below = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature
    chances_BV = torch.softmax(below, dim=-1)
    if not cut:
        reach_BV = chances_BV.cumsum(dim=-1)
        return _place(reach_BV, u, reach_BV[:, -1:])
    few = min(CANDIDATES, chances_BV.shape[1])
    ids_BC = likeliest(chances_BV, few)
    best_BC = chances_BV.gather(1, ids_BC)
    tokens, decided = _cut(chances_BV, u, top_k, top_p, min_p, best_BC, ids_BC)
    if few < chances_BV.shape[1]:
        rest = (~decided).nonzero()[:, 0]
        if len(rest):
            undecided = [tensor[rest] for tensor in (chances_BV, u, top_k, top_p, min_p)]
            order = undecided[0].sort(dim=-1, descending=True, stable=True)
            tokens[rest] = _cut(*undecided, *order)[0]
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
    """Returns (B) tokens from the likeliest C, and whether C candidates decide them. Settings are
    (B, 1)."""
    C = best_BC.shape[1]
    reach_BC = best_BC.cumsum(dim=-1)
    place = torch.arange(C, device=best_BC.device)
    allowed = (best_BC >= min_p * best_BC[:, :1]) & (place < top_k)
    count = allowed.sum(dim=-1, keepdim=True)
    # Whether the candidates show how many tokens min_p and top_k leave.
    counted = (count != C) | (top_k <= C) | (chances_BV.shape[1] == C)
    total = torch.where(counted, reach_BC.gather(1, count - 1), 1.0)
    likelier = reach_BC - best_BC
    left = (allowed & (likelier < top_p * total)).sum(dim=-1, keepdim=True).clamp_min(1)
    end = reach_BC.gather(1, left - 1)
    enough = counted | ((min_p == 0) & (top_k >= chances_BV.shape[1]) & (left < C))
    return ids_BC.gather(1, _place(reach_BC, u, end)[:, None])[:, 0], enough[:, 0]


def _place(reach: Tensor, u: Tensor, total: Tensor) -> Tensor:
    """Returns (B), the first place whose cumulative probability is above u * total. Rounding must
    not reach total itself."""
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(reach.contiguous(), target.contiguous(), right=True)[:, 0]


def _chances(
    logits_BV: Tensor, alternatives: Sequence[int | None], tokens: Sequence[int]
) -> list[TokenChance | None]:
    """Probabilities of the drawn tokens and of the requested numbers of alternatives."""
    rows = [n for n, count in enumerate(alternatives) if count is not None and tokens[n] >= 0]
    chances: list[TokenChance | None] = [None] * len(alternatives)
    if rows:
        logits = logits_BV[rows].float()
        logs = torch.log_softmax(logits, dim=-1)
        drawn = torch.tensor([tokens[n] for n in rows], device=logs.device)
        drawn_logs = logs.gather(1, drawn[:, None])[:, 0].tolist()
        most = min(max(alternatives[n] or 0 for n in rows), logs.shape[1])
        ids = likeliest(logits, most)
        best = logs.gather(1, ids)
        for n, log, best_logs, best_ids in zip(
            rows, drawn_logs, best.tolist(), ids.tolist(), strict=True
        ):
            pairs = tuple(zip(best_ids, best_logs, strict=True))[: alternatives[n]]
            chances[n] = TokenChance(tokens[n], log, pairs)
    return chances


def likeliest(values_BV: Tensor, count: int) -> Tensor:
    """Returns (B, count) the ids of each row's largest values, float32; of equal values the
    smallest ids, and in the order of ids.

    torch.topk says nothing about equal values: which of them it takes depends on `count`, thus on
    what the other rows ask for. The keys, whole numbers that order as value and id do, all differ.
    """
    num_ids = values_BV.shape[1]
    bits = values_BV.view(torch.int32).long()
    ranks = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    keys = ranks * num_ids + torch.arange(num_ids - 1, -1, -1, device=values_BV.device)
    return num_ids - 1 - keys.topk(count, dim=-1).values % num_ids


def prompt_chances(
    logits_BV: Tensor, tokens: Sequence[int], alternatives: int
) -> list[TokenChance]:
    """Returns the probability of each row's token, with alternatives; a few rows at a time."""
    chances: list[TokenChance] = []
    for start in range(0, len(tokens), SCORED_ROWS):
        chunk = tokens[start : start + SCORED_ROWS]
        rows = logits_BV[start : start + len(chunk)]
        of_rows = _chances(rows, [alternatives] * len(chunk), chunk)
        chances += [chance for chance in of_rows if chance is not None]
    return chances


def _result(
    sampler: ChoiceSampler, token: int, new: Sequence[int], chance: TokenChance | None
) -> SampleResult:
    if token == BROKEN:
        return DivergedError(
            "the model's logits are not finite", next_step="Look at the adapter's values."
        )
    if token == NO_TOKEN:
        return ConfigError(
            "no token is allowed",
            next_step="Allow one: a constraint or min_new_tokens forbids all of them.",
        )
    try:
        return sampler.chosen(token, new, chance)
    except VeneerError as fault:
        return fault


def draw_reference(logits_V: Tensor, sampling: Sampling, u: float) -> int:
    """Draws from one row of edited logits: the plain version of `sampled`."""
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
