"""Layers that pass a state from token to token (execution/states.py): the engine's answers are
those of whole texts, whatever is beside them and whatever fails."""

from functools import cache

import pytest
import torch

from tests.adapters.test_methods import move
from tests.families.models import DENSE_HYBRID, SCALED_HYBRID, family_base
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, LoRA
from veneer.adapters.placement.acting import Acting
from veneer.decoding.engine import Engine, bytes_per_token, states_of
from veneer.decoding.generate import generate
from veneer.decoding.proof import decodes_packed
from veneer.decoding.rereading import answer_by_rereading
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import FinishReason, Request, SequenceState
from veneer.errors import DoesNotFitError
from veneer.execution.states import StateLayers, StateSlots, has_states

HYBRIDS = (
    "lfm2",
    "granitemoehybrid",
    "falcon_h1",
    "bamba",
    "qwen3_next",
    "qwen3_5_text",
    DENSE_HYBRID,
    SCALED_HYBRID,
)
NEW = 9
IDENTITIES = ((), (("lora", 1.0),), (("dora", 1.0),))


@pytest.fixture(autouse=True, scope="module")
def _kept_for_these_tests_alone():
    yield
    with_adapters.cache_clear()


@cache
def with_adapters(family):
    base = family_base(family)
    assert decodes_packed(base) and has_states(base.model)
    names = {path.rpartition(".")[2] for path, _ in base.model.named_modules()}
    output = "out_proj" if "out_proj" in names else "o_proj"
    methods = {
        "lora": LoRA(targets="all-linear", rank=3, alpha=5.0),
        "dora": DoRA(targets=[output], rank=2, alpha=5.0),
    }
    applied = {}
    for number, (name, config) in enumerate(methods.items()):
        head, identity = base.model.get_output_embeddings(), ((name, 1.0),)
        attached = attach(
            base.model, config, name=name, routing=base.routing, head=head, seed=number
        )
        move(attached, seed=number)
        applied[identity] = base.routing.applied(identity)
    return base, applied


def engine_of(base, applied, *, tokens=16 * 200, limits=None):
    limits, states = limits or Limits(rows=8), states_of(base)
    budget = tokens * bytes_per_token(base) + 2 * states.bytes_of(limits.rows)
    engine = Engine(base, budget_bytes=budget, adapters=FixedAdapters(applied), limits=limits)
    # What the budget's other half would have left for blocks.
    assert engine.scheduler.limits.rows == limits.rows
    return engine


def alone(base, applied, prompt, identity=(), new=NEW):
    request = Request(prompt=tuple(prompt), max_new_tokens=new, adapter=identity)
    with base.routing.held(Acting.everywhere(applied.get(identity, ()))):
        return answer_by_rereading(base.model, base.routing, request)


