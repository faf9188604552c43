"""Packed attention with a soft cap by flex attention (kernels/attention/flex.py) against one row at
a time: an exact function stands in its place. Nothing here has run on a GPU."""

import logging
import warnings
from itertools import product

import pytest
import torch

from tests.kernels.attention.test_flash import CPU, LAYOUTS, WINDOWS, H, K, case, gradients
from tests.support.kernels.flex_reference import exact
from veneer.kernels.attention import flash, flex
from veneer.kernels.attention import packed as attention
from veneer.kernels.attention.prefix import prefixed_attention_reference
from veneer.kernels.bindings import library as native
from veneer.kernels.cuda import launch
from veneer.kernels.layout import Group
from veneer.kernels.rules import AttentionRules

LONG = {
    "many blocks": (150, (300, 1, 129, 40)),
    "without a prompt": (0, (260, 128, 5)),
    "a long one": (0, (400,)),
}


@pytest.mark.parametrize(
    ("layout", "window", "sinks"),
    [
        *product(LAYOUTS.values(), WINDOWS, [False, True]),
        *product(LONG.values(), [None, 1, 100, 300], [True]),  # a sink is a row's own
    ],
)
def test_output_and_gradients_are_those_of_one_row_at_a_time(layout, window, sinks):
    tensors, weights = case(*layout, sinks=sinks)
    group = Group(*layout, CPU)
    *qkv, sink = tensors
    rules = AttentionRules(0.7, window, 1.5, sink)
    found = flex.flex_packed_attention(*qkv, group, rules, exact)
    nothing = qkv[1].new_zeros(0, K, qkv[1].shape[2])
    expected = prefixed_attention_reference(*qkv, nothing, nothing, group, rules)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        gradients(found, weights, tensors), gradients(expected, weights, tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert not found[group.rows :].any(), "filler gets nothing"


def test_torchs_own_takes_what_it_is_given_and_answers_the_same():
    tensors, _ = case(*LONG["many blocks"], sinks=True, dtype=torch.float32)
    q, k, v, sink = (tensor.detach() for tensor in tensors)
    group, rules = Group(*LONG["many blocks"], CPU), AttentionRules(0.7, 100, 1.5, sink)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it holds all scores where it is not compiled
        found = flex.flex_packed_attention(q, k, v, group, rules, flex.torch_flex_attention)
    torch.testing.assert_close(
        found, flex.flex_packed_attention(q, k, v, group, rules, exact), rtol=1e-5, atol=1e-5
    )


def test_blocks_that_nobody_sees_are_not_listed():
    known = flex.visible_keys(Group(0, (1280, 1280), CPU), 100, CPU).blocks
    listed = known.kv_num_blocks.sum() + known.full_kv_num_blocks.sum()
    assert listed == 2 * (10 + 9)  # its own, and the one before
    whole = flex.visible_keys(Group(1280, (1280,), CPU), None, CPU).blocks
    assert whole.kv_num_blocks.sum() == 20 and whole.full_kv_num_blocks.sum() == 19 * 20 // 2


def test_it_is_asked_for_soft_caps_alone_and_a_plan_counts_what_it_keeps(monkeypatch):
    monkeypatch.setattr(launch, "module", lambda name: name)
    group = Group(0, (64,), CPU)
    q, k, v = (
        torch.empty(64, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (H, K, K)
    )
    plain = attention.plain_attention
    with native.planning("cuda"):
        assert flex.declined(q, k, v, group, AttentionRules(0.1), plain) == "no soft cap on scores"
        assert (
            flex.declined(q.float(), k, v, group, AttentionRules(0.1, softcap=2.0), plain)
            == "numbers of torch.float32"
        )
        assert flex.declined(q, k, v, group, AttentionRules(0.1, softcap=2.0), plain) is None
        asked = []
        monkeypatch.setattr(
            attention, "flash_attention", lambda *given: asked.append(given[-1]) or given[0]
        )
        attention.packed_attention(q, k, v, group, AttentionRules(0.1, softcap=2.0))
        assert asked == [AttentionRules(0.1)]
        monkeypatch.setattr(launch, "module", lambda name: None)
        assert (
            flex.declined(q, k, v, group, AttentionRules(0.1, softcap=2.0), plain)
            == "Triton is not installed, or does not work here"
        )


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (lambda *given, **named: exact(*given, **named), None),
        (lambda *given, **named: (exact(*given, **named)[0] * 1.1, None), "it differs"),
        (lambda *given, **named: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["right", "wrong", "broken"],
)
def test_it_is_tried_before_it_is_used_and_what_is_wrong_is_said(way, said, monkeypatch, caplog):
    monkeypatch.setattr(flex, "compiled", lambda: way)
    monkeypatch.setattr(flash, "declined", lambda *_: None)
    monkeypatch.setattr(launch, "module", lambda name: name)
    flex._fault.cache_clear()
    q, k, v = (torch.zeros(9, heads, 16, dtype=torch.bfloat16) for heads in (H, K, K))
    with caplog.at_level(logging.WARNING, "veneer.kernels"):
        for _ in range(2):
            found = flex.declined(
                q,
                k,
                v,
                Group(0, (9,), CPU),
                AttentionRules(0.1, softcap=2.0),
                attention.plain_attention,
            )
    flex._fault.cache_clear()
    assert (found is None) == (said is None) and len(caplog.records) == (said is not None)
    assert said is None or (said in found and said in caplog.text)
