"""Answers: token ids in, token ids out, many prompts at once.

Says what stops an answer, how tokens are drawn, and what decodes: our own engine
(decoding/engine.py) where it is proven on the model, else transformers' loop, its prompts padded on
the left where that is proven, else one by one; where even that is not what the model gives on whole
texts, the whole text is read for every token. Prompts whose answer may cross a length at which the
model reads all of its text otherwise (models/switches.py) go through transformers' loop one by one.
Knows nothing of chats or templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from veneer.bases.stop_tokens import stop_token_ids
from veneer.bounds import NEW_TOKENS, SEED, TEMPERATURE, TOP_P, check_numbers
from veneer.data.examples import Capacity
from veneer.decoding.engine import BLOCK_SLOTS, Engine, bytes_per_token
from veneer.decoding.proof import decodes_packed, loops
from veneer.decoding.rereading import answer_by_rereading
from veneer.decoding.sampling.sampling import Sampling, seed_of
from veneer.decoding.schedule.adapters import FixedAdapters, front_places
from veneer.decoding.schedule.blocks import Identity
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import Request
from veneer.decoding.schedule.sequence import Sequence as Answer
from veneer.errors import ConfigError
from veneer.models.capacity import capacity_of
from veneer.models.checks import in_front
from veneer.models.frozen_base import FrozenBase
from veneer.models.switches import forget_lengths, switches

ROWS = 64
"""Answers of the engine at once. A step reads every weight once, whatever the rows."""
READ_TOKENS = 2048
"""Tokens computed in one forward: bounds the activations. Of one prompt 512: bounds the scores of
its attention."""
KEYS_TOKENS = 65536
"""Tokens whose keys and values are held, of all answers together (fewer rows where these are
long)."""
PADDED_ROWS = 32
"""Prompts that transformers' loop decodes together, padded on the left to the longest of them."""


