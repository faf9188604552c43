"""Tokens in files: the same examples, batches and adapters as in memory, built once, found by what
they are made of."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.support.helpers import ended_before_step
from tests.support.tiny import save_tiny
from veneer.cli.main import main
from veneer.data import large
from veneer.data.batching import RowSpans, by_length, equal_neighbours, plan_epoch
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity, Example, RowRef
from veneer.data.files.columns import KtoLabels
from veneer.data.files.on_disk import ExampleWriter, StoredExamples, representative_examples
from veneer.data.files.unused import lock_of
from veneer.data.large import training_data
from veneer.data.load import DataSet, load_data
from veneer.data.split import BY_THRESHOLD
from veneer.errors import CorruptFileError, DataError
from veneer.files.atomic import write_manifest
from veneer.files.lock import locked
from veneer.models.load import load_base
from veneer.training import config as config_module
from veneer.training import prepare
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    save_tiny(place / "base", "llama")
    rows = [{"prompt": f"number {n} " * (1 + n % 5), "completion": f"it is {n}"} for n in range(40)]
    (place / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]))
    turns = [
        {"role": r, "content": f"{r} says {n}"} for n in range(2) for r in ("user", "assistant")
    ]
    chats = [
        {
            "messages": [
                {"role": "system", "content": "be"},
                *turns,
                {"role": "user", "content": f"x{n}"},
                turns[1],
            ]
        }
        for n in range(9)
    ]
    (place / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return place


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Any:
    return load_base(str(world / "base")).tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))


RULES = RowRules(200, Capacity(1024, 272))


def read(
    world: Path, tokenizer: Any, say: Any = lambda line: None, **fields: Any
) -> tuple[DataSet, DataSet]:
    data = DataConfig.of({"train": str(world / "a.jsonl"), "validation_share": 0.2, **fields})
    files = data.model_copy(update={"tokens": "files"})
    return load_data(data, RULES, tokenizer), training_data(files, RULES, tokenizer, say=say)


def plain(examples: Any) -> list[Any]:
    return [
        (e.ids.tolist(), e.trained.tolist(), e.ids.dtype, e.ref, e.key, e.row) for e in examples
    ]


SETS = {
    "one": {},
    "mixed": {
        "train": [
            {"path": "a.jsonl", "weight": 0.5},
            {"path": "b.jsonl", "share": 0.3, "name": "chats"},
        ]
    },
    "with its own held-out rows": {"train": "b.jsonl", "validation": "a.jsonl", "train_on": "last"},
    "cut": {"long_rows": "cut"},
}


@pytest.mark.parametrize("fields", SETS.values(), ids=SETS)
def test_a_set_in_files_is_the_one_in_memory(
    world: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.chdir(world)
    said: list[str] = []
    memory, files = read(world, tokenizer, said.append, **fields)
    assert isinstance(files.train, StoredExamples)
    assert plain(files.train) == plain(memory.train) and plain(files.validation) == plain(
        memory.validation
    )
    for name in ("report", "fingerprint", "preamble", "mixture", "sets", "held"):
        assert getattr(files, name) == getattr(memory, name), name
    assert files.validation_rows == memory.validation_rows
    ours, theirs = RowSpans.of(files.train), RowSpans.of(memory.train)
    assert list(ours.starts) == list(theirs.starts) and list(ours.lengths) == list(theirs.lengths)
    assert by_length(files.train[3:20], 4) == by_length(memory.train[3:20], 4)
    assert files.in_files is not None and "tokens in files" in files.in_files
    again = training_data(
        DataConfig.of(
            {"train": str(world / "a.jsonl"), "validation_share": 0.2, **fields, "tokens": "files"}
        ),
        RULES,
        tokenizer,
        say=said.append,
    )
    assert again.fingerprint == memory.fingerprint and again.report == memory.report
    assert [line.split(" ")[0] for line in said] == ["tokens", "built", "tokens"]


def test_what_decides_the_tokens_decides_which_files_are_found(
    world: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((world / "a.jsonl").read_text())
    said: list[str] = []
    told = partial(training_data, tokenizer=tokenizer, say=said.append)
    data = DataConfig.of({"train": str(rows), "validation_share": 0.2, "tokens": "files"})
    told(data, RULES)
    for changed in (
        data.model_copy(update={"train_on": "all"}),
        data.model_copy(update={"validation_share": 0.3}),
    ):
        told(changed, RULES)
    told(data, replace(RULES, length=199))
    rows.write_text(rows.read_text().replace("number 3 ", "number 4 "))
    told(data, RULES)
    assert [line for line in said if "found" in line] == []
    told(data, RULES)
    assert "found" in said[-1]
    (folder,) = {line.rpartition(" ")[2] for line in said[-1:]}
    tokens = Path(folder) / "train" / "tokens.i4"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(CorruptFileError, match="tokens"):
        StoredExamples(Path(folder) / "train")
    before = len(said)
    told(data, RULES)  # damaged: it is built anew
    assert "damaged" in said[before] and "into files once" in said[before + 1]


def test_a_changed_bit_in_any_kept_file_makes_it_build_again(world: Path, tokenizer: Any) -> None:
    said: list[str] = []
    memory, files = read(world, tokenizer, said.append)
    (folder,) = {Path(line.rpartition(" ")[2]) for line in said if "into files once" in line}
    every = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size
    )
    assert len(every) > 15
    for name in every:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)
        said.clear()
        _, files = read(world, tokenizer, said.append)
        assert any("into files once" in line for line in said), name
        assert files.fingerprint == memory.fingerprint and plain(files.train) == plain(
            memory.train
        ), name
    for text in ("{}", "[]", "", '{"report": {}}'):
        (folder / "set.json").write_text(text)
        write_manifest(folder)
        assert read(world, tokenizer)[1].report == memory.report, text
    (folder / "MANIFEST.json").unlink()
    assert read(world, tokenizer)[1].report == memory.report


def test_a_set_is_checked_and_opened_while_another_process_holds_its_lock(
    world: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of several processes checks the files: one after another they would wait for the sum of
    their times."""
    monkeypatch.setattr(large, "_WAIT_SECONDS", 1.0)
    said: list[str] = []
    read(world, tokenizer, said.append)
    folder = Path(said[0].rpartition(" ")[2])
    with locked(lock_of(folder)):
        read(world, tokenizer, said.append)
    assert said[-1] == f"tokens found in {folder}"


