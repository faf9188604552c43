"""Steps of answers that are captured once and replayed say what steps say that are launched call by
call.

The device is simulated, and a graph is a tape (tests/support/kernels/tape.py): it repeats recorded
operations on the memory of the recording. So these tests show whatever a step computes on the host
or reads at an old address.
"""

import logging
from contextlib import contextmanager

import pytest
import torch

from tests.adapters.test_methods import move, written
from tests.support.accelerator import Accelerator
from tests.support.kernels.tape import Tape
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA, Prefix
from veneer.decoding import forward
from veneer.decoding.engine import Engine
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import Request
from veneer.execution import cuda_graphs as graphs
from veneer.kernels.attention import packed as attention
from veneer.kernels.attention.paged import (
    KeyValueBlocks,
    SpanRows,
    Spans,
    paged_attention_reference,
)
from veneer.kernels.attention.paged_rows import BlockTables, paged_rows_reference
from veneer.kernels.cuda import launch
from veneer.kernels.rules import AttentionRules
from veneer.models.load import load_base

LORA, BOTH, PREFIX = (("lora", 1.0),), (("lora", 0.5), ("other", -1.5)), (("prefix", 1.0),)
CONFIGS = {
    "lora": LoRA(rank=3, alpha=5.0, targets=["q_proj", "o_proj", "down_proj"]),
    "other": LoRA(rank=2, alpha=4.0, targets=["v_proj", "lm_head"]),
    "prefix": Prefix(tokens=4, start="random"),
}
ASKED = [
    ((), [5, 9, 30, 7, 5], 30),
    ((), [5, 9, 30, 7], 12),
    (LORA, [5, 9, 30], 20),
    (BOTH, [5, 9, 30, 7, 5, 61], 30),
    ((), [8, *range(5, 258)], 25),  # beyond the blocks of the smallest table
]


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.setattr(
        launch, "module", lambda name: None
    )  # it would launch on the pretended device
    monkeypatch.setattr(attention, "declined", lambda *_: "pretended")


@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral"])
def there(request):
    with Accelerator("cuda:0") as pretended:
        base = load_base(str(written(request.param)), device="cuda:0", dtype="float32")
        assert base.paths
        applied = {}
        for number, (name, config) in enumerate(CONFIGS.items()):
            head = base.model.get_output_embeddings()
            move(
                attach(base.model, config, name=name, routing=base.routing, head=head, seed=number),
                seed=number,
            )
        for identity in (LORA, BOTH, PREFIX):
            applied[identity] = base.routing.applied(identity)
        yield pretended, base, applied


@contextmanager
def recording(monkeypatch, recorder):
    with monkeypatch.context() as patch:
        patch.setattr(forward, "recorder_here", lambda: recorder)
        yield


def engine_of(monkeypatch, base, applied, recorder, **limits):
    with recording(monkeypatch, recorder):
        return Engine(
            base, budget_bytes=2**22, adapters=FixedAdapters(applied), limits=Limits(**limits)
        )


def compute_answers(engine, asked):
    """Each answer's tokens and their chances."""
    made = [
        engine.add(
            Request(
                prompt=tuple(prompt), max_new_tokens=new, adapter=who, sampling=Sampling(logprobs=1)
            )
        )[0]
        for who, prompt, new in asked
    ]
    engine.run()
    assert all(answer.error is None for answer in made)
    return [answer.new for answer in made], [
        logprob.logprob for answer in made for logprob in answer.logprobs
    ]


def test_answers_are_those_that_are_launched_call_by_call(there, monkeypatch):
    pretended, base, applied = there
    expected = compute_answers(engine_of(monkeypatch, base, applied, None), ASKED)
    tape = Tape(pretended)
    engine = engine_of(monkeypatch, base, applied, tape)
    tokens, chances = compute_answers(engine, ASKED)
    assert tokens == expected[0] and chances == pytest.approx(expected[1], abs=1e-5)
    assert tape.replayed > tape.captured > 2 and not engine.lanes.exact.forward.graphs.refused


