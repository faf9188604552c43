"""Answers: token ids in, token ids out, many rows at once with a cache.

Says what stops an answer, how tokens are drawn, and which loop decodes: our own (decoding/decode.py) where it is
proven on the model, else transformers', its prompts padded on the left where that is proven, else one by one;
where even that is not what the model gives on whole texts, the whole text is read for every token. Prompts whose
answer may cross a length at which the model reads all of its text otherwise (models/switches.py) go through
transformers' loop one by one. Knows nothing of chats or templates.
"""

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
from veneer.decoding.decode import Choose, decode, decode_rereading, greedy
from veneer.decoding.proof import loops, prove_decoding
from veneer.errors import ConfigError
from veneer.models.capacity import capacity_of
from veneer.models.checks import in_front
from veneer.models.frozen_base import FrozenBase
from veneer.models.switches import forget_lengths, switches

PADDED_ROWS = 32
"""Prompts that transformers' loop decodes together, padded on the left to the longest of them."""

_COLDEST = 1e-9
"""From here on any two logits that differ are infinitely far apart: the likeliest token is taken."""


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
    on_token gets each id of the answer as it comes; for a single prompt only.
    on_done gets the number of prompts answered so far, now and then.
    ConfigError: a prompt that is empty, leaves no room within the model's positions or holds an id that it has no row
    for; numbers outside of what they mean.
    """
    capacity = capacity_of(base)
    check_numbers(
        max_new_tokens=(NEW_TOKENS, max_new_tokens),
        temperature=(TEMPERATURE, temperature),
        top_p=(TOP_P, top_p),
        seed=(SEED, seed),
    )
    _check_prompts(prompts, capacity)
    limits = [
        max_new_tokens if capacity.positions is None else min(max_new_tokens, capacity.positions - len(ids))
        for ids in prompts
    ]
    draw = _Draw(temperature, top_p, seed) if temperature > _COLDEST and top_p > 0 else None
    stops = list(stop_token_ids(base.tokenizer, base.model.generation_config))

    def say(token: int) -> None:
        if on_token is not None and token not in stops:
            on_token(token)

    told = say if on_token is not None and len(prompts) == 1 else None
    asked = _Asked(base, prompts, limits, stops, draw, told, on_done)
    packed = _decodes_packed(base)
    if not packed and loops(base.model).cached is not None:
        _by_rereading(asked)
        return asked.answers
    plain, crossing = _by_switch(asked)
    if packed and plain:
        _by_our_loop(asked, plain)
    elif plain:
        beside = loops(base.model).beside is None
        _by_transformers(asked, _like_rows(asked, plain, PADDED_ROWS if beside else 1))
    _by_transformers(asked, ([number] for number in crossing))
    return asked.answers


@dataclass(frozen=True)
class _Draw:
    """How tokens are drawn."""

    temperature: float
    top_p: float
    seed: int

    def of_row(self, number: int) -> int:
        """The seed of a prompt's own draws."""
        return (self.seed * 1_000_003 + number) % 2**63


@dataclass
class _Asked:
    """Prompts with the new tokens each may get, and the answers as they come. draw: None takes the likeliest token."""

    base: FrozenBase
    prompts: Sequence[list[int]]
    limits: Sequence[int]
    stops: list[int]
    draw: _Draw | None
    on_token: Callable[[int], None] | None
    on_done: Callable[[int], None] | None
    answers: list[list[int]] = field(init=False)
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.answers = [[] for _ in self.prompts]

    def finished(self, rows: int) -> None:
        self.done += rows
        if self.on_done is not None:
            self.on_done(self.done)


def _by_switch(asked: _Asked) -> tuple[list[int], list[int]]:
    """Numbers of the prompts whose longest answer is read like their first token, and of the others."""
    known, before = switches(asked.base.config), in_front(asked.base.model)
    first = known.side(0)
    reach = [before + len(ids) + limit for ids, limit in zip(asked.prompts, asked.limits, strict=True)]
    plain = [i for i, length in enumerate(reach) if known.side(length) == first]
    return plain, [i for i, length in enumerate(reach) if known.side(length) != first]