def test_rows_that_change_while_they_are_read_are_refused(
    world: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tokens of one content would be found under the hash of another."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text((world / "a.jsonl").read_text())
    own = large.read_data

    def edited_meanwhile(*args: Any, **asked: Any) -> Any:
        made = own(*args, **asked)
        rows.write_text(rows.read_text().replace("number 3 ", "number 4 "))
        return made

    monkeypatch.setattr(large, "read_data", edited_meanwhile)
    data = DataConfig.of({"train": str(rows), "validation_share": 0.2, "tokens": "files"})
    with pytest.raises(DataError, match="changed while"):
        training_data(data, RULES, tokenizer)
    assert not list((large.tokens_folder()).glob("*/set.json"))


def test_tokens_that_no_run_asks_for_are_shown_and_go_when_told(
    world: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "gc"]) == 0 and "tokens of 0 sets" in capsys.readouterr().out
    said: list[str] = []
    old, _ = [
        read(world, tokenizer, said.append, validation_share=share)[1] for share in (0.2, 0.3)
    ]
    first, second = [Path(line.rpartition(" ")[2]) for line in said if "into files once" in line]
    month_ago = time.time() - 31 * 24 * 3600
    for folder in (first, second):
        os.utime(folder / "set.json", (month_ago, month_ago))
    read(world, tokenizer, validation_share=0.3)  # found: asked for now
    assert main(["data", "gc", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    size = sum(file.stat().st_size for file in first.rglob("*") if file.is_file())
    (one,) = told["sets"]
    assert (one["folder"], one["bytes"], told["bytes"], told["removed"]) == (
        str(first),
        size,
        size,
        False,
    )
    assert one["files"] == [str(world / "a.jsonl")] and 30.9 < one["days"] < 31.1
    assert main(["data", "gc", "--days", "7"]) == 0
    assert "To delete them: veneer data gc --days 7 --yes\n" in capsys.readouterr().out
    assert main(["data", "gc", "--days", "32", "--yes"]) == 0 and first.is_dir()
    with locked(lock_of(first)):  # another process builds it
        assert main(["data", "gc", "--yes"]) == 0 and first.is_dir()
    before = plain(old.train[:5])
    assert main(["data", "gc", "--yes"]) == 0
    assert not first.exists() and second.is_dir() and not lock_of(first).exists()
    assert sorted(path.name for path in first.parent.iterdir()) == sorted(
        [second.name, lock_of(second).name]
    )
    assert plain(old.train[:5]) == before  # whoever has opened them reads on
    assert main(["data", "gc", "--days", "0", "--yes"]) == 0 and not second.exists()
    read(world, tokenizer, said.append)
    assert "into files once" in said[-2]


def test_rows_that_cannot_be_trained_on_are_refused_as_in_memory(
    world: Path, tokenizer: Any
) -> None:
    with pytest.raises(DataError) as in_memory:
        load_data(
            DataConfig.of({"train": str(world / "a.jsonl")}), replace(RULES, length=20), tokenizer
        )
    with pytest.raises(DataError) as in_files:
        training_data(
            DataConfig.of({"train": str(world / "a.jsonl"), "tokens": "files"}),
            replace(RULES, length=20),
            tokenizer,
        )
    assert str(in_files.value) == str(in_memory.value)


def run_of(world: Path, out: Path, tokens: str, **fields: Any) -> RunConfig:
    data = {"train": str(world / "a.jsonl"), "validation_share": 0.2, "tokens": tokens}
    own = {
        "base": str(world / "base"),
        "data": data,
        "out": str(out),
        "steps": 4,
        "batch": 4,
        "evaluate_every": 2,
    }
    return RunConfig.of({**own, **fields})


def test_a_run_learns_the_same_bits_and_resumes_from_either(world: Path, tmp_path: Path) -> None:
    for tokens in ("memory", "files"):
        run_training(run_of(world, tmp_path / tokens, tokens), resume=False, screen=QuietScreen())
    with ended_before_step(2):
        run_training(
            run_of(world, tmp_path / "parts", "memory"), resume=False, screen=QuietScreen()
        )
    file = tmp_path / "parts" / "run.yaml"
    file.write_text(file.read_text().replace("tokens: memory", "tokens: files"))
    assert main(["train", "--resume", str(tmp_path / "parts"), "--quiet"]) == 0
    found = [
        load_file(tmp_path / n / "adapter" / "adapter_model.safetensors")
        for n in ("memory", "files", "parts")
    ]
    for other in found[1:]:
        assert all((found[0][name] == other[name]).all() for name in found[0])
    losses = [
        [
            json.loads(line).get("loss")
            for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()
        ]
        for n in ("memory", "files")
    ]
    assert losses[0] == losses[1]


def test_a_run_that_an_earlier_version_began_goes_on_with_the_rows_that_it_held_out(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(world, tmp_path / "run", "memory")
    with monkeypatch.context() as earlier, ended_before_step(2):
        earlier.setattr(prepare, "HELD_OUT_BY", BY_THRESHOLD)
        run_training(config, resume=False, screen=QuietScreen())
    states = list((tmp_path / "run" / "checkpoints").rglob("state.json"))
    for file in states:
        state = json.loads(file.read_text())
        assert state["origin"].pop("held_out_by") == BY_THRESHOLD
        file.write_text(json.dumps(state))
        write_manifest(file.parent)
    assert states and main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    run_training(run_of(world, tmp_path / "now", "memory"), resume=False, screen=QuietScreen())
    started = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])[
            "validation_rows"
        ]
        for name in ("run", "now")
    ]
    assert started[0] != started[1] == 8