def test_rows_and_blocks_are_filled_up_so_that_there_are_few_graphs(there, monkeypatch):
    pretended, base, _ = there
    tape = Tape(pretended)
    engine = engine_of(monkeypatch, base, {}, tape)
    compute_answers(engine, [((), [5, 9 + n], 8 + n) for n in range(6)])
    assert {key[:2] for key in engine.lanes.exact.forward.graphs.kept} == {(8, 16 + graphs.HEAD)}
    assert tape.captured == 1


def test_what_cannot_be_captured_is_launched_and_said_once(there, monkeypatch, caplog):
    pretended, base, applied = there
    tape, norm = Tape(pretended), type(base.model.model.norm)
    expected = compute_answers(engine_of(monkeypatch, base, applied, None), ASKED[:2])
    forward_of = norm.forward
    monkeypatch.setattr(
        norm, "forward", lambda self, x: forward_of(self, x * (1 if x.sum().item() else 2))
    )
    engine = engine_of(monkeypatch, base, applied, tape)
    with caplog.at_level(logging.WARNING, "veneer.decoding"):
        assert compute_answers(engine, ASKED[:2])[0] == expected[0]
    assert not tape.captured and engine.lanes.exact.forward.graphs.refused
    assert len(caplog.records) == 1 and "the host waits" in caplog.text


def test_what_differs_when_it_is_replayed_is_not_taken(there, monkeypatch, caplog):
    pretended, base, applied = there
    expected = compute_answers(engine_of(monkeypatch, base, applied, None), ASKED[:2])

    class Wrong(Tape):
        def record(self, run):
            right = super().record(run)
            return lambda: right() + 1.0

    engine = engine_of(monkeypatch, base, applied, Wrong(pretended))
    assert compute_answers(engine, ASKED[:2])[0] == expected[0]
    assert "its graph differs" in caplog.text


def test_a_prefix_is_launched_call_by_call(there, monkeypatch):
    pretended, base, applied = there
    tape = Tape(pretended)
    engine = engine_of(monkeypatch, base, applied, tape)
    assert len(compute_answers(engine, [(PREFIX, [5, 9, 30], 9)])[0][0]) == 9
    assert not tape.captured


def test_graphs_of_adapters_that_nobody_uses_go_with_the_last_answer(there, monkeypatch):
    pretended, base, applied = there
    engine = engine_of(monkeypatch, base, applied, Tape(pretended))
    compute_answers(engine, [(LORA, [5, 9], 9)])
    assert not engine.lanes.exact.forward.graphs.kept
    compute_answers(engine, [((), [5, 9], 9)])
    assert len(engine.lanes.exact.forward.graphs.kept) == 1


@pytest.mark.parametrize(
    "rules",
    [
        AttentionRules(0.3),
        AttentionRules(0.3, window=21),
        AttentionRules(0.3, softcap=2.0, sinks=torch.ones(4)),
    ],
)
def test_single_tokens_over_tables_see_what_spans_see(rules):
    draw = torch.Generator().manual_seed(0)
    lengths, slots = [1, 16, 17, 40], 16
    q, k, v = (torch.randn(4, heads, 8, generator=draw, dtype=torch.float64) for heads in (4, 2, 2))
    found = []
    for way in (paged_rows_reference, paged_attention_reference):
        stored = KeyValueBlocks.empty(20, slots, k, v)
        stored.keys.fill_(float("nan")), stored.values.fill_(float("nan"))
        own = [list(range(5 * n, 5 * n + 3)) for n in range(4)]
        draw.manual_seed(1)
        for blocks, length in zip(own, lengths, strict=True):
            places = torch.tensor(
                [blocks[i // slots] * slots + i % slots for i in range(length - 1)],
                dtype=torch.long,
            )
            before = torch.randn(2, length - 1, 2, 8, generator=draw, dtype=torch.float64)
            stored.write(places, *before)
        tables = BlockTables(
            torch.tensor([[*blocks, 7, 99999] for blocks in own]), torch.tensor(lengths)
        )
        spans = Spans(
            [SpanRows(n - 1, n, blocks) for n, blocks in zip(lengths, own, strict=True)], slots
        )
        found.append(way(q, k, v, stored, tables if way is paged_rows_reference else spans, rules))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
