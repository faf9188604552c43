"""Log-probabilities of given answers against the plain computation: the model's own forward of one
row at a time in float64, whole logits, log_softmax."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from tests.support.helpers import fill, make_examples
from tests.support.models.routed import Routed
from tests.support.tiny import tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.placement.acting import Acting
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.data.batching import make_batch
from veneer.kernels.dense import loss as loss_kernel
from veneer.models import scores as scores_module
from veneer.models.scores import (
    AnswerScore,
    ScoreRequest,
    join_requests,
    score_examples,
    target_log_probs,
)
from veneer.models.step import prepare

CPU = torch.device("cpu")
FLOAT32 = 1e-5
"""Relative to the largest value: float32 against float64."""
TOKEN = 272
"""The id of the new token: the tiny vocabulary ends before it."""

ADAPTERS = {
    "layers": (LoRA(rank=3, alpha=5), None),
    "head": (LoRA(rank=2, alpha=7, targets=["lm_head", "q_proj"]), None),
    "tokens": (LoRA(rank=3, alpha=2), AddedTokens(("<x>",), (TOKEN,), ((1, 2),))),
    "dora": (DoRA(rank=2, alpha=3), None),
    "bottleneck": (Bottleneck(size=3), None),
    "prefix": (Prefix(tokens=3), None),
}


def adapted(family, dtype, names):
    """A tiny model with the named adapters, their values random; the same in every dtype."""
    model, routing = tiny_model(family, dtype), Routing()
    paths = prepare(model)
    for number, name in enumerate(names):
        config, tokens = ADAPTERS[name]
        attachment = attach(
            model,
            config,
            name=name,
            routing=routing,
            head=model.get_output_embeddings(),
            tokens=tokens,
        )
        fill(attachment.parameters().values(), seed=number, scale=0.2)
    return model, paths, routing


def rows_for(name, seed):
    """Examples that share a prompt; those of an adapter with a new token hold it."""
    examples = make_examples(4, seed=seed)
    if name != "tokens":
        return examples
    changed = [example.ids.copy() for example in examples]
    for ids in changed:
        ids[-3] = TOKEN
    return [replace(e, ids=ids) for e, ids in zip(examples, changed, strict=True)]


def reference(family, names, name, examples):
    """log p of each target by the model's own forward in float64, one row at a time."""
    model, _, routing = adapted(family, torch.float64, names)
    routing.active = () if name is None else ((name, 1.0),)
    return plain_log_probs(model, examples)


def plain_log_probs(model, examples):
    results = []
    with torch.no_grad():
        for example in examples:
            ids = torch.from_numpy(example.ids.astype(np.int64))[None]
            mask = torch.ones_like(ids)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
            targets = np.flatnonzero(example.trained)
            results.append(logits.log_softmax(-1)[targets - 1, ids[0, targets]])
    return results


def assert_equal(computed, expected):
    assert len(computed) == len(expected)
    for score, right in zip(computed, expected, strict=True):
        values = score.log_probs if isinstance(score, AnswerScore) else score
        assert values.dtype == torch.float32 and values.shape == right.shape
        assert (values - right).abs().max() <= FLOAT32 * right.abs().max()


