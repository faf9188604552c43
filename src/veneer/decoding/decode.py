"""The decoding loop: many prompts at once, each row's tokens at their own positions, no padding in the products.

    prefill   prompts packed end to end, what all begin with computed once (models/attention.py)
    a step    one token of every row, keys and values in buffers with room (decoding/cache.py)
    rows      like lengths together; rows that stopped are dropped, waiting prompts take their place

transformers' own loop pads on the left, copies the whole cache at every token, and computes rows that have
stopped until the last one has. Both are run (decoding/proof.py) before this loop is used; where they differ, or
where a model cannot be packed, decoding/generate.py takes transformers' loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapters.routing import Routing
from veneer.decoding.cache import Cache, CachedStep, CachedSteps
from veneer.kernels.layout import Group, Layout, round_up
from veneer.models.attention import Laid, Traced, unused_mask
from veneer.models.switches import forget_lengths

ROWS = 64
"""Rows decoded together. A step reads every weight once, whatever the rows."""
PREFILL_TOKENS = 4096
"""Tokens of prompts computed in one forward: bounds the activations."""
CACHE_TOKENS = 65536
"""Tokens held for all rows together: bounds the cache (fewer rows where prompts are long)."""

Choose = Callable[[Tensor, Sequence[int]], list[int]]
"""(logits (B, V), the prompts' numbers (B)) -> a token for each row."""


@torch.no_grad()
def decode_rereading(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    stops: set[int],
    max_new_tokens: int,
    choose: Callable[[Tensor], int],
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """New ids for one prompt, the stop token left out; the whole text is read for every token, as in training.

    choose: from the logits (1, V) of the next token. on_token: called with each new id, the stop token included.
    """
    ids, new = list(prompt), 0
    while new < max_new_tokens:
        forget_lengths(model)
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[:, -1]
        token, new = choose(logits), new + 1
        if on_token is not None:
            on_token(token)
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def greedy(logits: Tensor, _: Sequence[int]) -> list[int]:
    """The likeliest token."""
    return logits.argmax(dim=-1).tolist()


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stops: set[int],
    max_new_tokens: int | Sequence[int],
    choose: Choose = greedy,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New ids for each prompt (none empty), the stop token left out.

    max_new_tokens  of each prompt, or one number for all: where an answer that has not stopped is cut
    on_token   called with the prompt's number and each new id as it comes, the stop token included
    """
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # taken from the end: longest first
    shared = _common_start(prompts)
    active: list[int] = []
    last: list[int] = []
    cache: Cache | None = None
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    most = _rows_at_once(prompts, shared, max(limits, default=0))

    def take(numbers: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Note each row's new token; which rows go on."""
        goes_on = []
        for number, token in zip(numbers, tokens, strict=True):
            if on_token is not None:
                on_token(number, token)
            if token not in stops:
                answers[number].append(token)
            goes_on.append(token not in stops and len(answers[number]) < limits[number])
        return goes_on

    alive: list[bool] = []
    while waiting or any(alive):
        if waiting and sum(alive) <= most // 2:
            if cache is not None:
                cache, active, last, alive = _drop(cache, active, last, alive)
            while waiting and len(active) < most:
                numbers = _next_prompts(waiting, prompts, most - len(active), shared)
                new, logits = prefill(model, [prompts[i] for i in numbers], shared)
                tokens = choose(logits, numbers)
                alive += take(numbers, tokens)
                active, last = active + numbers, last + tokens
                if cache is None:
                    cache = new
                else:
                    cache.join(new)
            continue
        assert cache is not None
        if sum(alive) <= 3 * len(alive) // 4:
            cache, active, last, alive = _drop(cache, active, last, alive)
            assert cache is not None
        tokens = choose(step(model, cache, last), active)
        # A row that has stopped is computed until it is dropped, at the place where it stopped.
        cache.lengths += torch.tensor(alive)
        going = [row for row, on in enumerate(alive) if on]
        goes_on = take([active[row] for row in going], [tokens[row] for row in going])
        for row, on in zip(going, goes_on, strict=True):
            alive[row], last[row] = on, tokens[row]
    return answers


def _drop(
    cache: Cache, active: list[int], last: list[int], alive: list[bool]
) -> tuple[Cache | None, list[int], list[int], list[bool]]:
    """Without the rows that have stopped."""
    rows = [row for row, on in enumerate(alive) if on]
    if not rows:
        return None, [], [], []
    if len(rows) < len(active):
        cache.keep(torch.tensor(rows))
    return cache, [active[row] for row in rows], [last[row] for row in rows], [True] * len(rows)


def _rows_at_once(prompts: Sequence[Sequence[int]], shared: int, max_new_tokens: int) -> int:
    longest = max((len(p) for p in prompts), default=0) - shared + max_new_tokens
    return max(1, min(ROWS, CACHE_TOKENS // longest))


def _next_prompts(waiting: list[int], prompts: Sequence[Sequence[int]], most: int, shared: int) -> list[int]:
    """Takes prompts from the end of `waiting`: at most `most`, at least one, up to PREFILL_TOKENS of their own."""
    taken: list[int] = []
    tokens = 0
    while waiting and len(taken) < most:
        tokens += len(prompts[waiting[-1]]) - shared
        if taken and tokens > PREFILL_TOKENS:
            break
        taken.append(waiting.pop())
    return taken


def _common_start(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, each keeping one of its own."""
    if len(prompts) < 2:
        return 0
    limit = min(len(p) for p in prompts) - 1
    first = prompts[0]
    return next((i for i in range(limit) if any(p[i] != first[i] for p in prompts)), limit)


@dataclass(frozen=True)
class Prompts:
    """A group: prompts (none empty) that all begin with the same `shared` tokens."""

    ids: Sequence[Sequence[int]]
    shared: int = 0

    @property
    def tokens(self) -> int:
        """Rows that they take in a forward."""
        return self.shared + sum(len(prompt) - self.shared for prompt in self.ids)


def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]], shared: int = 0) -> tuple[Cache, Tensor]:
    """Read prompts that all begin with the same `shared` tokens: their cache, and the logits (B, V) that follow."""
    (cache,), logits = prefill_groups(model, [Prompts(prompts, shared)])
    return cache, logits


def prefill_groups(
    model: PreTrainedModel, groups: Sequence[Prompts], *, routing: Routing | None = None
) -> tuple[list[Cache], Tensor]:
    """Each group's cache, and the logits (B, V) that follow all prompts in their order.

    routing: where several adapters act, each on groups of its own, of as many rows as these take.
    """
    device = model.device
    ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    for group in groups:
        shared = group.shared
        ids += group.ids[0][:shared]
        positions += range(shared)
        for prompt in group.ids:
            ids += prompt[shared:]
            positions += range(shared, len(prompt))
            ends.append(len(ids) - 1)
    filler = round_up(len(ids)) - len(ids)  # few shapes (kernels/layout.py)
    caches = [Cache(torch.tensor([len(p) for p in group.ids]), group.shared) for group in groups]
    laid = (Group(g.shared, tuple(len(p) - g.shared for p in g.ids), device) for g in groups)
    traced = Traced(Layout(tuple(laid)), caches)
    rows = torch.tensor([each + [0] * filler for each in (ids, positions)], device=device)
    kept = torch.tensor(ends, device=device)
    with nullcontext() if routing is None else routing.held(routing.acting.padded(filler).keeping(kept)):
        return caches, _logits(model, rows[:1], rows[1:], traced, logits_to_keep=kept)


def step(model: PreTrainedModel, cache: Cache, tokens: Sequence[int]) -> Tensor:
    """One more token of every row: the logits (B, V) that follow it. The caller then counts it in cache.lengths."""
    return step_groups(model, [cache], tokens)


def step_groups(model: PreTrainedModel, caches: Sequence[Cache], tokens: Sequence[int]) -> Tensor:
    """The same of several caches, whose rows follow one another. Parts that act have as many rows as these."""
    lengths = [length for cache in caches for length in cache.lengths.tolist()]
    rows = torch.tensor([list(tokens), lengths], device=model.device)  # one copy to the device
    places = rows[1].split([cache.rows for cache in caches])
    steps = [CachedStep(cache, place) for cache, place in zip(caches, places, strict=True)]
    laid = steps[0] if len(steps) == 1 else CachedSteps(steps)
    return _logits(model, rows[:1], rows[1:], laid, logits_to_keep=0)


def _logits(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, layout: Laid, *, logits_to_keep: Tensor | int
) -> Tensor:
    """(1, N) ids -> (kept, V)."""
    call: Any = model
    out = call(
        input_ids=ids,
        position_ids=positions,
        attention_mask=unused_mask(ids.device),
        use_cache=False,
        veneer_layout=layout,
        logits_to_keep=logits_to_keep,
    )
    return out.logits[0]


@torch.no_grad()
def continued(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], given: Sequence[Sequence[int]], shared: int
) -> Tensor:
    """Prompts that begin with the same `shared` tokens, continued by as many given tokens each: (1 + given, B, V)
    logits."""
    cache, logits = prefill(model, prompts, shared)
    found = [logits]
    for tokens in zip(*given, strict=True):
        found.append(step(model, cache, tokens))
        cache.lengths += 1
    return torch.stack(found)
