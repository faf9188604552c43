"""Probabilities of prompt tokens equal those of the model's own forward, whatever the scheduler
does with the prompt."""

import pytest
import torch

from tests.decoding.test_engine import with_adapters
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.decoding.draws import prompt_chances
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import FinishReason, Request

CLOSE = 1e-4
"""float32 logits of tiny models, by two forwards."""
TOKENS = (("tokens", 1.0),)
NARROW = Limits(rows=5, step_tokens=24, chunk_tokens=7)


def with_new_tokens():
    base, applied = with_adapters("llama_untied")
    attach(
        base.model,
        LoRA(rank=2),
        name="tokens",
        routing=base.routing,
        head=base.model.get_output_embeddings(),
        tokens=AddedTokens(("<x>",), (272,), ((1, 2),)),
    )
    return base, {**applied, TOKENS: base.routing.applied(TOKENS)}


def engine_of(base, applied, *, blocks=200, limits=None):
    budget = 16 * blocks * bytes_per_token(base)
    return Engine(base, budget_bytes=budget, adapters=FixedAdapters(applied), limits=limits)


def scored(prompt, identity=(), *, logprobs=2, **more):
    sampling = Sampling(logprobs=logprobs)
    return Request(
        prompt=tuple(prompt),
        max_new_tokens=more.pop("new", 3),
        adapter=identity,
        sampling=sampling,
        prompt_logprobs=True,
        **more,
    )


def assert_scored(base, applied, answer, alternatives=2):
    request = answer.request
    ids = torch.tensor([request.prompt])
    with torch.no_grad(), base.routing.held(Acting.everywhere(applied.get(request.adapter, ()))):
        logits = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    logs = logits.log_softmax(-1)
    assert [chance.token for chance in answer.prompt_logprobs] == list(request.prompt[1:])
    for row, chance in zip(logs, answer.prompt_logprobs, strict=False):
        assert chance.logprob == pytest.approx(float(row[chance.token]), abs=CLOSE)
        best = row.topk(alternatives).values.tolist()
        assert [log for _, log in chance.alternatives] == pytest.approx(best, abs=CLOSE)


@pytest.mark.parametrize("limits", [None, NARROW], ids=["whole prompts", "chunks"])
def test_every_adapters_prompt_is_scored_beside_others_that_are_not(limits):
    base, applied = with_new_tokens()
    engine = engine_of(base, applied, blocks=200 if limits is None else 14, limits=limits)
    start = [(7 * n) % 250 for n in range(19)]
    answers = []
    for place, identity in enumerate([(), *applied]):
        prompt = [*start, 5 + place, 272 if identity == TOKENS else 9, 4]
        answers += engine.add(scored(prompt, identity))
        engine.add(Request(prompt=(*start, 3), max_new_tokens=4, adapter=identity))
    answers += engine.add(scored([3]))
    engine.run()
    for answer in answers:
        assert answer.reason is FinishReason.LENGTH
        assert_scored(base, applied, answer)
    engine.scheduler.blocks.check()


def test_a_prompt_that_is_cached_is_scored_as_a_whole():
    base, applied = with_adapters("llama_untied")
    engine = engine_of(base, applied)
    prompt = range(40)
    for _ in range(2):
        (answer,) = engine.add(scored(prompt))
        engine.run()
        assert_scored(base, applied, answer)
        assert answer.cached_tokens == 0
    (plain,) = engine.add(Request(prompt=tuple(prompt), max_new_tokens=1))
    engine.run()
    assert plain.cached_tokens == 32 and plain.prompt_logprobs == []


def test_every_choice_has_the_scores_of_the_prompt_that_one_of_them_read():
    base, applied = with_adapters("llama_untied")
    for blocks in (200, 9):
        engine = engine_of(base, applied, blocks=blocks, limits=NARROW)
        answers = engine.add(scored(range(30), choices=3, new=12))
        engine.add(scored(range(100, 130), new=12))
        engine.step(0.0)
        engine.cancel(answers[0])  # it was reading the prompt
        engine.run()
        assert answers[0].reason is FinishReason.CANCELLED
        for answer in answers[1:]:
            assert_scored(base, applied, answer)


def test_a_request_that_asks_for_no_alternatives_gets_the_tokens_alone():
    base, applied = with_adapters("llama_untied")
    engine = engine_of(base, applied)
    (answer,) = engine.add(scored(range(9), logprobs=0))
    engine.run()
    assert_scored(base, applied, answer, alternatives=0)


def test_chances_do_not_depend_on_the_rows_that_are_computed_at_once(monkeypatch):
    logits, tokens = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)), [*range(7)]
    together = prompt_chances(logits, tokens, 3)
    monkeypatch.setattr("veneer.decoding.draws.SCORED_ROWS", 2)
    assert prompt_chances(logits, tokens, 3) == together and prompt_chances(logits, [], 3) == []
