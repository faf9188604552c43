"""Means of a prompt's last hidden states equal those of the model's own forward, whatever the
scheduler does with the prompt."""

import pytest
import torch

from tests.decoding.schedule.test_prompt_scores import NARROW, engine_of
from tests.decoding.test_engine import with_adapters
from veneer.adapters.placement.acting import Acting
from veneer.decoding.engine import Engine
from veneer.decoding.prompt_states import PromptMean
from veneer.decoding.schedule.sequence import FinishReason, Request
from veneer.errors import DoesNotFitError

CLOSE = 1e-4
"""float32 states of tiny models, by two forwards."""


def read(engine: Engine, prompt, start=0, stop=None, identity=(), **more):
    mean = PromptMean(start, stop or len(prompt))
    settings = {"max_new_tokens": 1, "prompt_only": True, **more}
    request = Request(prompt=tuple(prompt), adapter=identity, prompt_states=mean.take, **settings)
    (answer,) = engine.add(request)
    return answer, mean


def expected_mean(base, applied, prompt, start=0, stop=None):
    ids = torch.tensor([list(prompt)])
    with torch.no_grad(), base.routing.held(Acting.everywhere(applied)):
        out = base.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return out.last_hidden_state[0, start:stop].mean(0)


def assert_equal(mean, base, applied, prompt, start=0, stop=None):
    expected = expected_mean(base, applied, prompt, start, stop)
    assert torch.allclose(torch.tensor(mean.value), expected, atol=CLOSE)


@pytest.mark.parametrize("by_parts", [True, False], ids=["by parts", "own forward"])
@pytest.mark.parametrize("limits", [None, NARROW], ids=["whole prompts", "chunks"])
def test_means_are_the_models_own_beside_other_requests(by_parts, limits, monkeypatch):
    base, applied = with_adapters("llama_untied")
    engine = engine_of(base, applied, blocks=200 if limits is None else 14, limits=limits)
    if not by_parts:
        monkeypatch.setattr(engine.decode_step, "_parts", None)
    prompt = [(7 * n) % 250 for n in range(40)]
    read_means = []
    for identity in ((), *applied):
        engine.add(Request(prompt=(*prompt[:30], 3), max_new_tokens=4, adapter=identity))
        read_means += [(identity, *read(engine, prompt, 5, 33, identity))]
        read_means += [(identity, *read(engine, prompt, 5, 33, identity, max_new_tokens=3))]
    one_token, one_mean = read(engine, prompt[:1])
    engine.run()
    assert one_token.reason is FinishReason.LENGTH
    assert_equal(one_mean, base, (), prompt[:1])
    for identity, answer, mean in read_means:
        assert answer.reason is FinishReason.LENGTH
        assert_equal(mean, base, applied.get(identity, ()), prompt, 5, 33)
    engine.scheduler.blocks.check()


def test_a_cached_prompt_is_read_as_a_whole_and_serves_the_next_request():
    base, applied = with_adapters("llama_untied")
    engine = engine_of(base, applied)
    prompt = range(40)
    for _ in range(2):
        answer, mean = read(engine, prompt)
        engine.run()
        assert answer.cached_tokens == 0
        assert_equal(mean, base, (), prompt)
    (answer,) = engine.add(Request(prompt=tuple(prompt), max_new_tokens=3))
    engine.run()
    assert answer.cached_tokens == 32


def test_a_step_that_runs_out_of_memory_counts_no_token_twice(monkeypatch):
    base, applied = with_adapters("llama_untied")
    engine = engine_of(base, applied)
    prompt = range(40)
    _, mean = read(engine, prompt)
    logits, failures = engine.lanes.logits, [True, True]

    def failing(plan):
        computed = logits(plan)
        if failures and failures.pop():
            raise DoesNotFitError("out of memory") from torch.OutOfMemoryError()
        return computed

    monkeypatch.setattr(engine.lanes, "logits", failing)
    monkeypatch.setattr("veneer.decoding.engine.is_out_of_memory", lambda fault: True)
    engine.run()
    assert_equal(mean, base, (), prompt)