def _by_our_loop(asked: _Asked, numbers: Sequence[int]) -> None:
    counts = [0] * len(numbers)
    limits = [asked.limits[i] for i in numbers]

    def token(place: int, new: int) -> None:
        if asked.on_token is not None:
            asked.on_token(new)
        counts[place] += 1
        if new in asked.stops or counts[place] == limits[place]:
            asked.finished(1)

    new = decode(
        asked.base.model,
        [asked.prompts[i] for i in numbers],
        stops=set(asked.stops),
        max_new_tokens=limits,
        choose=greedy if asked.draw is None else _sampler(numbers, asked.draw),
        on_token=token,
    )
    for number, answer in zip(numbers, new, strict=True):
        asked.answers[number] = answer


def _by_rereading(asked: _Asked) -> None:
    for number, prompt in enumerate(asked.prompts):
        choose = greedy if asked.draw is None else _sampler([number], asked.draw)
        asked.answers[number] = decode_rereading(
            asked.base.model,
            prompt,
            stops=set(asked.stops),
            max_new_tokens=asked.limits[number],
            choose=lambda logits, choose=choose: choose(logits, [0])[0],  # type: ignore[misc]
            on_token=asked.on_token,
        )
        asked.finished(1)


def _decodes_packed(base: FrozenBase) -> bool:
    """Whether our own loop is proven on this base: with no adapter acting, once."""
    if base.decodes_packed is None:
        with base.routing.none():
            base.decodes_packed = prove_decoding(base.model) is None
    return base.decodes_packed


def _sampler(rows: Sequence[int], draw: _Draw) -> Choose:
    """Draws from the likeliest tokens that together have `top_p`, the first of them at least; a row's draws do not
    depend on the other rows. rows: the numbers of the prompts among all."""
    random = [torch.Generator().manual_seed(draw.of_row(row)) for row in rows]

    def choose(logits: Tensor, numbers: Sequence[int]) -> list[int]:
        wide = logits.float()
        # the shift keeps the quotient finite at the top
        below = (wide - wide.amax(dim=-1, keepdim=True)) / draw.temperature
        chances, tokens = torch.softmax(below, dim=-1).sort(dim=-1, descending=True)
        reach = chances.cumsum(dim=-1)
        left_out = reach - chances >= draw.top_p
        left_out[:, 0] = False
        reach = chances.masked_fill_(left_out, 0.0).cumsum(dim=-1)
        drawn = torch.cat([torch.rand(1, generator=random[number]) for number in numbers]).to(reach.device)
        places = torch.searchsorted(reach, (drawn * reach[:, -1])[:, None], right=True)
        # rounding can put a draw on the very end, behind which stand the tokens that were left out
        last = (chances > 0).sum(dim=-1, keepdim=True) - 1
        places = torch.minimum(places, last)
        return tokens.gather(1, places)[:, 0].tolist()

    return choose


class _Tokens(BaseStreamer):
    """Hands every new token on as it is chosen; transformers sends the prompt first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.prompt_seen = on_token, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.on_token(token)
        self.prompt_seen = True

    def end(self) -> None: ...


def _by_transformers(asked: _Asked, groups: Iterable[list[int]]) -> None:
    """transformers' own loop, the prompts of a group at once, padded on the left to the longest of them."""
    base, draw = asked.base, asked.draw
    pad = _padding(base, asked.stops)
    sampling = {} if draw is None else {"temperature": draw.temperature, "top_p": draw.top_p, "top_k": 0}
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(0 if draw is None else draw.seed % 2**63)
        for rows in groups:
            if draw is not None and len(rows) == 1:
                torch.manual_seed(draw.of_row(rows[0]))
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
                streamer=_Tokens(asked.on_token) if asked.on_token is not None else None,
            )
            for place, i in enumerate(rows):
                asked.answers[i] = _until_stop(out[place, longest:].tolist(), set(asked.stops))
            asked.finished(len(rows))


def _like_rows(asked: _Asked, numbers: Sequence[int], together: int) -> Iterator[list[int]]:
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
            f"prompt {i + 1} has {len(ids):,} tokens: no answer fits behind it into the model's {places:,} positions"
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
