"""Requests of several adapters in the same forwards are answered as each is alone, whatever is
beside them."""

import gc
import weakref

import pytest
import torch
from transformers import GenerationConfig

from tests.adapters.test_methods import move
from tests.models.test_proof import based, rotary
from tests.support.tiny import tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.placement.acting import Acting
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.forward import PagedForward
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import FinishReason, Request
from veneer.errors import AdapterMismatchError, ConfigError, DivergedError, DoesNotFitError
from veneer.kernels.attention.paged import KeyValueBlocks

METHODS = {
    "lora": LoRA(rank=3, alpha=5.0, targets=["q_proj", "o_proj", "v_proj"]),
    "head": LoRA(rank=5, alpha=2.0, rslora=True, targets=["lm_head", "embed_tokens", "k_proj"]),
    "dora": DoRA(rank=2, alpha=5.0, targets=["q_proj", "o_proj"]),
    "prefix": Prefix(tokens=4, start="random"),
    "prefix of one layer": Prefix(tokens=3, start="random", layers=[1]),
    "bottleneck": Bottleneck(placement="houlsby", size=5),
}
NEW = 9
LORA = (("lora", 1.0),)


def with_adapters(family):
    base = tiny_base(family)
    base.model.generation_config.eos_token_id = (
        None  # transformers' loop would stop there whatever it is told
    )
    _ = base.paths
    applied = {}
    for number, (name, config) in enumerate(METHODS.items()):
        head = base.model.get_output_embeddings()
        move(
            attach(base.model, config, name=name, routing=base.routing, head=head, seed=number),
            seed=number,
        )
        applied[((name, 1.0),)] = base.routing.applied(((name, 1.0),))
    both = (("lora", 0.5), ("dora", -1.5))
    applied[both] = base.routing.applied(both)
    return base, applied


def generate_alone(base, adapters, prompt):
    with base.routing.held(Acting.everywhere(adapters)):
        settings = GenerationConfig(
            max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=258
        )
        ids = torch.tensor([[*prompt]])
        out = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
    return out[0, len(prompt) :].tolist()


def requests(applied):
    """Two for each identity, with a common start longer than a block; one of a single token."""
    start = [(7 * n) % 250 for n in range(19)]
    for place, identity in enumerate([(), *applied]):
        yield identity, [*start, 5 + place, 9]
        yield identity, [*start, 200 + place] if place % 2 else [3 + place]


@pytest.mark.parametrize("family", ["llama_untied", "gemma3", "qwen3_moe"])
@pytest.mark.parametrize(
    "narrow", [False, True], ids=["room for all", "chunks, few rows, few blocks"]
)
def test_every_answer_is_the_one_that_its_request_gets_alone(family, narrow):
    base, applied = with_adapters(family)
    limits = Limits(rows=5, step_tokens=24, chunk_tokens=7) if narrow else Limits()
    tokens = 16 * 12 if narrow else 16 * 200
    engine = Engine(
        base,
        budget_bytes=tokens * bytes_per_token(base),
        adapters=FixedAdapters(applied),
        limits=limits,
    )
    asked = {}
    for identity, prompt in requests(applied):
        (answer,) = engine.add(Request(prompt=tuple(prompt), max_new_tokens=NEW, adapter=identity))
        asked[answer] = identity, prompt
    ended = engine.run()
    assert set(ended) == set(asked) and len(ended) == len(asked)
    for answer, (identity, prompt) in asked.items():
        assert answer.reason is FinishReason.LENGTH
        assert answer.answer == generate_alone(base, applied.get(identity, ()), prompt)
    engine.scheduler.blocks.check()


def test_a_prompt_that_begins_as_one_before_is_read_from_there_on_and_by_its_own_adapter_alone():
    base, applied = with_adapters("llama_untied")
    engine = Engine(base, budget_bytes=2**22, adapters=FixedAdapters(applied))
    start = tuple(range(40))
    lora = (("lora", 1.0),)
    first = [
        engine.add(Request(prompt=(*start, 50), max_new_tokens=2, adapter=i))[0] for i in ((), lora)
    ]
    engine.run()
    again = [
        engine.add(Request(prompt=(*start, 60), max_new_tokens=NEW, adapter=i))[0]
        for i in ((), lora, (("dora", 1.0),))
    ]
    engine.run()
    assert [a.cached_tokens for a in (*first, *again)] == [0, 0, 32, 32, 0]
    for answer, identity in zip(again, ((), lora, (("dora", 1.0),)), strict=True):
        assert answer.answer == generate_alone(base, applied.get(identity, ()), [*start, 60])


