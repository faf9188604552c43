"""Answers whose tokens are guessed from their own texts are those of single steps, to the bit."""

import random

import pytest
import torch

from tests.adapters.test_methods import move
from tests.support.decoding.copying import copying_base
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, LoRA, Prefix
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.generate import generate
from veneer.decoding.sampling.grammar import Grammars
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule import lookup
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.block_names import BlockNames
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.lookup import AnswerHistory, AnswerLookup, Lookup, TokenIndex
from veneer.decoding.schedule.sequence import FinishReason, Request, Sequence
from veneer.errors import ConfigError
from veneer.kernels.bindings import library as native

pytestmark = pytest.mark.skipif(
    native.level() < 2, reason="a processor whose registers were not measured"
)

METHODS = {
    "a": LoRA(rank=3, alpha=5.0),
    "b": LoRA(rank=2, alpha=1.0, targets=["q_proj", "lm_head"]),
    "dora": DoRA(rank=2, alpha=5.0, targets=["q_proj", "o_proj"]),
    "prefix": Prefix(tokens=4, start="random"),
}
EXACT = [(), (("a", 1.0),), (("b", 1.0),), (("a", 0.5), ("b", -1.0))]
SAMPLINGS = {
    "greedy": Sampling(),
    "logprobs": Sampling(logprobs=3),
    "drawn": Sampling(temperature=0.4),
    "drawn from a few": Sampling(temperature=1.0, top_p=0.2, top_k=5, min_p=0.01, logprobs=0),
    "penalties": Sampling(frequency_penalty=0.02, presence_penalty=0.1, repetition_penalty=1.01),
    "biases": Sampling(temperature=0.3, logit_bias=((7, 3.0), (27, -1.0))),
}


def base_with_adapters(dtype=torch.float32):
    base = copying_base(dtype=dtype)
    head = base.model.get_output_embeddings()
    _ = base.paths
    for number, (name, config) in enumerate(METHODS.items()):
        adapter = attach(
            base.model, config, name=name, routing=base.routing, head=head, seed=number
        )
        move(adapter, seed=number, scale=0.02)
    identities = [*EXACT, *([(("dora", 1.0),), (("prefix", 1.0),)])]
    return base, {identity: base.routing.applied(identity) for identity in identities if identity}


class StepCounter:
    """An engine, and the spans of each of its steps."""

    def __init__(self, base, applied, mode, **settings):
        self.engine = Engine(
            base,
            budget_bytes=settings.pop("budget_bytes", 2**22),
            adapters=FixedAdapters(applied),
            lookup=mode,
            **settings,
        )
        self.steps, compute = [], self.engine.lanes.logits
        self.engine.lanes.logits = lambda plan: self.steps.append(plan.spans) or compute(plan)

    def answers(self, requests):
        answers = [answer for request in requests for answer in self.engine.add(request)]
        self.engine.run()
        self.engine.scheduler.blocks.check()
        blocks = self.engine.scheduler.blocks
        assert blocks.available == blocks.num_blocks
        return [(a.new, a.logprobs, a.reason, str(a.error)) for a in answers]

    @property
    def guesses(self):
        return sum(len(span.guesses) for spans in self.steps for span in spans)


@pytest.fixture
def eager(monkeypatch):
    """Answers guess whenever they can, however often they were wrong."""
    monkeypatch.setattr(lookup, "FIRST_CREDIT", 1e9)
    monkeypatch.setattr(lookup, "MOST_CREDIT", 1e9)


def repetitive(seed, length=40):
    draw = random.Random(seed)
    words = [draw.randrange(3, 250) for _ in range(8)]
    return tuple(
        words[draw.randrange(8)] if draw.random() < 0.3 else words[n % 8] for n in range(length)
    )


def compared(base, applied, requests, **settings):
    """The answers with and without lookup, which must be equal. Returns both counters."""
    off = StepCounter(base, applied, "off", **settings)
    auto = StepCounter(base, applied, "auto", **settings)
    assert auto.answers(requests) == off.answers(requests)
    assert not off.guesses
    return off, auto


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_answers_are_the_same_with_and_without_guesses(dtype, sampling, eager):
    base, applied = base_with_adapters(dtype)
    requests = [
        Request(
            prompt=repetitive(n),
            max_new_tokens=50 + n,
            adapter=EXACT[n % len(EXACT)],
            sampling=sampling,
            seed=n,
            choices=1 + (n == 2),
        )
        for n in range(5)
    ]
    guesses = 0
    for answered in (requests, requests[1:2]):
        _, auto = compared(base, applied, answered)
        guesses += auto.guesses
    assert guesses > 5


def test_an_answer_that_repeats_itself_takes_fewer_steps():
    base = copying_base(keep=0.0)
    off, auto = compared(base, {}, [Request(prompt=repetitive(0), max_new_tokens=160)])
    assert len(auto.steps) < 0.5 * len(off.steps)


