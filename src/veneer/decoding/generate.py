"""Generates answers: token ids in, token ids out, for many prompts.

The way to decode is the first that is proven on the model: our engine (decoding/engine.py);
transformers' loop with prompts padded on the left; the same loop, prompt by prompt; reading the
whole text for every token. Prompts whose answer may cross a length at which the model reads its
whole text differently (execution/switches.py) go through transformers' loop one by one. This module
knows nothing of chats or templates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from veneer.adapters.activation import activation_start
from veneer.adapters.placement.acting import check_answers, invocation_of
from veneer.bases.stop_tokens import stop_token_ids
from veneer.bounds import NEW_TOKENS, SEED, TEMPERATURE, TOP_P, check_numbers
from veneer.data.examples import Capacity
from veneer.decoding.engine import BLOCK_SLOTS, Engine, bytes_per_token, states_of
from veneer.decoding.proof import decodes_packed, loops
from veneer.decoding.rereading import answer_by_rereading
from veneer.decoding.sampling.sampling import Sampling, seed_of
from veneer.decoding.schedule.adapters import FixedAdapters, prefix_length
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.lookup import LookupMode, check_lookup
from veneer.decoding.schedule.sequence import Request
from veneer.decoding.schedule.sequence import Sequence as Answer
from veneer.errors import ConfigError
from veneer.execution.proofs.model import acting_prefix_length
from veneer.execution.switches import forget_lengths, switches
from veneer.kernels.dense.segments import UpdateCache
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase

ROWS = 64
"""Most answers that the engine computes together. A step reads every weight once, whatever the
rows."""
READ_TOKENS = 2048
"""Most tokens of a forward, which bounds the activations; a quarter of them for one prompt, which
bounds its attention scores."""
KEYS_TOKENS = 65536
"""Most tokens whose keys and values are stored, over all answers; long answers have fewer rows."""
STATE_BYTES = 2**32
"""Most bytes of states (execution/states.py); large ones have fewer rows."""
PADDED_ROWS = 32
"""Prompts per batch in transformers' loop, padded on the left."""


