"""Random requests of random adapters through one engine: each answer is the one that its request
gets alone.

A mix: adapters of random methods on one base, identities of none, one or two of them; requests with
common beginnings, several choices, every kind of sampling, stops; few or many rows, blocks and
tokens a step. Answers of the base and of LoRAs of linear layers are the same to the bit, in float32
and bf16, where the model is computed by its parts; mixtures are not.
"""

import random

import pytest
import torch

from tests.soak.counts import rounds
from tests.soak.models.test_mixes import FAMILIES, MIXTURES, for_a_group, some_adapters
from tests.support.tiny import tiny_base
from veneer.adapters.config import Prefix
from veneer.decoding.engine import Engine, bytes_per_token, decode_step_of
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters, changes_rows_alone
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import FinishReason, Request
from veneer.kernels.dense import few_rows

CLOSE = 1e-4
"""Of logarithms of chances, in float32, whatever rows are beside."""


def a_sampling(draw: random.Random) -> Sampling:
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


def a_request(draw: random.Random, identities: list) -> Request:
    start = [(7 * n) % 250 for n in range(draw.choice([0, 5, 17, 33]))]
    most = draw.randint(1, 9)
    return Request(
        prompt=(*start, *(draw.randrange(250) for _ in range(draw.randint(1, 12)))),
        max_new_tokens=most,
        min_new_tokens=draw.randint(0, most) if draw.random() < 0.3 else 0,
        adapter=draw.choice(identities),
        stops=frozenset(draw.sample(range(250), k=draw.choice([0, 3, 60]))),
        choices=draw.choice([1, 1, 1, 3]),
        sampling=a_sampling(draw),
        seed=draw.randrange(2**32),
        priority=draw.choice([0, 0, 1]),
        salt=draw.choice(["", "", "other"]),
    )


def answered(base, applied, asked, limits, blocks):
    engine = Engine(
        base,
        budget_bytes=16 * blocks * bytes_per_token(base),
        adapters=FixedAdapters(applied),
        limits=limits,
    )
    made = [engine.add(request) for request in asked]
    ended = engine.run()
    assert len(ended) == len(set(ended)) == sum(map(len, made))
    assert engine.scheduler.blocks.held_bytes == 0
    engine.scheduler.blocks.check()
    return [answer for answers in made for answer in answers]


def what(answers):
    return [(a.new, a.reason, a.logprobs) for a in answers]


@pytest.mark.parametrize("number", rounds("engine", ci=4))
def test_every_answer_of_a_mix_is_the_one_that_its_request_gets_alone(number):
    draw = random.Random(number)
    family = draw.choice(FAMILIES)
    base = tiny_base(family, draw.choice([torch.float32, torch.bfloat16]))
    some_adapters(base.model, base.routing, draw)
    applied = {}
    for _ in range(3):
        some = for_a_group(base.routing, draw)
        if some and not (
            len(some) > 1 and any(isinstance(each.config, Prefix) for each, _ in some)
        ):
            applied[tuple((each.name, weight) for each, weight in some)] = some
    asked = [a_request(draw, [(), *applied]) for _ in range(draw.randint(3, 9))]
    rows = draw.randint(1, 7)
    limits = Limits(
        rows=rows,
        step_tokens=rows + draw.choice([0, 9, 500]),
        chunk_tokens=draw.choice([3, 16, 256]),
    )
    blocks = draw.choice([6, 9, 200])
    together = answered(base, applied, asked, limits, blocks)
    assert what(answered(base, applied, asked, limits, blocks)) == what(together)
    left = iter(together)
    by_parts = decode_step_of(base).not_by_parts is None and few_rows.takes_updates(
        1, base.dtype, base.device
    )
    exact = by_parts and family not in MIXTURES
    for request in asked:
        acting = applied.get(request.adapter, ())
        for one in answered(base, applied, [request], Limits(), 200):
            mixed = next(left)
            assert one.reason is not FinishReason.ERROR
            if exact and all(changes_rows_alone(adapter) for adapter, _ in acting):
                assert what([one]) == what([mixed])
                continue
            if base.dtype is torch.bfloat16:  # rounding may choose any of its words
                continue
            same = next(
                (
                    n
                    for n, pair in enumerate(zip(one.new, mixed.new, strict=False))
                    if len({*pair}) > 1
                ),
                None,
            )
            if same is not None:  # rounding may choose
                own, other = (dict(a.logprobs[same].alternatives) for a in (one, mixed))
                if request.sampling.greedy:  # of two tokens as likely
                    assert request.sampling.repetition_penalty == 1
                    assert abs(own[one.new[same]] - own[mixed.new[same]]) < CLOSE
                else:  # where a draw lies between two ids
                    assert abs(one.new[same] - mixed.new[same]) == 1
                    assert all(abs(own[token] - other[token]) < CLOSE for token in own)
            else:
                assert (one.new, one.reason) == (mixed.new, mixed.reason)
            for own, other in zip(one.logprobs[:same], mixed.logprobs[:same], strict=True):
                assert abs(own.logprob - other.logprob) < CLOSE