@torch.no_grad()
def generate(
    base: FrozenBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """One list of new ids per prompt, the stop token left out. temperature 0 is greedy.

    An answer that has not stopped is cut after max_new_tokens, or where the model's positions end.
    on_token gets each id of the answer as it comes; for a single prompt only. on_done gets the
    number of prompts answered so far, now and then. ConfigError: a prompt that is empty, leaves no
    room within the model's positions or holds an id that it has no row for; numbers outside of what
    they mean.
    """
    check_numbers(
        max_new_tokens=(NEW_TOKENS, max_new_tokens),
        temperature=(TEMPERATURE, temperature),
        top_p=(TOP_P, top_p),
        seed=(SEED, seed),
    )
    stops = list(stop_token_ids(base.tokenizer, base.model.generation_config))

    def say(token: int) -> None:
        if on_token is not None and token not in stops:
            on_token(token)

    told = say if on_token is not None and len(prompts) == 1 else None
    with base.routing.held():  # who acts now acts for all of it
        limits = limits_of(base, prompts, max_new_tokens)
        asked = _GenerationRun(
            base,
            prompts,
            limits,
            stops,
            Sampling(temperature=temperature, top_p=top_p),
            seed,
            told,
            on_done,
        )
        _answer(asked)
    return asked.answers


def limits_of(base: FrozenBase, prompts: Sequence[list[int]], max_new_tokens: int) -> list[int]:
    """New tokens that each may get, its stop token among them: an answer of so many was cut.
    ConfigError: prompts that cannot be answered."""
    capacity = capacity_of(base)
    _check_prompts(prompts, capacity)
    if capacity.positions is None:
        return [max_new_tokens] * len(prompts)
    return [min(max_new_tokens, capacity.positions - len(ids)) for ids in prompts]


def _answer(asked: _GenerationRun) -> None:
    base = asked.base
    if not (packed := decodes_packed(base)) and loops(base.model).cached is not None:
        _by_rereading(asked)
        return
    plain, crossing = _by_switch(asked)
    if packed and plain:
        _by_engine(asked, plain)
    elif plain:
        beside = loops(base.model).beside is None
        _by_transformers(asked, _like_rows(asked, plain, PADDED_ROWS if beside else 1))
    _by_transformers(asked, ([number] for number in crossing))


@dataclass
class _GenerationRun:
    """Prompts with the new tokens each may get, and the answers as they come."""

    base: FrozenBase
    prompts: Sequence[list[int]]
    limits: Sequence[int]
    stops: list[int]
    sampling: Sampling
    seed: int
    on_token: Callable[[int], None] | None
    on_done: Callable[[int], None] | None
    answers: list[list[int]] = field(init=False)
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.answers = [[] for _ in self.prompts]

    def request(self, number: int, adapter: Identity = ()) -> Request:
        return Request(
            prompt=tuple(self.prompts[number]),
            max_new_tokens=self.limits[number],
            adapter=adapter,
            stops=frozenset(self.stops),
            sampling=self.sampling,
            seed=seed_of(self.seed, number),
        )

    def finished(self, rows: int) -> None:
        self.done += rows
        if self.on_done is not None:
            self.on_done(self.done)


def _by_switch(asked: _GenerationRun) -> tuple[list[int], list[int]]:
    """Numbers of the prompts whose longest answer is read like their first token, and of the
    others."""
    known, before = switches(asked.base.config), in_front(asked.base.model)
    first = known.side(0)
    reach = [
        before + len(ids) + limit for ids, limit in zip(asked.prompts, asked.limits, strict=True)
    ]
    plain = [i for i, length in enumerate(reach) if known.side(length) == first]
    return plain, [i for i, length in enumerate(reach) if known.side(length) != first]


def _by_engine(asked: _GenerationRun, numbers: Sequence[int]) -> None:
    """Long prompts first, so that those that go on together are alike."""
    base = asked.base
    if (applied := base.routing.acting.whole) is None:
        raise ConfigError(
            "several adapters act, each on rows of its own",
            next_step="Answer each row's prompt apart.",
        )
    acting: Identity = (
        (("what acts", 1.0),) if applied else ()
    )  # an engine of its own: nobody else's name
    front, slots = front_places(applied), BLOCK_SLOTS
    needs = [-(-(len(asked.prompts[i]) + asked.limits[i]) // slots) for i in numbers]
    most = max(min(sum(needs), KEYS_TOKENS // slots), max(needs))
    rows = max(
        1, min(ROWS, len(numbers), KEYS_TOKENS // slots // max(needs))
    )  # none has to go back
    spare = rows + -(-front // slots)  # the scheduler keeps one block free for each that runs
    engine = Engine(
        base,
        budget_bytes=(most + spare) * slots * bytes_per_token(base),
        adapters=FixedAdapters({acting: applied} if applied else {}),
        limits=Limits(rows=rows, step_tokens=READ_TOKENS, chunk_tokens=READ_TOKENS // 4),
    )
    waiting = sorted(numbers, key=lambda i: len(asked.prompts[i]))  # taken from the end
    under_way: dict[Answer, int] = {}
    while waiting or under_way:
        while waiting and len(under_way) < 2 * rows:
            number = waiting.pop()
            (answer,) = engine.add(asked.request(number, acting))
            under_way[answer] = number
        before = {answer: len(answer.new) for answer in under_way}
        ended = engine.step(0.0)
        for answer, said in before.items():
            if asked.on_token is not None and len(answer.new) > said:
                asked.on_token(answer.new[-1])
        for answer in ended:
            if answer.error is not None:
                raise answer.error
            asked.answers[under_way.pop(answer)] = answer.answer
            asked.finished(1)


def _by_rereading(asked: _GenerationRun) -> None:
    for number in range(len(asked.prompts)):
        request = asked.request(number)
        asked.answers[number] = answer_by_rereading(
            asked.base.model, request, on_token=asked.on_token
        )
        asked.finished(1)


class _TokenStreamer(BaseStreamer):
    """Hands every new token on as it is chosen; transformers sends the prompt first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.prompt_seen = on_token, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.on_token(token)
        self.prompt_seen = True

    def end(self) -> None: ...


def _by_transformers(asked: _GenerationRun, groups: Iterable[list[int]]) -> None:
    """transformers' own loop, the prompts of a group at once, padded on the left to the longest of
    them."""
    base, how = asked.base, asked.sampling
    pad = _padding(base, asked.stops)
    sampling = (
        {} if how.greedy else {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    )
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(asked.seed)
        for rows in groups:
            if len(rows) == 1:
                torch.manual_seed(seed_of(asked.seed, rows[0]))
            settings = GenerationConfig(
                max_new_tokens=asked.limits[rows[0]],
                do_sample=bool(sampling),
                eos_token_id=asked.stops or None,
                pad_token_id=pad,
                use_cache=True,
                **sampling,
            )
            longest = max(len(asked.prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), pad)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            for place, i in enumerate(rows):
                ids[place, longest - len(asked.prompts[i]) :] = torch.tensor(asked.prompts[i])
                mask[place, longest - len(asked.prompts[i]) :] = 1
            forget_lengths(base.model)
            run: Any = base.model.generate
            out = run(
                ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=settings,
                streamer=_TokenStreamer(asked.on_token) if asked.on_token is not None else None,
            )
            for place, i in enumerate(rows):
                asked.answers[i] = _until_stop(out[place, longest:].tolist(), set(asked.stops))
            asked.finished(len(rows))


def _like_rows(asked: _GenerationRun, numbers: Sequence[int], together: int) -> Iterator[list[int]]:
    """Prompts that go together: of like length, and with the same number of new tokens at most."""
    limits = asked.limits
    order = sorted(numbers, key=lambda i: (-limits[i], len(asked.prompts[i])))
    for _, some in groupby(order, key=lambda i: limits[i]):
        rows = list(some)
        for start in range(0, len(rows), together):
            yield rows[start : start + together]


def _padding(base: FrozenBase, stops: list[int]) -> int:
    """An id that the model has a row for: tokenizers name padding that was added to them alone."""
    known = capacity_of(base).tokens
    named = [base.tokenizer.pad_token_id, *stops]
    return next((i for i in named if i is not None and (known is None or i < known)), 0)


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    return next((ids[:place] for place, token in enumerate(ids) if token in stops), ids)


def _check_prompts(prompts: Sequence[list[int]], capacity: Capacity) -> None:
    faults = [f"prompt {i + 1} is empty" for i, ids in enumerate(prompts) if not ids]
    if (places := capacity.positions) is not None:
        faults += [
            f"prompt {i + 1} has {len(ids):,} tokens: no answer fits behind it into the model's"
            f" {places:,} positions"
            for i, ids in enumerate(prompts)
            if len(ids) >= places
        ]
    if (known := capacity.tokens) is not None:
        faults += [
            f"prompt {i + 1} holds token {max(ids)}, and the model has rows for {known:,}"
            for i, ids in enumerate(prompts)
            if ids and max(ids) >= known
        ]
    if faults:
        raise ConfigError("these prompts cannot be answered", faults, "Shorten or change them.")