def test_generate_calls_back_with_each_token_of_a_step_in_order():
    base = copying_base(keep=0.0)
    prompt, told = list(repetitive(0)), {"off": [], "auto": []}
    answers = {
        mode: generate(base, [prompt], max_new_tokens=90, lookup=mode, on_token=tokens.append)
        for mode, tokens in told.items()
    }
    assert answers["off"] == answers["auto"] == [told["off"]] == [told["auto"]]
    with pytest.raises(ConfigError, match="lookup is 'fast'"):
        generate(base, [prompt], max_new_tokens=1, lookup="fast")


def test_adapters_whose_rows_depend_on_others_are_answered_beside_guesses(eager):
    base, applied = base_with_adapters()
    requests = [
        Request(prompt=repetitive(n), max_new_tokens=40, adapter=identity)
        for n, identity in enumerate([(), *applied])
    ]
    _, auto = compared(base, applied, requests)
    guessed = {
        span.sequence.request.adapter for spans in auto.steps for span in spans if span.guesses
    }
    assert len(guessed) > 2 and guessed <= set(EXACT)


def test_stop_tokens_checks_and_grammars_end_answers_as_without_guesses(eager):
    base, applied = base_with_adapters()
    greedy = StepCounter(base, applied, "off").answers(
        [Request(prompt=repetitive(0), max_new_tokens=60)]
    )[0][0]

    def ends_at(place):
        def check():
            seen = []

            def ends(token):
                seen.append(token)
                return len(seen) == place

            return ends

        return check

    grammars = Grammars(base.tokenizer, rows=len(base.tokenizer), stops=[258])
    shape = grammars.schema({"type": "array", "items": {"enum": ["ab", "ab", "abab"]}})
    common = {"prompt": repetitive(0), "max_new_tokens": 60}
    requests = [
        *(Request(**common, checks=ends_at(place)) for place in (1, 33, 47, 58)),
        *(Request(**common, stops=frozenset([greedy[place]])) for place in (5, 40)),
        Request(**common, stops=frozenset(greedy[20:]), min_new_tokens=41),
        Request(**common, constraints=shape, sampling=Sampling(temperature=1.0), stops={258}),
        *(Request(prompt=repetitive(0), max_new_tokens=most) for most in range(20, 44, 3)),
    ]
    for request in requests:
        off, auto = compared(base, applied, [request])
        assert len(auto.steps) <= len(off.steps)
    compared(base, applied, requests)


def test_few_blocks_and_small_steps_change_no_answer(eager):
    base, applied = base_with_adapters()
    requests = [
        Request(prompt=repetitive(n, 20 + n), max_new_tokens=40, adapter=EXACT[n % 4])
        for n in range(9)
    ]
    for places, limits in ((16 * 9, Limits(rows=3, step_tokens=5)), (16 * 5, Limits(rows=4))):
        budget = places * bytes_per_token(base)
        _, auto = compared(base, applied, requests, budget_bytes=budget, limits=limits)
        assert auto.guesses


def test_the_cache_never_holds_tokens_that_were_guessed_and_not_drawn(eager):
    base, applied = base_with_adapters()
    request = Request(prompt=repetitive(3), max_new_tokens=70, sampling=Sampling(temperature=0.5))
    off, auto = (StepCounter(base, applied, mode) for mode in ("off", "auto"))
    (first,) = off.answers([request])
    assert auto.answers([request]) == [first]
    longer = [
        Request(prompt=(*request.prompt, *first[0][:count], 5), max_new_tokens=20, seed=count)
        for count in (15, 31, 32, 60, 69)
    ]
    for again in longer:
        told = [counter.engine.add(again)[0] for counter in (off, auto)]
        off.engine.run(), auto.engine.run()
        assert told[0].new == told[1].new
        assert told[0].cached_tokens == told[1].cached_tokens >= 32
    blocks = [counter.engine.scheduler.blocks for counter in (off, auto)]
    assert blocks[0]._blocks_by_name.keys() == blocks[1]._blocks_by_name.keys()


def test_a_cancelled_answer_keeps_the_tokens_that_it_has(eager):
    base, applied = base_with_adapters()
    counter = StepCounter(base, applied, "auto")
    gone, stays = (
        counter.engine.add(Request(prompt=repetitive(0), max_new_tokens=60, seed=n))[0]
        for n in range(2)
    )
    while not counter.guesses:
        counter.engine.step(0.0)
    compute, length = counter.engine.lanes.logits, len(gone.new)

    def cancel_meanwhile(plan):
        counter.engine.cancel(gone)
        return compute(plan)

    counter.engine.lanes.logits = cancel_meanwhile
    counter.engine.run()
    assert (gone.reason, len(gone.new)) == (FinishReason.CANCELLED, length)
    assert stays.reason is FinishReason.LENGTH and stays.new[:length] == gone.new
    counter.engine.scheduler.blocks.check()


def test_a_step_that_fails_with_guesses_is_computed_without_them(eager, monkeypatch):
    base, applied = base_with_adapters()
    request = Request(prompt=repetitive(0), max_new_tokens=60)
    expected = StepCounter(base, applied, "off").answers([request])
    for fault in (RuntimeError("a bug"), MemoryError("no memory")):
        counter = StepCounter(base, applied, "auto")
        compute = counter.engine.lanes.logits

        def fail(plan, compute=compute, fault=fault):
            if any(span.guesses for span in plan.spans):
                raise fault
            return compute(plan)

        counter.engine.lanes.logits = fail
        answers = counter.answers([request])
        if isinstance(fault, MemoryError):
            assert answers == expected
        else:
            assert answers[0][2] is FinishReason.ERROR  # a single span that failed


