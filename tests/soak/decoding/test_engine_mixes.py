"""Random requests with random adapters through one engine: each answer equals the one that its
request gets alone.

A mix: requests to a base or to one or two of its adapters, whose methods are random; requests with
common beginnings, several choices, every kind of sampling, stops; few or many rows, blocks and
tokens a step. Answers of the base and of LoRAs of linear layers are the same to the bit, in float32
and bf16, where the model is computed by its parts; mixtures are not.

A round's number is the seed of its mix and selects its base. The 250 rounds of a slice share ten
bases and run base by base, so a base is made and proven once for 25 rounds. They draw from 30
requests, each of which is computed alone once.
"""

import random
from collections.abc import Sequence
from functools import lru_cache

import pytest
import torch

from tests.soak.counts import rounds
from tests.soak.models.test_mixes import FAMILIES, MIXTURES, for_a_group, some_adapters
from tests.support.tiny import tiny_base
from veneer.adapters.config import Prefix
from veneer.adapters.placement.acting import Applied
from veneer.decoding.engine import Engine, bytes_per_token, decode_step_of
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters, changes_rows_alone
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import FinishReason, Request
from veneer.decoding.schedule.sequence import Sequence as Answer
from veneer.kernels.dense import few_rows
from veneer.models.frozen_base import FrozenBase

SLICE, BASES_PER_SLICE, REQUESTS_PER_BASE = 250, 10, 30
LOGPROB_TOLERANCE = 1e-4
"""Largest difference between log-probabilities in float32 that other rows of a step may cause."""
ALONE_BLOCKS = 40
"""Blocks of the engine that computes a single request: enough for three choices."""


class Workload:
    """A base with attached adapters, and requests to it."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(f"base {seed}")
        family = draw.choice(FAMILIES)
        self.base = tiny_base(family, draw.choice([torch.float32, torch.bfloat16]))
        some_adapters(self.base.model, self.base.routing, draw)
        self.identities = random_identities(self.base, draw)
        self.requests = [
            random_request(draw, [(), *self.identities]) for _ in range(REQUESTS_PER_BASE)
        ]
        self._exact = (
            family not in MIXTURES
            and decode_step_of(self.base).not_by_parts is None
            and few_rows.takes_updates(1, self.base.dtype, self.base.device)
        )
        self._alone: dict[Request, list[Answer]] = {}

    def is_exact(self, request: Request) -> bool:
        """Whether the bits of the request's answers do not depend on other rows."""
        applied = self.identities.get(request.adapter, ())
        return self._exact and all(changes_rows_alone(adapter) for adapter, _ in applied)

    def generate(self, requests: Sequence[Request], limits: Limits, blocks: int) -> list[Answer]:
        """Computes requests by a new engine; returns the answers in the order of the requests."""
        engine = Engine(
            self.base,
            budget_bytes=16 * blocks * bytes_per_token(self.base),
            adapters=FixedAdapters(self.identities),
            limits=limits,
        )
        answers = [answer for request in requests for answer in engine.add(request)]
        ended = engine.run()
        assert len(ended) == len(set(ended)) == len(answers)
        assert engine.scheduler.blocks.held_bytes == 0
        engine.scheduler.blocks.check()
        return answers

    def alone(self, request: Request) -> list[Answer]:
        """Returns the answers of a request that has an engine of its own."""
        if request not in self._alone:
            self._alone[request] = self.generate([request], Limits(), ALONE_BLOCKS)
        return self._alone[request]


workload = lru_cache(maxsize=1)(Workload)


def random_identities(base: FrozenBase, draw: random.Random) -> dict[Identity, Applied]:
    """Draws up to three sets of adapters; a prefix acts alone."""
    identities = {}
    for _ in range(3):
        applied = for_a_group(base.routing, draw)
        has_prefix = any(isinstance(adapter.config, Prefix) for adapter, _ in applied)
        if applied and not (has_prefix and len(applied) > 1):
            identities[tuple((adapter.name, weight) for adapter, weight in applied)] = applied
    return identities


