"""Answers with activations: an adapter acts from there on, over the base's keys and values.

The reference is transformers with PEFT, greedy. Alone and among others are equal, and what was
computed before an activation serves the base and every adapter.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

import veneer
from tests.support.helpers import fill
from tests.support.tiny import save_tiny
from veneer.adapters.activation import activation_start
from veneer.adapters.config import LoRA
from veneer.decoding.engine import Engine
from veneer.decoding.generate import generate
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.block_names import BlockNames
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import Request
from veneer.formats.adapter import manifest_for, write_adapter

INVOCATIONS = ([7, 9, 11], [7, 9])
ADAPTERS, NEW, SIZE = 10, 8, 16
LONG = torch.randint(12, 250, (203,), generator=torch.Generator().manual_seed(1)).tolist()
"""A document that every prompt begins with; it holds no invocation."""
FOLDER = TemporaryDirectory()


def identity(number):
    return ((f"a{number}", 1.0),)


def prompt(number):
    return [*LONG, 7, 9, 11, 3, number]


@cache
def world(family="llama"):
    """A base with ten adapters, all attached."""
    folder = Path(FOLDER.name) / family
    save_tiny(folder, family)
    base = veneer.load(str(folder), dtype="float32")
    for number in range(ADAPTERS):
        activation = INVOCATIONS[number % 2]
        config = LoRA(rank=3, alpha=5.0, activation=activation)
        adapter = base.attach(config, name=f"a{number}", seed=number)
        fill(adapter.parameters().values(), seed=number, scale=0.1)
    return base


def request(number, *, adapter=True, **settings):
    ids = prompt(number)
    start = activation_start(ids, INVOCATIONS[number % 2])
    acts = {"adapter": identity(number), "activation": start} if adapter else {}
    return Request(prompt=tuple(ids), max_new_tokens=NEW, **acts, **settings)


class CountingEngine:
    """tokens: number of tokens that its steps computed."""

    def __init__(self, **limits):
        attached = world().attachments
        applied = {identity(n): ((attached[f"a{n}"], 1.0),) for n in range(ADAPTERS)}
        self.engine = Engine(
            world(),
            budget_bytes=2**23,
            adapters=FixedAdapters(applied),
            limits=Limits(**limits) if limits else None,
        )
        self.tokens, own = 0, self.engine.lanes.logits

        def counted(plan):
            self.tokens += sum(span.rows for span in plan.spans)
            return own(plan)

        self.engine.lanes.logits = counted

    def answers(self, requests):
        sequences = [sequence for request in requests for sequence in self.engine.add(request)]
        self.engine.run()
        self.engine.scheduler.blocks.check()
        return [(sequence.new, sequence.cached_tokens) for sequence in sequences]


@cache
def answer_alone(number):
    return CountingEngine().answers([request(number)])[0][0]


@pytest.mark.parametrize("number", [0, 1])
def test_greedy_answers_are_those_of_transformers_with_peft(number, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = world()
    adapter = base.attachments[f"a{number}"]
    write_adapter(tmp_path / "a", adapter, manifest_for(base, method="lora"), model=base.model)
    model = AutoModelForCausalLM.from_pretrained(base.source, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "a")
    for ids in (prompt(number), [*prompt(number), 7, 9, 11, 5], LONG):  # twice; not at all
        tensor = torch.tensor([ids])
        expected = theirs.generate(
            input_ids=tensor,
            attention_mask=torch.ones_like(tensor),
            max_new_tokens=NEW,
            do_sample=False,
        )[0, len(ids) :].tolist()
        with base.using(f"a{number}"):
            (answer,) = generate(base, [ids], max_new_tokens=NEW)
        assert answer == expected[: len(answer)] and len(answer) >= NEW - 1
    with base.using(f"a{number}"):
        answers = generate(base, [LONG], max_new_tokens=NEW)
    assert answers == generate(base, [LONG], max_new_tokens=NEW)  # the base alone


def test_ten_adapters_over_one_document_compute_it_once():
    counting = CountingEngine()
    answers = counting.answers([request(number) for number in range(ADAPTERS)])
    assert [new for new, _ in answers] == [answer_alone(number) for number in range(ADAPTERS)]
    shared = len(LONG) // SIZE * SIZE
    assert [cached for _, cached in answers] == [0, *[shared] * (ADAPTERS - 1)]
    alone_tokens = len(prompt(0)) + NEW - 1
    assert counting.tokens == ADAPTERS * alone_tokens - (ADAPTERS - 1) * shared


def test_the_bases_prompt_serves_an_adapter_and_the_other_way_round():
    counting = CountingEngine()
    ((base_answer, _),) = counting.answers([request(0, adapter=False)])
    ((answer, cached),) = counting.answers([request(0)])
    assert answer == answer_alone(0) != base_answer and cached == len(LONG) // SIZE * SIZE
    counting = CountingEngine()
    counting.answers([request(0)])
    assert counting.answers([request(0, adapter=False)]) == [(base_answer, cached)]
    blocks = counting.engine.scheduler.blocks
    assert blocks.forget("a0") == blocks.block_bytes  # the one with the activation


@pytest.mark.parametrize(
    "limits",
    [
        {"rows": 2, "step_tokens": 16, "chunk_tokens": 5},
        {"rows": 10, "step_tokens": 64, "chunk_tokens": 64},
    ],
    ids=str,
)
def test_chunks_choices_and_neighbours_change_no_answer(limits):
    requests = [
        request(number, adapter=bool(number % 3), choices=1 + number % 2) for number in range(6)
    ]
    expected = [CountingEngine().answers([own])[0][0] for own in requests]
    answers = [new for new, _ in CountingEngine(**limits).answers(requests)]
    assert answers == [
        answer for answer, own in zip(expected, requests, strict=True) for _ in range(own.choices)
    ]


def test_block_names_are_the_bases_before_the_activation_and_hold_its_place_after():
    ids = list(range(64))

    def names(adapter, activation):
        chain = BlockNames("base", adapter, "", SIZE, activation)
        chain.extend_to(64, lambda start, stop: ids[start:stop])
        return chain.names

    base, acts = names((), 0), names(identity(0), 20)
    assert acts[0] == base[0] and not {*acts[1:]} & {*base}
    assert names(identity(1), 20)[0] == base[0] and not {*names(identity(1), 20)[1:]} & {*acts}
    assert names(identity(0), 21)[1] != acts[1]
    assert names(identity(0), 32)[:2] == base[:2] and names(identity(0), 32)[2] != base[2]
    assert not {*names(identity(0), 0)} & {*base}
    assert names(identity(0), 1000) == base


def test_a_base_that_decodes_without_blocks_acts_from_there_on_too():
    base = world("bloom")
    with base.using("a0"):
        answers = generate(base, [prompt(0), LONG[:40]], max_new_tokens=4)
    for ids, answer in zip((prompt(0), LONG[:40]), answers, strict=True):
        text = list(ids)
        for token in answer:
            with base.using("a0"), torch.no_grad():
                logits = base.model(input_ids=torch.tensor([text]), use_cache=False).logits
            assert token == logits[0, -1].argmax().item()
            text.append(token)