def test_the_index_finds_the_longest_newest_match():
    draw = random.Random(0)
    for _ in range(300):
        text = [draw.randrange(3) for _ in range(draw.randrange(1, 40))]
        length, place = TokenIndex(text).find(text[-8:])
        places = [p for p in range(2, len(text)) if text[p - 2 : p] == text[-2:]]
        newest = sorted(places)[-lookup.CANDIDATES :]
        best = max(newest, key=lambda p: (match(text, p), p), default=-1)
        assert (length, place) == ((match(text, best), best) if newest else (0, -1))


def match(text, place):
    length = 0
    while length < min(8, place) and text[place - 1 - length] == text[-1 - length]:
        length += 1
    return length


def test_a_repeating_end_goes_on_and_a_guess_ends_before_a_stop_token_or_another_answer():
    request = Request(prompt=(1, 2, 3, 1, 2, 3, 1), max_new_tokens=9, stops=frozenset([9]))
    own = AnswerLookup(request, AnswerHistory())
    own.count(4, 4, 0.0)
    assert own.guess([2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert own.guess([2, 9, 1], 7) == []
    history = AnswerHistory()
    history.add([5, 6, 7, 8])
    history.add([5, 6, 9, 8])
    assert AnswerLookup(request, history).guess([6, 7], 7) == [8]
    assert AnswerLookup(request, history).guess([5, 6], 7) == []


def test_answers_of_the_same_adapters_and_salt_share_a_bounded_history(monkeypatch):
    monkeypatch.setattr(lookup, "MOST_REMEMBERED", 50)
    history = AnswerHistory()
    for start in range(0, 1000, 10):
        history.add(range(start, start + 10))
    assert sum(len(index.tokens) for index in history.indexes) <= 2 * 61
    base, applied = base_with_adapters()
    counter = StepCounter(base, applied, "auto")
    common = {"max_new_tokens": 24, "sampling": Sampling(temperature=2.0), "seed": 5}
    counter.answers([Request(prompt=(5, 9, 31, 7), salt="first", **common)])  # records the steps
    steps = []
    for salt in ("", "tenant", ""):
        before = len(counter.steps)
        counter.answers([Request(prompt=(5, 9, 30), salt=salt, **common)])
        steps.append(len(counter.steps) - before)
    assert steps[1] == steps[0] > 2 * steps[2]


@pytest.mark.parametrize("matches", ["none", "wrong"])
def test_answers_that_repeat_nothing_guess_seldom(matches):
    """An answer pays for wrong guesses at most a fiftieth of its steps, and one step more."""
    request = Request(prompt=(5, 9) * 10, max_new_tokens=400)
    own, paid, new = AnswerLookup(request, AnswerHistory()), 0.0, []
    for n in range(400):
        new.append(100 + n if matches == "none" else 9 if n % 2 else 5)
        if guesses := own.guess(new, 8):
            cost = lookup.STEP_COST + lookup.ROW_COST * len(guesses)
            own.count(len(guesses), 0, cost)
            paid += cost
    assert paid == 0 if matches == "none" else 0 < paid <= 0.02 * 400 + 1


@pytest.mark.parametrize("credit", [0.0, 0.3, 0.8])
def test_answers_beside_each_other_guess_with_the_credit_of_a_step_for_each(credit, monkeypatch):
    """One answer guesses with any credit; each of three, with more than 3 times STEP_COST."""
    monkeypatch.setattr(lookup, "FIRST_CREDIT", credit)
    request = Request(prompt=(5, 9) * 10, max_new_tokens=40)
    names = BlockNames("base", (), "", 16)
    answers = [Sequence(number, request, 0, names) for number in range(3)]
    for count, threshold in ((1, 0.0), (3, 0.75)):
        guesses = Lookup(lambda adapters: True).guesses(answers[:count], most_rows=64)
        assert list(guesses) == (answers[:count] if credit > threshold else [])


def test_answers_that_guess_share_the_cost_of_a_step_and_each_pays_for_its_rows(monkeypatch):
    monkeypatch.setattr(lookup, "FIRST_CREDIT", lookup.MOST_CREDIT)
    names, prompts = BlockNames("base", (), "", 16), [(5, 9) * 10, (7, 8) * 10, (1, 2, 3)]
    answers = [
        Sequence(number, Request(prompt=prompt, max_new_tokens=40), 0, names)
        for number, prompt in enumerate(prompts)
    ]
    guessing = Lookup(lambda adapters: True)
    guesses = guessing.guesses(answers, most_rows=64)
    assert list(guesses) == answers[:2]
    for answer, tokens in guesses.items():
        guessing.count(answer, len(tokens), 0)
        cost = 3 * (lookup.STEP_COST / 2 + lookup.ROW_COST * len(tokens))
        assert guessing._lookups[answer]._credit == pytest.approx(lookup.MOST_CREDIT - cost)
