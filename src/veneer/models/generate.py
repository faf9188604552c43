"""Answers: token ids in, token ids out, many rows at once with a cache.

Says what stops an answer, how tokens are drawn, and which loop decodes: our own (models/decode.py) where it is
proven on the model, else transformers'. Knows nothing of chats or templates.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from veneer.bounds import NEW_TOKENS, SEED, TEMPERATURE, TOP_P, check_numbers
from veneer.data.examples import Capacity
from veneer.errors import ConfigError
from veneer.models.base import Base, stop_token_ids
from veneer.models.capacity import capacity_of
from veneer.models.decode import Choose, decode, greedy, prove_decoding

PADDED_ROWS = 32
"""Prompts that transformers' loop decodes together, padded on the left to the longest of them."""

_COLDEST = (
    1e-9  # from here on any two logits that differ are infinitely far apart: the likeliest token is taken
)


@torch.no_grad()
def generate(
    base: Base,
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
    on_token gets each new id as it comes (the stop token included); for a single prompt only.
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
    draws = temperature > _COLDEST and top_p > 0
    stops = list(stop_token_ids(base.tokenizer, base.model.generation_config))
    stream = on_token if len(prompts) == 1 else None
    if _decodes_packed(base):
        seen: set[int] = set()
        counts: dict[int, int] = {}

        def token(number: int, new: int) -> None:
            if stream is not None:
                stream(new)
            counts[number] = counts.get(number, 0) + 1
            if on_done is not None and (new in stops or counts[number] == limits[number]):
                seen.add(number)
                on_done(len(seen))

        choose = _sampler(len(prompts), temperature, top_p, seed) if draws else greedy
        return decode(
            base.model, prompts, stops=set(stops), max_new_tokens=limits, choose=choose, on_token=token
        )
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if draws else {}
    return _by_transformers(base, prompts, stops, limits, sampling, seed, stream, on_done)


def _decodes_packed(base: Base) -> bool:
    """Whether our own loop is proven on this base: with no adapter acting, once."""
    if base.decodes_packed is None:
        with base.routing.none():
            base.decodes_packed = prove_decoding(base.model) is None
    return base.decodes_packed


def _sampler(rows: int, temperature: float, top_p: float, seed: int) -> Choose:
    """Draws from the likeliest tokens that together have `top_p`, the first of them at least; a row's draws do not
    depend on the other rows."""
    random = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in range(rows)]

    def choose(logits: Tensor, numbers: Sequence[int]) -> list[int]:
        wide = logits.float()
        below = (
            wide - wide.amax(dim=-1, keepdim=True)
        ) / temperature  # the shift keeps the quotient finite at the top
        chances, tokens = torch.softmax(below, dim=-1).sort(dim=-1, descending=True)
        reach = chances.cumsum(dim=-1)
        left_out = reach - chances >= top_p
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


def _by_transformers(
    base: Base, prompts: Sequence[list[int]], stops: list[int], limits: Sequence[int], sampling: dict[str, float],
    seed: int, on_token: Callable[[int], None] | None, on_done: Callable[[int], None] | None,
) -> list[list[int]]:  # fmt: skip
    """transformers' own loop, on batches padded on the left: for models whose attention cannot be reached."""
    pad = _padding(base, stops)
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed % 2**63)
        for rows in _like_rows(prompts, limits):
            settings = GenerationConfig(
                max_new_tokens=limits[rows[0]], do_sample=bool(sampling), eos_token_id=stops or None, pad_token_id=pad,
                use_cache=True, **sampling,
            )  # fmt: skip
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), pad)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            for place, i in enumerate(rows):
                ids[place, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[place, longest - len(prompts[i]) :] = 1
            run: Any = base.model.generate
            out = run(
                ids.to(base.device),
                attention_mask=mask.to(base.device),
                generation_config=settings,
                streamer=_Tokens(on_token) if on_token is not None else None,
            )
            for place, i in enumerate(rows):
                answers[i] = _until_stop(out[place, longest:].tolist(), set(stops))
            done += len(rows)
            if on_done is not None:
                on_done(done)
    return answers


def _like_rows(prompts: Sequence[list[int]], limits: Sequence[int]) -> Iterator[list[int]]:
    """Prompts that go together: of like length, and with the same number of new tokens at most."""
    order = sorted(range(len(prompts)), key=lambda i: (-limits[i], len(prompts[i])))
    for _, some in groupby(order, key=lambda i: limits[i]):
        rows = list(some)
        for start in range(0, len(rows), PADDED_ROWS):
            yield rows[start : start + PADDED_ROWS]


def _padding(base: Base, stops: list[int]) -> int:
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