@torch.no_grad()
def generate(
    base: FrozenBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    lookup: LookupMode = "auto",
    on_token: Callable[[int], None] | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Generates one list of new ids per prompt, without the stop token. temperature 0 is greedy.

    An answer ends after max_new_tokens at the latest, or where the model's positions end. on_token
    gets each id of the answer to a single prompt. on_done gets the number of prompts answered so
    far, now and then. Raises ConfigError for a prompt that is empty, too long for the model's
    positions, or holds an unknown id, and for numbers out of bounds. lookup: as in Engine.
    """
    check_lookup(lookup)
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

    token_callback = say if on_token is not None and len(prompts) == 1 else None
    with base.routing.held():  # the adapters that act now act throughout
        check_answers(base.routing.acting.adapters)
        limits = limits_of(base, prompts, max_new_tokens)
        run = _GenerationRun(
            base,
            prompts,
            limits,
            stops,
            Sampling(temperature=temperature, top_p=top_p),
            seed,
            lookup,
            token_callback,
            on_done,
        )
        _answer(run)
    return run.answers


def limits_of(base: FrozenBase, prompts: Sequence[list[int]], max_new_tokens: int) -> list[int]:
    """Returns the most new tokens of each prompt, with its stop token. An answer of that length was
    cut. Raises ConfigError for prompts that cannot be answered."""
    capacity = capacity_of(base)
    _check_prompts(prompts, capacity)
    if capacity.positions is None:
        return [max_new_tokens] * len(prompts)
    return [min(max_new_tokens, capacity.positions - len(ids)) for ids in prompts]


def _answer(run: _GenerationRun) -> None:
    base = run.base
    if not (packed := decodes_packed(base)) and loops(base.model).cached is not None:
        _by_rereading(run, range(len(run.prompts)))
        return
    plain, crossing = _by_switch(run)
    if packed and plain:
        _by_engine(run, plain)
    elif run.invocation:  # transformers' loop does not tell the adapter which tokens it gets
        _by_rereading(run, plain)
    elif plain:
        pads_alike = loops(base.model).beside is None
        _by_transformers(run, _batches(run, plain, PADDED_ROWS if pads_alike else 1))
    if run.invocation:
        _by_rereading(run, crossing)
    else:
        _by_transformers(run, ([number] for number in crossing))


@dataclass
class _GenerationRun:
    """Prompts with their limits of new tokens, and the answers so far."""

    base: FrozenBase
    prompts: Sequence[list[int]]
    limits: Sequence[int]
    stops: list[int]
    sampling: Sampling
    seed: int
    lookup: LookupMode
    on_token: Callable[[int], None] | None
    on_done: Callable[[int], None] | None
    answers: list[list[int]] = field(init=False)
    done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.answers = [[] for _ in self.prompts]

    @property
    def invocation(self) -> tuple[int, ...]:
        """Returns the token ids from which on the acting adapter acts; empty: on all tokens."""
        return invocation_of(self.base.routing.acting.whole or ())

    def request(self, number: int, adapter: Identity = ()) -> Request:
        return Request(
            prompt=tuple(self.prompts[number]),
            max_new_tokens=self.limits[number],
            adapter=adapter,
            activation=activation_start(self.prompts[number], self.invocation),
            stops=frozenset(self.stops),
            sampling=self.sampling,
            seed=seed_of(self.seed, number),
        )

    def finished(self, rows: int) -> None:
        self.done += rows
        if self.on_done is not None:
            self.on_done(self.done)


def _by_switch(run: _GenerationRun) -> tuple[list[int], list[int]]:
    """Divides prompt numbers: those whose longest text is read like a short one, and the rest."""
    lengths, prefix = switches(run.base.config), acting_prefix_length(run.base.model)
    first = lengths.side(0)
    reach = [prefix + len(ids) + limit for ids, limit in zip(run.prompts, run.limits, strict=True)]
    plain = [i for i, length in enumerate(reach) if lengths.side(length) == first]
    return plain, [i for i, length in enumerate(reach) if lengths.side(length) != first]


def _by_engine(run: _GenerationRun, numbers: Sequence[int]) -> None:
    """Answers long prompts first, so that prompts of a step are of similar length."""
    base = run.base
    if (applied := base.routing.acting.whole) is None:
        raise ConfigError(
            "several adapters act, each on its own rows",
            next_step="Generate for each adapter separately.",
        )
    # The engine is used for this run only, so the name is arbitrary.
    acting: Identity = (("what acts", 1.0),) if applied else ()
    prefix, slots = prefix_length(applied), BLOCK_SLOTS
    blocks_needed = [-(-(len(run.prompts[i]) + run.limits[i]) // slots) for i in numbers]
    most = max(min(sum(blocks_needed), KEYS_TOKENS // slots), max(blocks_needed))
    # So few rows that none is preempted.
    rows = max(1, min(ROWS, len(numbers), KEYS_TOKENS // slots // max(blocks_needed)))
    if (states := states_of(base)) is not None:
        rows = max(1, min(rows, states.texts_in(STATE_BYTES)))
    spare = rows + -(-prefix // slots)  # the scheduler keeps a free block for each running sequence
    engine = Engine(
        base,
        budget_bytes=(most + spare) * slots * bytes_per_token(base)
        + (0 if states is None else 2 * states.bytes_of(rows)),
        adapters=FixedAdapters({acting: applied} if applied else {}),
        limits=Limits(rows=rows, step_tokens=READ_TOKENS, chunk_tokens=READ_TOKENS // 4),
        lookup=run.lookup,
    )
    waiting = sorted(numbers, key=lambda i: len(run.prompts[i]))  # taken from the end
    pending: dict[Answer, int] = {}
    while waiting or pending:
        while waiting and len(pending) < 2 * rows:
            number = waiting.pop()
            (answer,) = engine.add(run.request(number, acting))
            pending[answer] = number
        before = {answer: len(answer.new) for answer in pending}
        ended = engine.step(0.0)
        for answer, count in before.items():
            if run.on_token is not None:
                for token in answer.new[count:]:
                    run.on_token(token)
        for answer in ended:
            if answer.error is not None:
                raise answer.error
            run.answers[pending.pop(answer)] = answer.answer
            run.finished(1)


def _by_rereading(run: _GenerationRun, numbers: Iterable[int]) -> None:
    routing = run.base.routing
    for number in numbers:
        request = run.request(number)
        run.answers[number] = answer_by_rereading(
            run.base.model, routing, request, on_token=run.on_token
        )
        run.finished(1)


class _TokenStreamer(BaseStreamer):
    """Passes new tokens on; transformers sends the prompt first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token, self.prompt_seen = on_token, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.on_token(token)
        self.prompt_seen = True

    def end(self) -> None: ...


def _by_transformers(run: _GenerationRun, groups: Iterable[list[int]]) -> None:
    """Runs transformers' loop on each group of prompts, padded on the left."""
    base, pad = run.base, _padding(run.base, run.stops)
    acting, sampling = base.routing.acting, {}
    if not run.sampling.greedy:
        sampling = {
            "temperature": run.sampling.temperature,
            "top_p": run.sampling.top_p,
            "top_k": 0,
        }
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(run.seed)
        for rows in groups:
            if len(rows) == 1:
                torch.manual_seed(seed_of(run.seed, rows[0]))
            settings = GenerationConfig(
                max_new_tokens=run.limits[rows[0]],
                do_sample=bool(sampling),
                eos_token_id=run.stops or None,
                pad_token_id=pad,
                use_cache=True,
                **sampling,
            )
            longest = max(len(run.prompts[i]) for i in rows)
            ids = torch.full((len(rows), longest), pad)
            mask = torch.zeros((len(rows), longest), dtype=torch.long)
            for place, i in enumerate(rows):
                ids[place, longest - len(run.prompts[i]) :] = torch.tensor(run.prompts[i])
                mask[place, longest - len(run.prompts[i]) :] = 1
            forget_lengths(base.model)
            model_generate: Any = base.model.generate
            with base.routing.held(replace(acting, step=len(rows), plan=UpdateCache())):
                out = model_generate(
                    ids.to(base.device),
                    attention_mask=mask.to(base.device),
                    generation_config=settings,
                    streamer=_TokenStreamer(run.on_token) if run.on_token is not None else None,
                )
            for place, i in enumerate(rows):
                run.answers[i] = _until_stop(out[place, longest:].tolist(), set(run.stops))
            run.finished(len(rows))


def _batches(run: _GenerationRun, numbers: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Batches of prompts with the same limit and similar lengths."""
    limits = run.limits
    order = sorted(numbers, key=lambda i: (-limits[i], len(run.prompts[i])))
    for _, group in groupby(order, key=lambda i: limits[i]):
        rows = list(group)
        for start in range(0, len(rows), batch):
            yield rows[start : start + batch]


def _padding(base: FrozenBase, stops: list[int]) -> int:
    """Returns a padding id that the model has a row for. Some tokenizers name one that it has
    not."""
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