@pytest.mark.parametrize("kept", [True, False])
def test_under_exact_sums_a_run_goes_on_with_as_many_rows_at_once_as_it_began_with(
    world: Path, tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kept: whether the version that began the run wrote the number into its checkpoints."""

    def run(name: str) -> RunConfig:
        return run_of(world, tmp_path / name, "memory", reduce="exact", batch=8)

    with monkeypatch.context() as earlier:
        earlier.setattr(config_module, "EXACT_PARTS", 1)  # all of a batch at once
        run_training(run("whole"), resume=False, screen=QuietScreen())
        with ended_before_step(2):
            run_training(run("run"), resume=False, screen=QuietScreen())
    for file in (tmp_path / "run" / "checkpoints").rglob("state.json"):
        state = json.loads(file.read_text())
        assert state["origin"]["rows_at_once"] == 8
        if not kept:
            del state["origin"]["rows_at_once"]
        file.write_text(json.dumps(state))
        write_manifest(file.parent)
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    run_training(run("now"), resume=False, screen=QuietScreen())
    whole, resumed, now = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "run", "now")
    )
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert any((whole[name] != now[name]).any() for name in whole)


@pytest.mark.parametrize("tokens", ["memory", "files"])
def test_a_run_that_an_earlier_version_began_goes_on_with_rows_that_are_now_refused(
    world: Path, tmp_path: Path, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": f"is {n} odd", "completion": f"it is {n}", "label": n % 2 == 0}
        for n in range(12)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = run_of(world, tmp_path / "run", tokens).model_copy(
        update={"data": DataConfig.of({"train": str(tmp_path / "a.jsonl"), "tokens": tokens})}
    )
    with monkeypatch.context() as earlier, ended_before_step(2):
        earlier.setattr(KtoLabels, "problems", lambda self: iter(()))
        run_training(config, resume=False, screen=QuietScreen())
    shutil.rmtree(
        tmp_path / "cache", ignore_errors=True
    )  # as the earlier version's are under another name
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    with pytest.raises(DataError, match="D116"):
        run_training(
            config.model_copy(update={"out": str(tmp_path / "new")}),
            resume=False,
            screen=QuietScreen(),
        )


def test_a_run_that_took_equal_neighbours_for_one_row_is_refused_and_one_without_goes_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that became several examples, by a template that keeps the reasoning of the last answer
    alone."""
    base = shutil.copytree(world / "base", tmp_path / "base")
    tokenizer = load_base(str(base)).tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content if loop.last or m.role =="
        " 'user' else '<|im_start|>' + m.role + m.content.split('</think>')[-1] }}{{ '<|im_end|>'"
        " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    tokenizer.save_pretrained(base)
    answers = ("<think>hm</think>b", "<think>oh</think>d")
    rows = [
        {
            "messages": [
                {"role": r, "content": f"{n}"} if r == "user" else {"role": r, "content": a}
                for a in answers
                for r in ("user", "assistant")
            ]
        }
        for n in range(4)
    ]
    for name, wanted in (("equal", [rows[0], *rows]), ("apart", rows)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in wanted))
        fields = {
            "base": str(base),
            "data": {"train": str(file), "validation_share": 0},
            "steps": 4,
            "batch": 2,
        }
        config = RunConfig.of(
            {**fields, "out": str(tmp_path / name), "evaluate_every": 1, "method": {"name": "lora"}}
        )
        with ended_before_step(3):
            run_training(config, resume=False, screen=QuietScreen())
        for path in (tmp_path / name / "checkpoints").rglob("state.json"):
            state = json.loads(path.read_text())
            assert state["origin"].pop("rows_by") == "number"
            path.write_text(json.dumps(state))
            write_manifest(path.parent)
        assert main(["train", "--resume", str(tmp_path / name), "--quiet"]) == (
            2 if name == "equal" else 0
        )
    said = capsys.readouterr().err
    assert (
        "took equal neighbouring rows for one" in said
        and "equal.jsonl:2 repeats the row before it" in said
    )