def test_an_adapter_that_is_not_here_and_a_base_that_cannot_be_packed_are_refused():
    base, applied = with_adapters("llama_untied")
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    with pytest.raises(ConfigError, match="is not attached"):
        engine.add(Request(prompt=(1,), max_new_tokens=1, adapter=(("nobody", 1.0),)))
    with pytest.raises(ConfigError, match="several requests in one step"):
        Engine(tiny_base("bloom"), budget_bytes=2**20, adapters=FixedAdapters({}))
    with pytest.raises(ConfigError, match="rows for"):
        engine.add(Request(prompt=(1, 2**20), max_new_tokens=1))
    with pytest.raises(ConfigError, match="rows for"):
        engine.add(
            Request(prompt=(1,), max_new_tokens=1, sampling=Sampling(logit_bias=((2**20, 1.0),)))
        )
    with torch.no_grad():
        assert engine.run() == []


DRAWS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=20, logprobs=2),
    Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.3),
    Sampling(temperature=1.0, min_p=0.1, frequency_penalty=0.5, logit_bias=((9, 2.0),)),
]


def run_engine(base, applied, asked, narrow):
    limits = Limits(rows=4, step_tokens=20, chunk_tokens=7) if narrow else Limits()
    engine = Engine(
        base,
        budget_bytes=16 * (10 if narrow else 200) * bytes_per_token(base),
        adapters=FixedAdapters(applied),
        limits=limits,
    )
    answers = [engine.add(request) for request in asked]
    engine.run()
    assert not engine._samplers
    return [[(answer.new, answer.logprobs) for answer in choices] for choices in answers]


def test_drawn_answers_do_not_depend_on_what_is_beside_them_nor_on_going_back():
    """Neither on how prompts are cut nor on running out of blocks; each choice draws its own."""
    base, applied = with_adapters("llama_untied")
    asked = [
        Request(
            prompt=tuple(prompt),
            max_new_tokens=NEW,
            adapter=identity,
            sampling=DRAWS[n % 5],
            seed=n,
            choices=1 + n % 3,
        )
        for n, (identity, prompt) in enumerate(requests(applied))
    ]
    together = run_engine(base, applied, asked, narrow=False)
    again = run_engine(base, applied, asked, narrow=False)
    assert again == together
    narrow = run_engine(base, applied, asked, narrow=True)
    for request, *found in zip(asked, together, narrow, strict=True):
        (by_itself,) = run_engine(base, applied, [request], narrow=False)
        for wide, tight, one in zip(*found, by_itself, strict=True):
            assert wide[0] == tight[0] == one[0]
            assert len(wide[1]) == (NEW if request.sampling.logprobs else 0)
            assert [c.logprob for c in wide[1]] == pytest.approx(
                [c.logprob for c in one[1]], abs=1e-4
            )
        drawn = [new for new, _ in found[0]]
        assert len(set(map(tuple, drawn))) == (1 if request.sampling.greedy else len(drawn))


def test_a_cancelled_answer_keeps_its_tokens_and_its_blocks_are_free_with_the_next_step():
    base, applied = with_adapters("llama_untied")
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    gone, stays = (engine.add(Request(prompt=(5, 9, n), max_new_tokens=NEW))[0] for n in (1, 2))
    engine.step(0.0)
    engine.cancel(gone)
    held = engine.scheduler.blocks.held_bytes
    assert (
        engine.step(0.0) == [gone] and gone.reason is FinishReason.CANCELLED and len(gone.new) == 1
    )
    assert engine.scheduler.blocks.held_bytes <= held
    assert engine.run() == [stays] and stays.answer == generate_alone(base, (), [5, 9, 2])