@torch.no_grad()
def most_likely(base, applied, prompt, answer, identity=()):
    """Returns the most likely token before each token of an answer, by one forward of the whole
    text: they are the answer if and only if it is what `alone` gives."""
    text = torch.tensor([[*prompt, *answer]])
    with base.routing.held(Acting.everywhere(applied.get(identity, ()))):
        logits = base.model(input_ids=text, use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def prompts(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for number in range(count):
        ids = torch.randint(4, 110, (1 + 5 * number % 23,), generator=draw)
        yield ids.tolist(), IDENTITIES[number % len(IDENTITIES)]


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("narrow", [False, True], ids=["room for all", "chunks and few rows"])
def test_answers_that_join_and_leave_are_those_of_whole_texts(family, narrow):
    base, applied = with_adapters(family)
    limits = Limits(rows=3, step_tokens=12, chunk_tokens=7) if narrow else None
    engine = engine_of(base, applied, limits=limits)
    asked, ended = {}, []
    for number, (prompt, identity) in enumerate(prompts(7)):
        new = NEW - number % 3
        request = Request(prompt=tuple(prompt), max_new_tokens=new, adapter=identity)
        (answer,) = engine.add(request)
        asked[answer] = prompt, identity, new
        ended += engine.step(0.0)
    ended += engine.run()
    assert set(ended) == set(asked)
    for answer, (prompt, identity, new) in asked.items():
        assert answer.reason is FinishReason.LENGTH
        assert len(answer.answer) == new
        assert answer.answer == most_likely(base, applied, prompt, answer.answer, identity)
    engine.scheduler.blocks.check()


@pytest.mark.parametrize("family", HYBRIDS)
def test_logits_in_the_mix_are_those_alone(family):
    base, applied = with_adapters(family)
    report = Sampling(logprobs=3)

    def chances(texts):
        engine = engine_of(base, applied)
        answers = [
            engine.add(
                Request(prompt=tuple(ids), max_new_tokens=5, adapter=identity, sampling=report)
            )[0]
            for ids, identity in texts
        ]
        engine.run()
        return [[chance.logprob for chance in answer.logprobs] for answer in answers]

    texts = list(prompts(6))
    for together, text in zip(chances(texts), texts, strict=True):
        (single,) = chances([text])
        assert together == pytest.approx(single, abs=1e-4)


@pytest.mark.parametrize("family", [*HYBRIDS, "olmo_hybrid", "lara_mini"])
def test_single_tokens_are_replayed_whichever_engine_has_the_states(family):
    base, applied = with_adapters(family)
    for seed in range(2):  # the second engine finds the recording of the first
        engine = engine_of(base, applied)
        asked = {
            engine.add(Request(prompt=tuple(ids), max_new_tokens=NEW, adapter=identity))[0]: (
                ids,
                identity,
            )
            for ids, identity in prompts(5, seed)
            if identity != IDENTITIES[2]  # its rows are computed beside
        }
        engine.run()
        assert engine.decode_step.is_recorded
        for answer, (prompt, identity) in asked.items():
            assert len(answer.answer) == NEW
            assert answer.answer == most_likely(base, applied, prompt, answer.answer, identity)


@pytest.mark.parametrize("place", ["table", "first layer", "norm"])
@pytest.mark.parametrize("family", ["lfm2", DENSE_HYBRID, "qwen3_next"])
def test_an_answer_after_a_recording_calls_a_hook_that_is_new(family, place):
    base, applied = with_adapters.__wrapped__(family)

    def answer():
        engine = engine_of(base, applied)
        (own,) = engine.add(Request(prompt=(9, 40, 7), max_new_tokens=NEW))
        engine.run()
        return own.answer

    def change(module, args, out):
        return 1.7 * out + 0.3

    before = alone(base, applied, (9, 40, 7))
    assert [answer(), answer()] == [before] * 2
    layer = base.model.get_decoder().layers[0]
    norms = [part for name, part in layer.named_children() if "norm" in name]
    hooked = {"table": base.model.get_input_embeddings(), "first layer": layer, "norm": norms[0]}
    hooked[place].register_forward_hook(change)
    expected = alone(base, applied, (9, 40, 7))
    assert expected != before
    assert answer() == expected


def test_a_prompt_seen_before_is_read_again():
    base, applied = with_adapters("lfm2")
    engine = engine_of(base, applied)
    prompt = [(7 * n) % 100 for n in range(40)]
    expected = alone(base, applied, prompt)
    for _ in range(2):
        answers = [
            engine.add(Request(prompt=tuple(prompt), max_new_tokens=NEW))[0] for _ in range(2)
        ]
        engine.run()
        assert [answer.answer for answer in answers] == [expected] * 2
        assert [answer.cached_tokens for answer in answers] == [0, 0]


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("rows", [8, 2], ids=["a row for each", "some wait"])
def test_choices_continue_from_the_state_of_their_prompt(family, rows):
    base, applied = with_adapters(family)
    engine = engine_of(base, applied, limits=Limits(rows=rows))
    prompt, sampling = [(5 * n) % 100 for n in range(21)], Sampling(temperature=1.0, logprobs=1)
    many = engine.add(
        Request(prompt=tuple(prompt), max_new_tokens=NEW, choices=4, sampling=sampling, seed=3)
    )
    engine.run()
    assert len({tuple(choice.new) for choice in many}) > 1
    for choice in many:
        whole = (*prompt, *choice.new)
        (read,) = engine.add(
            Request(prompt=whole, max_new_tokens=1, prompt_logprobs=True, sampling=sampling)
        )
        engine.run()
        expected = [chance.logprob for chance in read.prompt_logprobs[-NEW:]]
        assert [chance.logprob for chance in choice.logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", HYBRIDS)
def test_preempted_answers_read_their_text_again(family):
    base, applied = with_adapters(family)
    engine = engine_of(base, applied, limits=Limits(rows=4, step_tokens=8))
    del engine.scheduler.blocks._free[:-5]
    texts = [([*ids, *range(4, 16)], identity) for ids, identity in prompts(4, seed=1)]
    answers = [
        engine.add(Request(prompt=tuple(ids), max_new_tokens=25, adapter=identity))[0]
        for ids, identity in texts
    ]
    preempted, ended = set(), []
    while not engine.scheduler.idle:
        ended += engine.step(0.0)
        waiting = engine.scheduler.waiting
        preempted |= {s.number for s in waiting if s.state is SequenceState.PREEMPTED}
    assert preempted and len(ended) == len(answers)
    for answer, (ids, identity) in zip(answers, texts, strict=True):
        assert len(answer.answer) == 25
        assert answer.answer == most_likely(base, applied, ids, answer.answer, identity)


def test_a_cancelled_answer_leaves_the_others_as_they_are():
    base, applied = with_adapters("falcon_h1")
    engine = engine_of(base, applied, limits=Limits(rows=3))
    texts = list(prompts(5, seed=2))
    answers = [
        engine.add(Request(prompt=tuple(ids), max_new_tokens=NEW, adapter=identity))[0]
        for ids, identity in texts
    ]
    for _ in range(3):
        engine.step(0.0)
    engine.cancel(answers[1])
    engine.run()
    assert answers[1].reason is FinishReason.CANCELLED
    for answer, (ids, identity) in zip(answers, texts, strict=True):
        assert len(answer.answer) == NEW or answer is answers[1]
        assert answer.answer == most_likely(base, applied, ids, answer.answer, identity)


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("fault", [RuntimeError("at once"), KeyboardInterrupt()], ids=type)
def test_a_step_that_fails_leaves_the_states_as_they_were(family, fault):
    """It fails behind all layers, when they have passed their states on."""
    base, applied = with_adapters(family)
    engine = engine_of(base, applied)
    calls = []

    def fail(module, inputs):
        calls.append(inputs[0].shape[:-1].numel())
        if calls[-1] > 1 and len(calls) % 3 == 0:
            raise fault

    texts = list(prompts(4, seed=3))
    head = base.model.get_output_embeddings().register_forward_pre_hook(fail)
    answers = [
        engine.add(Request(prompt=tuple(ids), max_new_tokens=NEW, adapter=identity))[0]
        for ids, identity in texts
    ]
    failed = 0
    while not engine.scheduler.idle:
        try:
            engine.step(0.0)
        except KeyboardInterrupt:
            failed += 1
    head.remove()
    assert failed > 1 or isinstance(fault, RuntimeError)
    for answer, (ids, identity) in zip(answers, texts, strict=True):
        assert answer.error is None and len(answer.answer) == NEW
        assert answer.answer == most_likely(base, applied, ids, answer.answer, identity)


@pytest.mark.parametrize("family", HYBRIDS)
def test_generate_answers_through_the_engine_as_whole_texts_do(family):
    base, applied = with_adapters(family)
    texts = [ids for ids, _ in prompts(5, seed=4)]
    for identity in IDENTITIES[:2]:
        base.routing.active = identity
        for ids, answer in zip(texts, generate(base, texts, max_new_tokens=NEW), strict=True):
            assert len(answer) == NEW
            assert answer == most_likely(base, applied, ids, answer, identity)
    base.routing.active = ()


def test_few_rows_run_where_states_take_much_and_none_is_an_error():
    base, applied = with_adapters("lfm2")
    states = states_of(base)
    budget = 2 * states.bytes_of(3)
    engine = Engine(base, budget_bytes=budget, adapters=FixedAdapters(applied))
    assert engine.scheduler.limits.rows == 3
    blocks = engine.scheduler.blocks
    assert blocks.budget_bytes == budget - states.bytes_of(3)
    with pytest.raises(DoesNotFitError, match="states of one answer"):
        Engine(base, budget_bytes=states.bytes_of(1), adapters=FixedAdapters(applied))


def test_slots_are_shared_until_each_text_writes_its_own():
    name = (0, "conv_states", 0)
    slots = StateSlots(StateLayers({name: torch.zeros(1, 2)}), 3)

    def step(texts, value, copies=None, undo=False):
        states = slots.begin(texts)
        read = states.cache.layers[0].conv_states[0]
        found = read[:, 0].tolist()
        read += value
        states.store()
        slots.undo() if undo else slots.finish(copies or {})
        return found

    assert step([(0, 0)], 1.0, {0: [1, 2]}) == [0.0]
    assert step([(1, 4)], 10.0) == [1.0]
    assert step([(0, 4), (1, 5), (2, 4)], 100.0, undo=True) == [1.0, 11.0, 1.0]
    assert step([(0, 4), (1, 5), (2, 4)], 100.0) == [1.0, 11.0, 1.0]
    slots.keep({1})
    assert step([(1, 6), (3, 0)], 0.0) == [111.0, 0.0]