def random_sampling(draw: random.Random) -> Sampling:
    if draw.random() < 0.3:
        return Sampling(logprobs=5, repetition_penalty=draw.choice([1.0, 1.0, 1.5]))
    return Sampling(
        logprobs=5,
        temperature=draw.choice([0.3, 1.0, 2.0]),
        top_k=draw.choice([0, 0, 1, 7]),
        top_p=draw.choice([1.0, 1.0, 0.8]),
        min_p=draw.choice([0.0, 0.0, 0.1]),
        presence_penalty=draw.choice([0.0, 0.5]),
        frequency_penalty=draw.choice([0.0, 0.7]),
        logit_bias=draw.choice([(), ((9, 2.0), (30, -3.0))]),
    )


def random_request(draw: random.Random, identities: Sequence[Identity]) -> Request:
    start = [(7 * n) % 250 for n in range(draw.choice([0, 5, 17, 33]))]
    max_new_tokens = draw.randint(1, 9)
    return Request(
        prompt=(*start, *(draw.randrange(250) for _ in range(draw.randint(1, 12)))),
        max_new_tokens=max_new_tokens,
        min_new_tokens=draw.randint(0, max_new_tokens) if draw.random() < 0.3 else 0,
        adapter=draw.choice(identities),
        stops=frozenset(draw.sample(range(250), k=draw.choice([0, 3, 60]))),
        choices=draw.choice([1, 1, 1, 3]),
        sampling=random_sampling(draw),
        seed=draw.randrange(2**32),
        priority=draw.choice([0, 0, 1]),
        salt=draw.choice(["", "", "other"]),
    )


def bits_of(answers: Sequence[Answer]) -> list[object]:
    return [(answer.new, answer.reason, answer.logprobs) for answer in answers]


def check_close(alone: Answer, mixed: Answer) -> None:
    """Compares two float32 answers up to the first token at which rounding decides between two."""
    pairs = zip(alone.new, mixed.new, strict=False)
    parted = next((n for n, (own, other) in enumerate(pairs) if own != other), None)
    if parted is None:
        assert (alone.new, alone.reason) == (mixed.new, mixed.reason)
    else:
        own, other = (dict(answer.logprobs[parted].alternatives) for answer in (alone, mixed))
        if alone.request.sampling.greedy:  # two tokens are equally likely
            assert alone.request.sampling.repetition_penalty == 1
            assert abs(own[alone.new[parted]] - own[mixed.new[parted]]) < LOGPROB_TOLERANCE
        else:  # the draw lies at the border between two ids
            assert abs(alone.new[parted] - mixed.new[parted]) == 1
            assert all(abs(own[token] - other[token]) < LOGPROB_TOLERANCE for token in own)
    for token, mixed_token in zip(alone.logprobs[:parted], mixed.logprobs[:parted], strict=True):
        assert abs(token.logprob - mixed_token.logprob) < LOGPROB_TOLERANCE


def base_of(number: int) -> int:
    """Returns the seed of a round's base."""
    return number // SLICE * BASES_PER_SLICE + number % BASES_PER_SLICE


@pytest.mark.parametrize("number", sorted(rounds("engine", ci=4), key=base_of))
def test_every_answer_of_a_mix_is_the_one_that_its_request_gets_alone(number: int) -> None:
    work, draw = workload(base_of(number)), random.Random(number)
    requests = draw.sample(work.requests, k=draw.randint(3, 9))
    rows = draw.randint(1, 7)
    limits = Limits(
        rows=rows,
        step_tokens=rows + draw.choice([0, 9, 500]),
        chunk_tokens=draw.choice([3, 16, 256]),
    )
    blocks = draw.choice([6, 9, 200])
    together = work.generate(requests, limits, blocks)
    if not all(map(work.is_exact, requests)):  # the others are compared to the bit below
        assert bits_of(work.generate(requests, limits, blocks)) == bits_of(together)
    mixed_answers = iter(together)
    for request in requests:
        for alone in work.alone(request):
            mixed = next(mixed_answers)
            assert alone.reason is not FinishReason.ERROR
            if work.is_exact(request):
                assert bits_of([alone]) == bits_of([mixed])
            elif work.base.dtype is torch.float32:  # in bf16 rounding may choose any token
                check_close(alone, mixed)