def test_one_adapter_on_all_rows_is_prepared_once_while_it_answers():
    base, applied = with_adapters("llama_untied")
    lora, dora = (("lora", 1.0),), (("dora", 1.0),)
    source = FixedAdapters(applied)
    engine = Engine(base, budget_bytes=2**22, adapters=source, lookup="off")
    for identity in (lora, dora):
        answers = [
            engine.add(Request(prompt=(5, n), max_new_tokens=NEW, adapter=identity))[0]
            for n in range(3)
        ]
        engine.step(0.0)
        engine.step(0.0)
        lane = engine.lanes.exact if identity == lora else engine.lanes.mixed
        acting = lane.acting[1]
        prepared = dict(acting.plan.kept)
        factors = [updates.few or updates.alone or updates.bundled for updates in prepared.values()]
        assert acting.whole == applied[identity] and any(factors) == (identity == lora)
        while not engine.scheduler.idle:
            engine.step(0.0)
            assert lane.acting is None or lane.acting[1].plan.kept == prepared
        assert [a.answer for a in answers] == [
            generate_alone(base, applied[identity], [5, n]) for n in range(3)
        ]


def test_a_step_uses_no_update_that_was_prepared_for_other_spans():
    """Both steps compute five rows of the base and five of the adapter, and keep the last of three
    spans: of the base's one in the first step, two in the second."""
    base, applied = with_adapters("llama_untied")
    head = (("head", 6.0),)
    applied[head] = base.routing.applied(head)
    limits = Limits(rows=4, step_tokens=10, chunk_tokens=5)
    engine = Engine(base, budget_bytes=2**22, adapters=FixedAdapters(applied), limits=limits)

    def ask(identity, prompt):
        return engine.add(Request(prompt=tuple(prompt), max_new_tokens=NEW, adapter=identity))[0]

    stays, *cancelled = ask((), range(9)), ask(head, [1, 2, 3, 4]), ask(head, [5])
    engine.step(0.0)
    for answer in cancelled:
        engine.cancel(answer)
    added = ask((), [9]), ask(head, range(20, 29))
    engine.run()
    assert stays.new == generate_alone(base, (), range(9))
    assert [answer.new for answer in added] == [
        generate_alone(base, (), [9]),
        generate_alone(base, applied[head], range(20, 29)),
    ]


def out_of_memory_above(monkeypatch, tokens):
    """A machine on which a forward of more tokens does not fit. Returns the sizes of all that were
    tried."""
    right, tried = PagedForward.logits, []

    def logits(self, plan, step, *more):
        tried.append(sum(span.stop - span.start for span in plan.spans))
        found = right(self, plan, step, *more)  # keys and values are written, or some of them
        if tried[-1] > tokens:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            )
        return found

    monkeypatch.setattr(PagedForward, "logits", logits)
    return tried


def test_where_memory_does_not_suffice_less_is_computed_at_once_and_every_answer_is_the_same(
    monkeypatch,
):
    base, applied = with_adapters("llama_untied")
    asked = [
        Request(prompt=tuple(p), max_new_tokens=NEW, adapter=i, choices=2)
        for i, p in requests(applied)
    ]
    expected = run_engine(base, applied, asked, narrow=False)
    tried = out_of_memory_above(monkeypatch, 6)
    assert run_engine(base, applied, asked, narrow=False) == expected
    assert max(tried) > 6 >= min(tried)


def test_an_answer_that_does_not_fit_alone_ends_and_the_others_go_on(monkeypatch):
    base, applied = with_adapters("llama_untied")
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    first, second = (engine.add(Request(prompt=(5, 9, n), max_new_tokens=NEW))[0] for n in (1, 2))
    engine.step(0.0)
    right = PagedForward.logits
    with monkeypatch.context() as patch:
        out_of_memory_above(patch, 0)
        full = PagedForward.logits
        patch.setattr(
            PagedForward, "logits", lambda *given: (right if first.error else full)(*given)
        )
        assert engine.step(0.0) == [first]
    assert (
        first.reason is FinishReason.ERROR
        and isinstance(first.error, DoesNotFitError)
        and len(first.new) == 1
    )
    assert engine.run() == [second] and second.answer == generate_alone(base, (), [5, 9, 2])
    engine.scheduler.blocks.check()