FAMILIES = ["llama", "llama_untied", "gemma2", "bloom", "falcon", "gpt2"]
"""A tied and an untied head; a soft cap; padded rows; another block."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["chunks", "whole"])
def test_log_probs_equal_the_reference_on_every_path(family, head, monkeypatch):
    monkeypatch.setattr(loss_kernel, "CHUNK", 5)  # the head sees its rows in parts
    model, paths, routing = adapted(family, torch.float32, [])
    if head == "whole":
        paths = replace(paths, head_reason="a head of an unknown kind")
    examples = make_examples(5)
    request = ScoreRequest((), examples)
    (computed,) = score_examples(Routed(model, paths, routing), [request])
    assert_equal(computed, reference(family, [], None, examples))


def test_a_logit_scale_is_part_of_the_score():
    config = GraniteConfig(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=0.25,
    )
    torch.manual_seed(0)
    model = GraniteForCausalLM(config).eval()
    expected = plain_log_probs(deepcopy(model).double(), make_examples(4))
    paths = prepare(model)
    assert paths.head_reason is None and paths.scale == 4.0
    (computed,) = score_examples(
        Routed(model, paths, Routing()), [ScoreRequest((), make_examples(4))]
    )
    assert_equal(computed, expected)


@pytest.mark.parametrize("share", [True, False])
def test_a_batch_gives_every_target(share):
    model, paths, routing = adapted("llama", torch.float32, ["layers"])
    routing.active = (("layers", 1.0),)
    examples = make_examples(6)
    batch = make_batch(examples, packed=True, share_prompt=share, device=CPU)
    log_probs = target_log_probs(Routed(model, paths, routing), batch)
    expected = reference("llama", ["layers"], "layers", examples)
    assert not log_probs.requires_grad
    assert_equal([log_probs], [torch.cat(expected)])


MIXES = {
    "heads": ("llama_untied", ["head", "layers", "tokens"]),
    "tied": ("llama", ["tokens", "layers"]),
    "methods": ("llama", ["dora", "bottleneck", "prefix", "layers"]),
    "soft cap": ("gemma2", ["head", "tokens"]),
    "padded": ("bloom", ["layers"]),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("tokens", [1, 8192])
def test_several_adapters_in_one_forward_score_as_each_does_alone(mix, tokens, monkeypatch):
    monkeypatch.setattr("veneer.models.scores.FORWARD_TOKENS", tokens)
    monkeypatch.setattr(loss_kernel, "CHUNK", 7)
    family, names = MIXES[mix]
    model, paths, routing = adapted(family, torch.float32, names)
    adapters = [*names, None]
    rows = [rows_for(name, seed) for seed, name in enumerate(adapters)]
    requests = [
        ScoreRequest(() if name is None else routing.applied(((name, 1.0),)), examples)
        for name, examples in zip(adapters, rows, strict=True)
    ]
    forwards = []
    monkeypatch.setattr(
        "veneer.models.scores.target_log_probs",
        lambda *args: forwards.append(args[-1]) or target_log_probs(*args),
    )
    scores = score_examples(Routed(model, paths, routing), requests)
    assert (len(forwards) == 1) == (tokens == 8192)
    for name, examples, computed in zip(adapters, rows, scores, strict=True):
        assert_equal(computed, reference(family, names, name, examples))


def test_rows_that_may_not_share_a_forward_are_computed_apart():
    model, paths, routing = adapted("llama", torch.float32, ["layers"])
    alone = replace(paths, packed=False, packed_reason="P", padded_reason="Q")
    examples = make_examples(3)
    applied = routing.applied((("layers", 0.5),))
    requests = [ScoreRequest(applied, examples), ScoreRequest((), examples)]
    together = score_examples(Routed(model, paths, routing), requests)
    for ours, theirs in zip(
        together, score_examples(Routed(model, alone, routing), requests), strict=True
    ):
        assert_equal(ours, [score.log_probs.double() for score in theirs])


def test_a_joined_batch_says_which_adapter_acts_on_which_rows():
    model, paths, routing = adapted("llama", torch.float32, ["layers"])
    applied = routing.applied((("layers", 1.0),))
    examples = make_examples(3)
    batch, acting = join_requests(
        Routed(model, paths), [ScoreRequest(applied, examples), ScoreRequest((), examples)]
    )
    assert acting.rows == batch.ids.numel() and acting.adapters == [applied[0][0]]
    _, same = join_requests(Routed(model, paths), [ScoreRequest(applied, examples)] * 2)
    assert same.whole == applied and same != Acting()


@pytest.mark.parametrize("head", ["chunks", "whole"])
def test_an_answer_is_greedy_if_greedy_decoding_writes_it(head):
    model, paths, routing = adapted("llama", torch.float32, [])
    if head == "whole":
        paths = replace(paths, head_reason="a head of an unknown kind")
    examples = []
    for example in make_examples(4):
        prompt = torch.from_numpy(example.ids[:6].astype(np.int64))[None]
        for _ in range(3):
            likeliest = model(input_ids=prompt).logits[:, -1].argmax(-1)
            prompt = torch.cat([prompt, likeliest[None]], dim=1)
        ids = prompt[0].numpy().astype(np.int32)
        other = ids.copy()
        other[7] = (other[7] + 1) % 272
        mask = np.arange(9) >= 6
        examples += [replace(example, ids=row, trained=mask) for row in (ids, other)]
    (scores,) = score_examples(Routed(model, paths, routing), [ScoreRequest((), examples)])
    assert [score.greedy for score in scores] == [True, False] * 4


def test_progress_counts_the_examples_of_all_requests(monkeypatch):
    monkeypatch.setattr(scores_module, "FORWARD_TOKENS", 1)
    model, paths, routing = adapted("llama", torch.float32, [])
    requests = [ScoreRequest((), make_examples(count)) for count in (5, 2)]
    calls = []

    def progress(done, total):
        calls.append((done, total))

    score_examples(Routed(model, paths, routing), requests, batch_rows=2, progress=progress)
    done = [count for count, _ in calls]
    assert {total for _, total in calls} == {7} and len(done) >= 4
    assert done == sorted(set(done)) and done[-1] == 7


def test_no_row_and_no_request_give_no_score():
    model, paths, routing = adapted("llama", torch.float32, [])
    assert score_examples(Routed(model, paths, routing), []) == []
    assert score_examples(Routed(model, paths, routing), [ScoreRequest((), [])]) == [[]]