def test_equal_neighbours_are_found_in_memory_and_in_files(tmp_path: Path) -> None:
    ids, trained = np.arange(4, dtype=np.int32), np.arange(4) > 1
    numbers = [
        (None, 5),
        (None, 5),
        (0, 7),
        (0, 8),
        (1, 7),
        (1, 8),
        (2, 9),
        (None, 9),
        (3, 7),
        (3, 8),
        (4, 7),
    ]
    examples = [Example(ids, trained, RowRef("r", 1), key, row=row) for row, key in numbers]
    writer = ExampleWriter(tmp_path)
    writer.add(examples)
    writer.close()
    assert equal_neighbours(examples) == equal_neighbours(StoredExamples(tmp_path)) == [4, 10]
    assert equal_neighbours([]) == equal_neighbours(examples[:1]) == []


def test_the_plan_of_an_epoch_is_its_list_and_its_micro_batches_are_spans_of_it() -> None:
    lengths = np.random.Generator(np.random.Philox(key=[1, 2])).integers(1, 90, 1003)
    for order in ("bucketed", "shuffled", "file"):
        asked: dict[str, Any] = {"batch": 8, "seed": 3, "epoch": 1, "order": order}
        plan = plan_epoch(lengths, **asked)
        listed = [*plan]
        assert [plan[i] for i in range(len(plan))] == listed and plan[-1] == listed[-1]
        parts = [
            rows[start : start + 3] for rows in listed[:40] for start in range(0, len(rows), 3)
        ]
        assert [plan.rows[start:stop].tolist() for start, stop in plan.spans(3, 40)] == parts
        assert sorted(row for rows in listed for row in rows) == list(range(1003))


def test_examples_come_back_from_files_as_they_were_written(tmp_path: Path) -> None:
    generator = np.random.Generator(np.random.Philox(key=[3, 4]))
    made = []
    for n in range(5000):
        size = int(generator.integers(1, 20))
        trained = generator.random(size) < 0.3
        trained[-1] = True
        ids = generator.integers(0, 2**31 - 1, size).astype(np.int32)
        made.append(
            Example(
                ids, trained, RowRef(f"f{n % 3}", n), n * 2**40, row=n // 2 if n > 4000 else None
            )
        )
    writer = ExampleWriter(tmp_path)
    for start in range(0, len(made), 7):
        writer.add(made[start : start + 7])
    writer.close()
    found = StoredExamples(tmp_path)
    assert plain(found) == plain(made) and len(found) == len(made)
    assert plain(found[-3:]) == plain(made[-3:]) and found.lengths.tolist() == [
        len(e.ids) for e in made
    ]
    assert plain([found[-1]]) == plain([made[-1]])
    ours, theirs = RowSpans.of(found), RowSpans.of(made)
    assert [*ours.starts] == [*theirs.starts] and [*ours.lengths] == [*theirs.lengths]
    learnt = [replace(e, trained=np.ones(len(e.ids), dtype=np.bool_)) for e in made]
    assert (
        len(representative_examples(learnt)) == len(made)
        and len(representative_examples(found)) < 2100
    )
    with pytest.raises(IndexError):
        found[len(made)]