def test_a_request_longer_than_the_positions_or_first_frequencies_is_refused_at_once():
    bases = [
        tiny_base("llama", max_position_embeddings=16),
        based(rotary("longrope")),
        based(rotary("dynamic")),
    ]
    for base in bases:
        engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters({}))
        engine.add(Request(prompt=(1,) * 9, max_new_tokens=7))
        with pytest.raises(DoesNotFitError, match="the 16 positions"):
            engine.add(Request(prompt=(1,) * 9, max_new_tokens=8))
    base, applied = with_adapters("llama_untied")
    base.config.max_position_embeddings = 16
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    found = [
        engine.add(Request(prompt=(1,) * 9, max_new_tokens=new, adapter=(("prefix", 1.0),)))[0]
        for new in (3, 4)
    ]
    engine.run()
    assert [answer.reason for answer in found] == [FinishReason.LENGTH, FinishReason.ERROR]
    assert "prefix of 4" in str(found[1].error)


def test_logits_that_are_no_numbers_end_their_own_answer_alone():
    base, applied = with_adapters("llama_untied")
    lora, dora = (("lora", 1.0),), (("dora", 1.0),)
    broken = base.attachments["lora"].parameters()
    next(p for name, p in broken.items() if name.endswith(".B")).data.fill_(float("nan"))
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    asked = [
        engine.add(Request(prompt=(5, 9, 1), max_new_tokens=NEW, adapter=i))[0]
        for i in ((), lora, dora)
    ]
    engine.run()
    assert [answer.reason for answer in asked] == [
        FinishReason.LENGTH,
        FinishReason.ERROR,
        FinishReason.LENGTH,
    ]
    assert isinstance(asked[1].error, DivergedError) and not asked[1].new
    assert asked[2].answer == generate_alone(base, applied[dora], [5, 9, 1])


def test_nothing_is_read_of_blocks_before_it_is_written(monkeypatch):
    """Not even to be weighed with 0: memory that nobody filled may hold anything."""
    base, applied = with_adapters("llama_untied")
    asked = [
        Request(prompt=tuple(p), max_new_tokens=NEW, adapter=i, choices=2)
        for i, p in requests(applied)
    ]
    expected = run_engine(base, applied, asked, narrow=True)
    empty = KeyValueBlocks.empty

    def spoiled(*given):
        made = empty(*given)
        made.keys.fill_(float("nan"))
        made.values.fill_(float("nan"))
        return made

    monkeypatch.setattr(KeyValueBlocks, "empty", spoiled)
    assert run_engine(base, applied, asked, narrow=True) == expected


def test_nobody_holds_an_adapter_of_which_the_last_answer_has_ended():
    base, applied = with_adapters("llama_untied")
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    asked = [
        engine.add(Request(prompt=(5, 9), max_new_tokens=n, adapter=i))[0]
        for n, i in ((9, ()), (2, LORA))
    ]
    engine.step(0.0)
    assert engine.step(0.0) == asked[1:]
    gone = weakref.ref(base.attachments["lora"])
    for each in (applied, engine._adapters._applied):
        each.clear()
    base.detach("lora")
    gc.collect()
    assert gone() is None


def failing_with(patch, tokens, fault):
    """Forwards that fail where one of these tokens is in them; returns how many tokens each forward
    had."""
    tried, right = [], PagedForward.logits

    def logits(self, plan, *rest):
        tried.append([token for span in plan.spans for token in span.tokens])
        if set(tokens) & set(tried[-1]):
            raise fault
        return right(self, plan, *rest)

    patch.setattr(PagedForward, "logits", logits)
    return tried


