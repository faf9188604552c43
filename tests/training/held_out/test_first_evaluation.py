"""The evaluation before step 1 is taken from an earlier run only where all that it is computed from
is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.tiny import save_tiny
from veneer.execution.proofs import same_values
from veneer.execution.stand_in import StandIn
from veneer.files import remembered as memory
from veneer.training import trainee
from veneer.training.config import RunConfig
from veneer.training.held_out import first_evaluation
from veneer.training.held_out.first_evaluation import EvaluationResult
from veneer.training.inputs import TrainingInputs
from veneer.training.output import sample
from veneer.training.output.records import read_records
from veneer.training.processes.world import World

ROWS = [{"prompt": f"number {n}", "completion": f"it is {n}"} for n in range(24)]


@pytest.fixture
def computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The steps that were evaluated rather than remembered, while this process remembers as a
    command does."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(memory, "_enabled", True)
    memory.surroundings.cache_clear()
    steps: list[int] = []
    real = trainee.compute_evaluation

    def compute(inputs: TrainingInputs, world: World, *, step: int) -> EvaluationResult:
        steps.append(step)
        return real(inputs, world, step=step)

    monkeypatch.setattr(trainee, "compute_evaluation", compute)
    yield steps
    memory.surroundings.cache_clear()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


def rows_in(folder: Path, rows: list[dict[str, str]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def run(base: Path, out: Path, *, data: Any = None, **settings: Any) -> list[dict[str, Any]]:
    """Its evaluations, without the seconds that they took."""
    train = data or {
        "train": rows_in(out.parent, ROWS),
        "validation": rows_in(out.parent, ROWS[:5], "held.jsonl"),
    }
    veneer.train(
        str(base), train, out=out, **{"steps": 2, "batch": 4, "learning_rate": 0.01, **settings}
    )
    found = [
        record for record in read_records(out / "metrics.jsonl") if record["kind"] == "evaluation"
    ]
    return [
        {name: value for name, value in result.items() if name != "seconds"} for result in found
    ]


def test_another_rate_begins_with_what_the_first_run_found(
    base: Path, tmp_path: Path, computed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(base, tmp_path / "first")
    assert "earlier run" not in capsys.readouterr().out
    assert computed == [0, 1, 2] and first[0]["loss"] and first[0]["sample"]["answer"]
    computed.clear()
    again = run(base, tmp_path / "again")
    assert computed == [1, 2] and again == first
    assert (
        "that of an earlier run"
        in capsys.readouterr().out.partition("step 1/2")[0].rpartition("largest batch")[2]
    )
    weights = [
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("first", "again")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    computed.clear()
    other = run(base, tmp_path / "other", learning_rate=0.02, steps=1)
    assert computed == [1] and other[0] == first[0] and other[1] != first[1]


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 7},
    "pissa": {"method": veneer.LoRA(rank=3, init="pissa")},
    "method": {"method": "dora"},
    "micro_batch": {"micro_batch": 2},
    "dtype": {"dtype": "bfloat16"},
    "checkpointing": {"checkpointing": True},
    "no sample": {"show_answers": False},
    "new tokens": {"new_tokens": ["<order>"]},
}


def test_lora_of_any_rank_on_any_modules_begins_as_the_base(
    base: Path, tmp_path: Path, computed: list[int]
) -> None:
    run(base, tmp_path / "first", steps=1)
    for name, method in (("rank", veneer.LoRA(rank=3)), ("at", veneer.LoRA(targets=["q_proj"]))):
        computed.clear()
        remembered = run(base, tmp_path / name, steps=1, method=method)
        assert computed == [1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "_enabled", False)
            assert run(base, tmp_path / f"{name} fresh", steps=1, method=method) == remembered


def test_another_setting_is_evaluated_anew(base: Path, tmp_path: Path, computed: list[int]) -> None:
    run(base, tmp_path / "first", steps=1)
    for name, settings in OTHERS.items():
        computed.clear()
        remembered = run(base, tmp_path / name, steps=1, **settings)
        assert computed == [0, 1], name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "_enabled", False)
            assert run(base, tmp_path / f"{name} fresh", steps=1, **settings) == remembered


def test_other_weights_rows_or_threads_are_evaluated_anew(
    base: Path, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(base, tmp_path / "first", steps=1)

    def anew(out: str, base: Path = base, **settings: Any) -> bool:
        computed.clear()
        run(base, tmp_path / out, steps=1, **settings)
        return 0 in computed

    assert not anew("again")
    train = rows_in(tmp_path, ROWS)
    held = {"train": train, "validation": rows_in(tmp_path, ROWS[1:6], "a.jsonl")}
    assert anew("rows", data=held) and not anew("rows again", data=held)
    asked = {
        "train": train,
        "validation": rows_in(tmp_path, [ROWS[1], ROWS[0], *ROWS[2:5]], "b.jsonl"),
    }
    assert anew("order", data=asked)
    sets = [
        {"path": rows_in(tmp_path, some, name)}
        for some, name in ((ROWS[:2], "c.jsonl"), (ROWS[2:5], "d.jsonl"))
    ]
    assert not anew("sets", data={"train": train, "validation": sets})  # the same rows as at first
    model = veneer.load(str(base)).model
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 7] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    veneer.load(str(base)).tokenizer.save_pretrained(tmp_path / "changed")
    assert anew("weights", base=tmp_path / "changed")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert anew("threads")
    finally:
        torch.set_num_threads(threads)
    assert not anew("as at first") and run(base, tmp_path / "last", steps=1) == first


def test_packed_bases_and_classes_of_others_are_never_remembered(
    base: Path, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        run(base, tmp_path / name, steps=1, quantize="nf4")
    assert computed == [0, 1, 0, 1]
    computed.clear()
    monkeypatch.setattr(same_values, "is_known", lambda kind: False)
    for name in ("c", "d"):
        run(base, tmp_path / name, steps=1)
    assert computed == [0, 1, 0, 1]


def test_no_evaluation_reads_what_the_key_leaves_out(
    base: Path, tmp_path: Path, computed: list[int]
) -> None:
    fields = {*first_evaluation._TRAINING, *first_evaluation._READ_ALREADY}
    assert fields <= RunConfig.model_fields.keys()
    memory._enabled = False
    first, *_ = run(base, tmp_path / "first")
    others: dict[str, Any] = {
        "learning_rate": 0.5,
        "schedule": "constant",
        "warmup": 0.5,
        "weight_decay": 0.1,
        "clip": None,
        "order": "shuffled",
        "steps": 1,
        "epochs": 1.0,
        "evaluate_every": 1,
        "save_every": 1,
        "keep": 1,
        "patience": 1,
        "log": [],
    }
    assert {*others, "out", "optimizer"} == {
        *first_evaluation._TRAINING
    }  # it steps, and nothing else
    for name, value in others.items():
        settings = {name: value} if name != "epochs" else {name: value, "steps": None}
        assert run(base, tmp_path / name, **settings)[0] == first, name


@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}], ids=["", "checkpointing"])
def test_a_sample_is_answered_by_the_models_own_modules(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    stood: list[int] = []
    real = sample.generate

    def generate(base: Any, *given: Any, **named: Any) -> Any:
        stood.append(sum(isinstance(module, StandIn) for module in base.model.modules()))
        return real(base, *given, **named)

    monkeypatch.setattr(sample, "generate", generate)
    run(base, tmp_path / "out", **settings)
    assert stood == [0, 0, 0]