@pytest.mark.parametrize(
    "fault", [AdapterMismatchError("it is broken"), RuntimeError("a bug")], ids=["ours", "a bug"]
)
def test_what_fails_in_a_forward_ends_its_own_answers_and_the_others_go_on(monkeypatch, fault):
    base, applied = with_adapters("llama_untied")
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    prompts = [(5, 9, 1), (5, 9, 200), (5, 9, 2), (5, 201, 2), (7,)]
    asked = [engine.add(Request(prompt=p, max_new_tokens=NEW, choices=2)) for p in prompts]
    tried = failing_with(monkeypatch, (200, 201), fault)
    engine.run()
    for prompt, answers in zip(prompts, asked, strict=True):
        broken = {200, 201} & set(prompt)
        for answer in answers:
            assert (answer.reason is FinishReason.ERROR, answer.error is fault) == (
                bool(broken),
                bool(broken),
            )
        if not broken:
            assert answers[0].answer == generate_alone(base, (), list(prompt))
    wrong = [tokens for tokens in tried if {200, 201} & set(tokens)]
    assert len(wrong) == 2 * (1 + 2), "together, then each alone; and their second choices so"
    assert engine.scheduler.blocks.held_bytes == 0
    engine.scheduler.blocks.check()


def test_a_prefix_that_cannot_be_written_ends_those_behind_it_alone(monkeypatch):
    base, applied = with_adapters("llama_untied")
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    identities = [(), (("prefix", 1.0),), LORA]
    asked = [
        engine.add(Request(prompt=(5, 9, 1), max_new_tokens=NEW, adapter=identity))[0]
        for identity in identities
    ]
    fault = AdapterMismatchError("its keys are of another base")
    monkeypatch.setattr(PagedForward, "write", lambda *given: (_ for _ in ()).throw(fault))
    engine.run()
    assert [answer.error for answer in asked] == [None, fault, None]
    for answer, each in zip(asked, identities, strict=True):
        assert answer.error or answer.answer == generate_alone(
            base, applied.get(each, ()), [5, 9, 1]
        )
    assert engine.scheduler.blocks.held_bytes == 0
    engine.scheduler.blocks.check()


def test_rows_that_fail_only_together_are_computed_one_by_one(monkeypatch):
    base, applied = with_adapters("llama_untied")
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    asked = [engine.add(Request(prompt=(5, 9, n), max_new_tokens=NEW))[0] for n in (1, 2, 3)]
    right = PagedForward.logits

    def logits(self, plan, *rest):
        if len(plan.spans) > 1:
            raise RuntimeError("not together")
        return right(self, plan, *rest)

    monkeypatch.setattr(PagedForward, "logits", logits)
    engine.run()
    assert [answer.answer for answer in asked] == [
        generate_alone(base, (), [5, 9, n]) for n in (1, 2, 3)
    ]


def test_after_a_step_that_failed_the_next_one_goes_on_as_if_there_had_been_none(monkeypatch):
    base, applied = with_adapters("llama_untied")
    engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(applied))
    (answer,) = engine.add(Request(prompt=(5, 9, 2), max_new_tokens=NEW))
    engine.step(0.0)
    with monkeypatch.context() as patch:
        patch.setattr(PagedForward, "rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step(0.0)
    assert engine.run() == [answer] and answer.answer == generate_alone(base, (), [5, 9, 2])


@pytest.mark.parametrize(
    "beside", [False, True], ids=["in the base's forward", "in the other forward"]
)
def test_a_stop_check_sees_each_token_once_also_where_a_step_is_computed_again(beside):
    """Another row fails while tokens are drawn, after this row's check has seen its token."""
    base, applied = with_adapters("llama_untied")
    seen, failures = [], []

    class Check:
        def __init__(self):
            seen.append([])

        def __call__(self, token):
            seen[-1].append(token)
            return len(seen[-1]) == 5

    class Fails:
        def allowed(self, new):
            return torch.ones(272, dtype=torch.bool)

        def ended(self, new):
            if len(new) == 3 and not failures:
                failures.append(new)
                raise ArithmeticError("once")
            return False

    who = (("dora", 1.0),) if beside else ()
    engine = Engine(base, budget_bytes=2**22, adapters=FixedAdapters(applied))
    (checked,) = engine.add(Request(prompt=(5, 9), max_new_tokens=NEW, checks=Check))
    (failing,) = engine.add(
        Request(prompt=(7,), max_new_tokens=NEW, constraints=Fails, adapter=who)
    )
    engine.run()
    assert failures and failing.reason is FinishReason.LENGTH and len(failing.new) == NEW
    assert checked.new == generate_alone(base, (), [5, 9])[:5] and seen[-1] == checked.new
