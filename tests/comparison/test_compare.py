"""A comparison: real runs on a tiny base, found again; what it says in words; what cannot be
run."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import veneer
from tests.support.helpers import files_limited_to
from tests.support.models.reasoning import conversation, reasoning_tokenizer
from tests.support.tiny import save_tiny
from veneer.adapters.config import DoRA, Full, LoRA, MethodConfig, Prefix
from veneer.cli.training.compare import _comparison_table
from veneer.comparison import environment
from veneer.comparison.comparison import resolved
from veneer.comparison.conclusion import conclude
from veneer.comparison.environment import find_environment
from veneer.comparison.execute import JobRunner
from veneer.comparison.figures import Measure, _differences, _figure
from veneer.comparison.jobs import CommandJob, JobGenerator, Outcome, run_jobs, run_together
from veneer.comparison.local import LocalExecutor
from veneer.comparison.pace import Pace
from veneer.comparison.page import make_page
from veneer.comparison.plan import Candidate, Comparison, prepare_rows
from veneer.comparison.search import search
from veneer.data.examples import prompt_key
from veneer.data.files.sources import read_rows
from veneer.errors import DataError, InputError, VeneerError
from veneer.evaluation.metrics.metric import ratio
from veneer.evaluation.predictions import read_predictions
from veneer.files.lock import BusyError
from veneer.models.load import load_base
from veneer.report.scatter import ScatterMark, scatter_chart
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.state.place import locked_folder


def write_rows(file: Path, count: int, start: int = 0) -> Path:
    lines = [
        json.dumps(
            {"prompt": f"number {n}", "completion": f"it is {n} <b>", "references": ["seven"]}
        )
        for n in range(start, start + count)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


class KeptExecutor(LocalExecutor):
    """Keeps its process, which has imported everything, for the next comparison."""

    def stop(self) -> None:
        self._waiting.clear()


@pytest.fixture(scope="module")
def here() -> Iterator[KeptExecutor]:
    executor = KeptExecutor()
    yield executor
    executor._end_server()


@pytest.fixture(scope="module")
def compared(
    tmp_path_factory: pytest.TempPathFactory, here: KeptExecutor
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(folder, arguments, figures) of one comparison."""
    folder = tmp_path_factory.mktemp("compare")
    base = save_tiny(folder / "base")
    train, validation, test = (
        write_rows(folder / f"{name}.jsonl", count, start)
        for name, count, start in (("train", 8, 0), ("validation", 3, 20), ("test", 4, 40))
    )
    (folder / "general.txt").write_text("A text.\n---\nAnother text.\n")
    arguments: dict[str, Any] = {
        "base": str(base),
        "data": str(train),
        "validation": str(validation),
        "test": str(test),
        "steps": 2,
        "rates": (1.0,),
        "seeds": 1,
        "metrics": ("rougeL",),
        "max_new_tokens": 4,
        "out": folder / "out",
        "general": str(folder / "general.txt"),
        "place": here,
    }
    return folder, arguments, veneer.compare(["full", "lora"], **arguments)


def test_the_figures_hold_what_every_method_costs_and_gives(compared: Any) -> None:
    folder, _, figures = compared
    assert json.loads(json.dumps(figures)) == figures
    assert [m["name"] for m in figures["methods"]] == ["full", "lora"]
    assert figures["primary"] == "rougeL" and figures["test_rows"] == 4 and figures["new_runs"] == 2
    for method in figures["methods"]:
        assert set(method["quality"]) == {"rougeL", "loss"} == set(figures["untuned"])
        low, high = method["quality"]["loss"]["interval"]
        assert low <= method["quality"]["loss"]["value"] <= high
        assert method["steps"] == 2 and len(method["curve"]) >= 2
        assert method["forgetting"]["value"] != 0
        assert all((folder / "out" / run / "summary.json").is_file() for run in method["runs"])
        assert not any(Path(run).is_absolute() for run in method["runs"])
        records = read_records(folder / "out" / method["runs"][0] / "metrics.jsonl")
        assert not any(
            r["sample"] for r in records if r["kind"] == "evaluation"
        )  # answers cost, and nobody reads them
        for cost in ("trainable_parameters", "peak_memory_bytes", "adapter_bytes", "seconds"):
            assert method[cost] > 0
    full, lora = figures["methods"]
    assert full["trainable_parameters"] == full["total_parameters"] > lora["trainable_parameters"]
    assert (
        figures["methods"][0 if figures["best"] == "full" else 1]["to_best"]["loss"]["difference"]
        == 0
    )
    assert figures["full"] == "full" and full["to_full"]["loss"]["difference"] == 0
    ours, theirs = (m["quality"]["loss"]["value"] for m in (lora, full))
    assert lora["to_full"]["loss"]["difference"] == pytest.approx(ours - theirs)


def test_the_page_shows_every_method_and_loads_nothing(compared: Any) -> None:
    folder, _, figures = compared
    page = (folder / "out" / "comparison.html").read_text("utf-8")
    for text in ("full", "lora", "Forgetting", "against peak memory", *figures["conclusion"]):
        assert text.replace("'", "&#x27;") in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_what_is_finished_is_found_again_and_only_what_is_new_runs(compared: Any) -> None:
    folder, arguments, figures = compared
    before = {
        path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").rglob("summary.json")
    }
    again = veneer.compare(["full", "lora"], **arguments)
    assert again["new_runs"] == 0
    assert {
        path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").rglob("summary.json")
    } == before
    assert again["methods"] == figures["methods"]
    lora = next(m for m in figures["methods"] if m["name"] == "lora")
    (folder / "out" / lora["runs"][0] / "summary.json").unlink()  # as if it had been stopped
    assert veneer.compare(["full", "lora"], **arguments)["new_runs"] == 1


def test_a_method_whose_values_on_the_test_rows_are_not_finite_has_diverged(
    compared: Any, tmp_path: Path
) -> None:
    folder, arguments, figures = compared
    lora = next(m for m in figures["methods"] if m["name"] == "lora")
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    adapter = out / lora["runs"][0] / "adapter"
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.full_like(t, 1e30) for name, t in load_file(file).items()}, file)
    (adapter / "veneer.json").unlink()  # its hash is of other values
    for _ in range(2):  # the second finds what the first wrote
        again = veneer.compare(["full", "lora"], **{**arguments, "out": out})
        full, failed = again["methods"]
        assert failed["failure"] == "diverged" and not failed["quality"]
        assert again["new_runs"] == 0 and again["best"] == "full" and full["quality"]
        assert any(
            "lora is not in the comparison: diverged" in line for line in again["conclusion"]
        )
    assert (
        "is not finite" in json.loads((adapter.parent / "evaluation.json").read_text())["message"]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of this kind is Linux's")
def test_a_full_disk_ends_a_comparison_and_is_no_result_of_a_method(compared: Any) -> None:
    """Exit code 3 is memory, which is a result, and the disk, which is none. Checkpoints are above
    the limit here."""
    folder, arguments, _ = compared
    with files_limited_to(30_000), pytest.raises(VeneerError, match="files that large") as told:
        veneer.compare(["lora", "full"], **{**arguments, "steps": 3, "place": None})
    assert told.value.exit_code == 3
    assert not list((folder / "out").rglob("failure.json"))


def test_another_base_in_the_same_place_is_evaluated_and_trained_anew(
    compared: Any, here: KeptExecutor, tmp_path: Path
) -> None:
    _, arguments, _ = compared
    base, test = save_tiny(tmp_path / "base"), Path(arguments["test"])
    candidates = [
        Candidate(name, RunConfig(base=str(base), data=str(test), method=name, out="o"))  # type: ignore[arg-type]
        for name in ("lora", "full")
    ]
    asked = Comparison(candidates, str(base), test, test, test, tmp_path / "out", general=None)

    def worker() -> JobRunner:
        return JobRunner(asked, environment.circumstances(str(base)), lambda text: None, [])

    def evaluated() -> dict[str, Any]:
        return run_jobs(worker().evaluate("the base", None), here, lambda text: None)

    first, key = evaluated(), worker()._key(candidates[0].config)
    assert evaluated() == first  # found
    save_tiny(base, seed=1)
    assert evaluated()["loss"] != first["loss"]
    assert worker()._key(candidates[0].config) != key
    save_tiny(base)
    assert worker()._key(candidates[0].config) == key


def test_what_figures_depend_on_is_told_apart(
    compared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, arguments, _ = compared
    here = environment.circumstances(arguments["base"])
    assert here == environment.circumstances(arguments["base"])
    monkeypatch.setattr(environment, "version", lambda name: "99")
    assert environment.circumstances(arguments["base"]) != here


def test_a_second_comparison_in_one_folder_and_a_run_that_outlived_its_own_are_refused(
    compared: Any,
) -> None:
    folder, arguments, figures = compared
    run = folder / "out" / figures["methods"][1]["runs"][0]
    summary = (run / "summary.json").read_text()
    context = multiprocessing.get_context("fork")
    for place in (folder / "out", run):
        (run / "summary.json").unlink(missing_ok=True)
        holds, over = context.Event(), context.Event()

        def hold(place: Path = place, holds: Any = holds, over: Any = over) -> None:
            with locked_folder(place):
                holds.set()
                over.wait(60)

        other = context.Process(target=hold)
        other.start()
        try:
            assert holds.wait(60)
            with pytest.raises(BusyError, match="busy"):
                veneer.compare(["full", "lora"], **arguments)
        finally:
            over.set()
            other.join()
    assert (run / "adapter").is_dir()
    (run / "summary.json").write_text(summary)


def test_a_method_that_is_unknown_is_told_before_anything_runs(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 30)
    command = [
        sys.executable,
        "-m",
        "veneer.cli.main",
        "compare",
        "--base",
        "b",
        "--data",
        str(rows),
        "--methods",
        "lora,loro",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "loro" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"candidates": ["lora"]}, "at least two"),
        ({"steps": 5, "seconds": 5.0}, "either steps or seconds"),
        ({"rates": (0.0, 1.0)}, "factor is"),
        ({"metrics": ("blue",)}, "unknown metrics"),
        ({"labels": "one"}, "1 labels"),
        ({"general": "not there.txt"}, "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    rows = str(write_rows(tmp_path / "rows.jsonl", 4))
    arguments = {
        "candidates": ["lora", "full"],
        "base": "b",
        "data": rows,
        "validation": rows,
        "test": rows,
        "out": tmp_path / "out",
    }
    with pytest.raises(InputError, match=message):
        veneer.compare(**{**arguments, **changed})
    assert not (tmp_path / "out").exists()


def test_labels_are_what_accuracy_chooses_from_where_it_is_not_asked_for_too(
    tmp_path: Path,
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", 4)
    shared = {"base": "b", "data": str(file), "out": "o"}
    candidates = [
        Candidate(name, RunConfig.of({**shared, "method": name})) for name in ("lora", "full")
    ]

    def measured(*metrics: str, labels: str | None) -> list[str]:
        comparison = Comparison(
            candidates, "b", file, file, file, tmp_path, metrics=metrics, labels=labels
        )
        return [metric.name for metric in comparison.found]

    assert measured(labels="a,b") == ["accuracy"] and measured(labels=None) == []
    assert measured("rougeL", labels="a,b") == ["rougeL", "accuracy"]
    assert measured("accuracy", "rougeL", labels="a,b") == ["accuracy", "rougeL"]


def test_rows_without_files_of_their_own_are_divided_by_their_prompts(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 200)
    prepared = prepare_rows(str(data), None, None, "auto", tmp_path / "out")
    files = [prepared.train, prepared.validation, prepared.test]
    sides = [{row.messages[0]["content"] for row in read_rows(file)} for file in files]
    assert sum(map(len, sides)) == 200 == len(set.union(*sides))
    assert len(sides[0]) > 100 and all(15 <= len(side) <= 50 for side in sides[1:])
    assert read_rows(files[2])[0].references == ("seven",)
    with pytest.raises(DataError, match="too small"):
        prepare_rows(
            str(write_rows(tmp_path / "few.jsonl", 2)), None, None, "auto", tmp_path / "out"
        )


LAYOUTS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "say {}", "output": "it is {}", "prompt": "x", "completion": "y"},
    "prompt_completion": {"prompt": "say {}", "completion": "it is {}", "system": "Be brief."},
    "chat": {
        "messages": [
            {"role": "user", "content": "say {}"},
            {"role": "assistant", "content": "it is {}"},
        ]
    },
    "text": {"text": "number {}"},
}


@pytest.mark.parametrize("given", [(), ("validation",), ("test",)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_are_split_off_are_read_again_as_what_they_were(
    tmp_path: Path, layout: Any, given: tuple[str, ...]
) -> None:
    """Written as chat under a format that says alpaca, they could not be read; nor as chat without
    a chat template."""
    lines = [json.dumps(LAYOUTS[layout]).replace("{}", str(n)) for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    named = {
        name: str(tmp_path / "rows.jsonl") if name in given else None
        for name in ("validation", "test")
    }
    files = prepare_rows(str(tmp_path / "rows.jsonl"), format=layout, out=tmp_path / "out", **named)
    candidate = Candidate(
        "lora", RunConfig(base="b", data={"train": "x", "format": layout}, out="o")
    ).over(files)  # type: ignore[arg-type]
    data = candidate.config.data
    assert (data.train, data.validation, data.format) == (
        str(files.train),
        str(files.validation),
        "auto",
    )
    expected = {
        json.dumps(row.messages or row.text) for row in read_rows(tmp_path / "rows.jsonl", layout)
    }
    found = [read_rows(file, data.format) for file in (files.train, files.validation, files.test)]
    assert {json.dumps(row.messages or row.text) for side in found for row in side} == expected
    assert {row.format for side in found for row in side} == {
        "chat" if layout == "alpaca" else layout
    }


PAIRS: dict[str, dict[str, Any]] = {
    "pairs": {
        "prompt": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "say {}"},
        ],
        "chosen": "it is {}",
        "rejected": "no",
    },
    "openai_pairs": {
        "input": {"messages": [{"role": "user", "content": "say {}"}]},
        "preferred_output": [{"role": "assistant", "content": "it is {}"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    },
    "ranked": {"prompt": "say {}", "ranked": ["it is {}", "it", "no"]},
}


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_that_are_split_off_keep_their_answers_and_share_no_prompt(
    tmp_path: Path, layout: Any
) -> None:
    source = tmp_path / "rows.jsonl"
    lines = [json.dumps(PAIRS[layout]).replace("{}", str(n // 2)) for n in range(60)]
    source.write_text("\n".join(lines))
    files = prepare_rows(str(source), None, None, layout, tmp_path / "out", None, "pairs")
    sides = [read_rows(file, kind="pairs") for file in (files.train, files.validation, files.test)]
    answers = {
        json.dumps([row.messages, row.others]) for row in read_rows(source, layout, kind="pairs")
    }
    assert {json.dumps([row.messages, row.others]) for side in sides for row in side} == answers
    prompts = [{prompt_key(row) for row in side} for side in sides]
    assert sum(map(len, prompts)) == 30 == len(set.union(*prompts))


def test_what_a_prompt_says_is_not_learnt_after_it_was_split_off_either(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"prompt": [*turns, {"role": "user", "content": "{}"}], "completion": [turns[1]]}
    lines = [json.dumps(row).replace("{}", str(n)) for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    files = prepare_rows(str(tmp_path / "rows.jsonl"), None, None, "auto", tmp_path / "out")
    weights = [[m.get("weight", 1) for m in row.messages] for row in read_rows(files.train)]
    assert weights == [[1, 0, 1, 1]] * len(weights)


def test_rows_are_never_split_off_over_the_file_that_they_are_in(tmp_path: Path) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    data = write_rows(tmp_path / "out" / "data" / "train.jsonl", 60)
    before = data.read_bytes()
    with pytest.raises(DataError, match="written over"):
        prepare_rows(str(data), None, None, "auto", tmp_path / "out")
    assert data.read_bytes() == before


def test_a_run_without_a_held_out_loss_is_told(here: KeptExecutor, tmp_path: Path) -> None:
    """All held-out rows may be too long, and left out as the settings say."""
    base = save_tiny(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "q" * 200, "completion": "a"}) + "\n")
    config = {
        "base": str(base),
        "data": {"train": str(rows), "long_rows": "drop"},
        "length": 100,
        "out": "o",
    }
    with pytest.raises(DataError, match=r"lora, lr .* no held-out loss"):
        veneer.compare(
            [("lora", RunConfig(**config)), ("full", RunConfig(**config, method="full"))],  # type: ignore[arg-type]
            validation=str(long),
            test=str(rows),
            rates=(1.0,),
            steps=1,
            seeds=1,
            out=tmp_path / "out",
            general=str(rows),
            place=here,
        )


def test_a_conversation_that_becomes_an_example_for_each_answer_is_one_row(
    here: KeptExecutor, tmp_path: Path
) -> None:
    """Its figures are those of the evaluations, and a row is shown with its own last answer."""
    base = save_tiny(tmp_path / "base")
    reasoning_tokenizer().save_pretrained(base)

    def written(name: str, *turns: int) -> str:
        rows = [
            {"messages": conversation(count, reasons=True, tools=False, system=True)}
            for count in turns
        ]
        lines = [json.dumps(row).replace("question", name + str(n)) for n, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        return str(tmp_path / f"{name}.jsonl")

    figures = veneer.compare(
        ["lora", "full"],
        base=str(base),
        data=written("train", 1, 2),
        validation=written("validation", 1),
        test=written("test", 2, 1, 3),
        steps=1,
        rates=(1.0,),
        seeds=1,
        metrics=("rougeL",),
        max_new_tokens=4,
        out=tmp_path / "out",
        general=written("general", 1, 1),
        place=here,
    )
    assert figures["test_rows"] == 3 == len(figures["disagreements"])
    for method in figures["methods"]:
        run = tmp_path / "out" / method["runs"][0]
        reported = json.loads((run / "evaluation.json").read_text())
        assert reported["rows"] == 3 and method["quality"]["loss"]["value"] == reported["loss"]
        ends = reported["intervals"]["loss"]
        assert method["quality"]["loss"]["interval"] == pytest.approx(ends)
        lines = read_predictions(run / "predictions.jsonl")
        assert len(lines) == 6
        last = {int(line["row"][-1]): line["answer"] for line in lines}
        for row in figures["disagreements"]:
            assert row["answers"][method["name"]]["text"] == last[int(row["row"][-1])]


def test_methods_are_compared_over_pairs_by_the_preferred_answers(
    compared: Any, here: KeptExecutor, tmp_path: Path
) -> None:
    _, arguments, _ = compared
    rows = [{"prompt": f"q {n // 2}", "chosen": f"yes {n}", "rejected": "no"} for n in range(60)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    shared: dict[str, Any] = {
        "base": arguments["base"],
        "data": str(data),
        "out": "o",
        "objective": {"name": "dpo", "beta": 0.5},
    }
    candidates = [
        (f"r{rank}", RunConfig.of({**shared, "method": {"name": "lora", "rank": rank}}))
        for rank in (2, 4)
    ]
    figures = veneer.compare(
        candidates,
        out=tmp_path / "out",
        steps=3,
        seeds=1,
        rates=(30.0,),
        general=arguments["general"],
        place=here,
    )
    assert figures["primary"] == "accuracy"
    assert figures["units"] == {"accuracy": "share", "likelier": "share", "loss": "nats"}
    untuned = figures["untuned"]
    assert untuned["accuracy"]["value"] == 0.5
    assert untuned["loss"]["value"] == pytest.approx(np.log(2))
    for method in figures["methods"]:
        run = tmp_path / "out" / method["runs"][0]
        reported = json.loads((run / "evaluation.json").read_text())
        accuracy, loss = method["quality"]["accuracy"], method["quality"]["loss"]
        assert accuracy["seeds"][0] == pytest.approx(reported["accuracy"])
        assert accuracy["value"] > 0.5 and loss["value"] < untuned["loss"]["value"]
        assert accuracy["interval"][0] <= accuracy["value"] <= accuracy["interval"][1]
        assert loss["interval"] is not None and method["forgetting"] is not None
    assert "has the best accuracy" in " ".join(figures["conclusion"])
    assert (
        "share of rows whose preferred answer is likelier"
        in (tmp_path / "out" / "comparison.html").read_text("utf-8").lower()
    )


@pytest.mark.parametrize(
    ("objectives", "changed", "message"),
    [
        (["classify", "classify"], {}, "objective classify cannot be compared"),
        (["dpo", "answers"], {}, "learn from the same rows"),
        (["dpo", "orpo"], {"metrics": ("rougeL",)}, "leave metrics and labels out"),
    ],
)
def test_objectives_that_cannot_be_compared_are_refused_by_name(
    tmp_path: Path, objectives: list[str], changed: dict[str, Any], message: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    shared = {"base": "b", "data": str(rows), "out": "o"}
    candidates = [
        (str(number), RunConfig.of({**shared, "objective": name}))
        for number, name in enumerate(objectives)
    ]
    with pytest.raises(InputError, match=message):
        veneer.compare(
            candidates, out=tmp_path / "out", validation=str(rows), test=str(rows), **changed
        )


# --- the search ---


class Losses:
    """Stands in for the worker: a loss for each learning rate, and no process."""

    shares_forwards = False

    def __init__(self, losses: dict[float, float | None], *, extend: int) -> None:
        self.losses, self.dropped, self.asked, self.pace = losses, [], [], Pace(3)
        self.said: list[str] = []
        self.say = self.said.append
        self.comparison = type("C", (), {"factors": (1 / 3, 1.0, 3.0), "extend": extend})()

    def train(
        self, candidate: Any, *, rate: float, seed: int, steps: int, with_result: bool
    ) -> JobGenerator[Any]:
        self.asked.append(rate)
        config = candidate.config.model_copy(update={"learning_rate": rate})
        yield from ()
        return type("D", (), {"loss": self.losses[rate], "config": config, "failure": None})()

    def drop_result(self, done: Any) -> None:
        self.dropped.append(done.config.learning_rate)


CANDIDATE = Candidate("lora", RunConfig(base="b", data="d", out="o", learning_rate=3e-4))  # type: ignore[arg-type]


def searched(worker: Losses, candidate: Candidate) -> Any:
    return run_jobs(search(worker, candidate, 5), LocalExecutor(), lambda text: None)  # type: ignore[arg-type]


def test_the_search_goes_on_where_the_best_rate_lies_at_an_end() -> None:
    worker = Losses({1e-4: 3.0, 3e-4: 2.0, 9e-4: 1.0, 2.7e-3: 0.5}, extend=1)
    tried, best = searched(worker, CANDIDATE)
    assert best is not None and tried[best][0] == 2.7e-3
    assert worker.asked == [1e-4, 3e-4, 9e-4, 2.7e-3] and 2.7e-3 not in worker.dropped
    assert worker.said == [
        "lora did best at the highest learning rate tried, 0.0009: one more run tries a"
        " rate beyond it (--extend 0: none)"
    ]
    assert worker.pace.line("x") == "run 1 of 4 · x"  # it was 3


def test_a_search_whose_best_rate_lies_inside_or_may_not_go_on_says_nothing() -> None:
    for losses, extend in (
        ({1e-4: 3.0, 3e-4: 1.0, 9e-4: 2.0}, 1),
        ({1e-4: 1.0, 3e-4: 2.0, 9e-4: 3.0}, 0),
    ):
        worker = Losses(dict(losses), extend=extend)
        assert searched(worker, CANDIDATE)[1] is not None and not worker.said


def test_the_default_rate_of_each_method_is_the_one_of_a_run(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "base"))
    methods: list[MethodConfig] = [LoRA(), DoRA(lr_ratio=2), Full(), Prefix()]
    configs = [
        RunConfig(base=folder, data="d", out="o", method=method)  # type: ignore[arg-type]
        for method in methods
    ]
    configs.append(configs[0].model_copy(update={"learning_rate": 0.01}))
    base = load_base(folder)
    rates = find_environment(folder, configs).rates
    assert rates == [config.resolved(base, rows=9).learning_rate for config in configs]
    assert rates[-1] == 0.01 and len(set(rates)) == 5


def test_the_search_starts_at_the_default_of_this_base() -> None:
    config = RunConfig(base="b", data="d", out="o")  # type: ignore[arg-type]
    candidate = resolved(Candidate("lora", config), "float32", 1.3e-3)
    assert candidate.config.method == LoRA(lr_ratio=4.0)  # as where no rate is given
    worker = Losses({4.33e-4: 3.0, 1.3e-3: 1.0, 3.9e-3: 2.0}, extend=0)
    assert searched(worker, candidate)[1] == 1
    assert worker.asked == [4.33e-4, 1.3e-3, 3.9e-3]


def test_the_search_stops_inside_and_passes_over_what_diverged() -> None:
    worker = Losses({1e-4: 3.0, 3e-4: 2.0, 9e-4: None}, extend=5)
    tried, best = searched(worker, CANDIDATE)
    assert best == 1 and len(tried) == 3
    nothing = Losses({1e-4: None, 3e-4: None, 9e-4: None}, extend=5)
    assert searched(nothing, CANDIDATE)[1] is None


# --- what is asked at once ---


class Pretended(LocalExecutor):
    """In the order of `LocalExecutor`, without a process: each command ends at once."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def wait_for_job(self, say: Any) -> tuple[CommandJob, Outcome]:
        job = self._waiting.popleft()
        self.ran.append(job.label)
        return job, Outcome(0, job.label, "", ())


def asked(*names: str) -> JobGenerator[str]:
    said = ""
    for name in names:
        _, outcome = yield [CommandJob(name, Path(), (), CANDIDATE.config)]
        said += outcome.out
    return said


def test_what_is_asked_together_is_answered_in_order_and_the_first_is_finished_first() -> None:
    place = Pretended()
    first = run_together([asked("a", "b"), asked(), asked("c")])
    assert run_jobs(run_together([first, asked("d", "e")]), place, lambda text: None) == [
        ["ab", "", "c"],
        "de",
    ]
    assert place.ran == ["a", "b", "c", "d", "e"]


# --- words ---


def method(name: str, value: float, to_best: tuple[float, float], **fields: Any) -> dict[str, Any]:
    figure = {"value": value, "interval": [value - 0.05, value + 0.05]}
    return {
        "name": name,
        "folds": True,
        "instead_of_folding": "",
        "failure": None,
        "learning_rate": 1e-4,
        "quality": {"exact_match": figure},
        "search": [],
        "curve": [[0, 2.0], [5, 1.0]],
        "trainable_parameters": 1000,
        "total_parameters": 9000,
        "peak_memory_bytes": 10**9,
        "adapter_bytes": 10**6,
        "seconds": 60.0,
        "to_best": {"exact_match": {"difference": sum(to_best) / 2, "interval": list(to_best)}},
        "forgetting": {"value": 0.1, "interval": [0.05, 0.15]},
        **fields,
    }


def test_on_the_screen_80_columns_hold_every_figure_and_a_failure_is_named() -> None:
    slow = method(
        "bottleneck",
        0.744,
        (-0.1, 0.1),
        seconds=4000.0,
        trainable_parameters=134_515_008,
        adapter_bytes=272_590_000,
    )
    failed = method("qlora", 0.1, (-0.1, 0.1), failure="diverged")
    console = Console(width=80, file=io.StringIO())
    console.print(_comparison_table(figures_of(slow, failed, best="bottleneck")))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "…" not in shown
    assert lines[2] == "bottleneck 74.4% 69.4% to 79.4% 0.0001 135 M 1.00 GB 1:06:40 273 MB +0.10"
    assert lines[3] == "qlora failed"


def figures_of(*methods: dict[str, Any], best: str) -> dict[str, Any]:
    return {
        "methods": list(methods),
        "best": best,
        "full": None,
        "primary": "exact_match",
        "units": {"exact_match": "share"},
        "test_rows": 50,
        "seeds": 3,
        "untuned": {"exact_match": {"value": 0.0, "interval": [0.0, 0.1]}},
        "untuned_general": 3.0,
        "budget": {"steps": 5, "seconds": None},
        "base": "b",
        "disagreements": [],
        "conclusion": [],
    }


def test_rows_with_the_same_prompt_are_one_observation_of_quality_and_difference() -> None:
    counts = np.stack([np.repeat([1.0, 0.0, 1.0, 1.0], 5), np.ones(20)], axis=-1)[None]
    own, shared = (
        Measure(ratio, share=True, prompts=[row // size for row in range(20)]) for size in (1, 5)
    )

    def widths(measure: Measure) -> list[float]:
        difference = _differences({"share": counts}, {"share": counts[:, ::-1]}, {"share": measure})
        ends = [_figure(counts, measure)["interval"], difference["share"]["interval"]]
        return [high - low for low, high in ends]

    assert all(a > 1.5 * b for a, b in zip(widths(shared), widths(own), strict=True))


FULL = method("full", 0.8, (0.0, 0.0), adapter_bytes=5 * 10**8, peak_memory_bytes=4 * 10**9)
LORA = method("lora", 0.79, (-0.05, 0.03))
PREFIX = method("prefix", 0.5, (-0.4, -0.2), folds=False, adapter_bytes=10**5)


def test_the_words_follow_the_figures() -> None:
    text = " ".join(conclude(figures_of(FULL, LORA, PREFIX, best="full")))
    assert "full has the best exact match: 80.0% (95% interval 75.0% to 85.0%)" in text
    assert "lora cannot be told apart from it" in text
    assert "prefix is behind by 30.0% (20.0% to 40.0%)" in text
    assert "If you want one merged model, take lora" in text and "prefix cannot be merged" in text
    assert (
        "If memory is short, the file must be small or training must be quick, take lora: 1.00 GB"
        " at its peak" in text
    )
    assert "With less quality, these need less: prefix (100 kB on disk)." in text
    small = {**PREFIX, "peak_memory_bytes": 5 * 10**8}
    text = " ".join(conclude(figures_of(FULL, LORA, small, best="full")))
    assert (
        "With less quality, these need less: prefix (500 MB at its peak, 100 kB on disk)." in text
    )
    worse = copy.deepcopy(LORA)
    worse["to_best"]["exact_match"]["interval"] = [-0.3, -0.1]
    changed = " ".join(conclude(figures_of(FULL, worse, PREFIX, best="full")))
    assert "lora is behind by" in changed and "take full, the best" in changed
    assert "cannot be told apart" not in changed


def test_where_rows_determine_no_interval_no_method_is_called_better() -> None:
    full, lora, prefix = (copy.deepcopy(each) for each in (FULL, LORA, PREFIX))
    for each in (full, lora, prefix):
        for figure in (each["quality"], each["to_best"]):
            figure["exact_match"]["interval"] = None
        each["forgetting"]["interval"] = None
    figures = figures_of(full, lora, prefix, best="full")
    figures["untuned"]["exact_match"]["interval"] = None
    figures["conclusion"] = conclude(figures)
    text = " ".join(figures["conclusion"])
    assert "80.0% (no interval)" in text
    why = (
        "these rows do not determine an interval (there is one row, or the difference is the same"
        " in every row)"
    )
    assert f"lora and prefix cannot be told apart from it: {why}." in text
    assert "80.0% (no interval)" in make_page(figures) and "+0.100 (no interval)" in make_page(
        figures
    )


def test_the_words_hold_every_method_against_full_fine_tuning_where_it_is_not_the_best() -> None:
    better = {**LORA, "to_full": {"exact_match": {"difference": 0.012, "interval": [-0.02, 0.05]}}}
    worse = {**PREFIX, "to_full": {"exact_match": {"difference": -0.3, "interval": [-0.4, -0.2]}}}
    figures = {**figures_of(FULL, better, worse, best="lora"), "full": "full"}
    said = (
        "Against full, with the 95% interval of the difference: lora +1.2% (-2.0% to +5.0%), prefix"
        " -30.0% (-40.0% to -20.0%)."
    )
    assert said in conclude(figures)
    assert not any("Against full" in s for s in conclude({**figures, "best": "full"}))


def test_the_words_name_methods_whose_rates_could_still_rise_or_fall() -> None:
    def tried(*rates: float) -> list[dict[str, Any]]:
        return [{"learning_rate": rate, "loss": 1.0, "failure": None} for rate in rates]

    high = method("lora", 0.7, (0.0, 0.0), search=tried(1e-5, 1e-4))
    low = method("dora", 0.7, (0.0, 0.0), search=tried(1e-4, 1e-3))
    inside = method("full", 0.7, (0.0, 0.0), search=tried(1e-5, 1e-4, 1e-3))
    text = " ".join(conclude(figures_of(high, low, inside, best="lora")))
    assert "lora did best at the highest learning rate tried" in text
    assert "dora did best at the lowest learning rate tried" in text
    assert "full did best" not in text
    one = method("full", 0.7, (0.0, 0.0), search=tried(1e-4))
    assert "did best at the" not in " ".join(conclude(figures_of(one, best="full")))


def test_the_words_tell_what_cannot_be_merged_failed_or_rests_on_one_seed() -> None:
    best = method("prefix", 0.9, (0.0, 0.0), folds=False)
    behind = method("lora", 0.3, (-0.7, -0.5))
    failed = {**method("full", 0.0, (0, 0)), "failure": "diverged", "quality": {}}
    figures = {**figures_of(best, behind, failed, best="prefix"), "seeds": 1}
    text = " ".join(conclude(figures))
    assert (
        "none of the best will do: prefix cannot be merged. Take lora and accept the difference"
        in text
    )
    assert "full is not in the comparison: diverged" in text and "With one seed" in text
    assert "lora" in make_page(figures) and "diverged" in make_page(figures)
    assert "nothing to choose from" in " ".join(conclude(figures_of(failed, best="")))


def test_the_words_say_when_nothing_was_forgotten_and_when_a_measure_does_not_part() -> None:
    same = {"value": -0.01, "interval": [-0.02, 0.0]}
    a, b = (method(name, 0.5, (0.0, 0.0), forgetting=same) for name in ("lora", "full"))
    text = " ".join(conclude(figures_of(a, b, best="lora")))
    assert "no method became worse" in text and "all methods have the same exact match" in text


def test_rows_where_methods_disagree_are_shown_with_everything_escaped() -> None:
    answers = {"full": {"text": "<b>bold</b>", "value": 1.0}, "lora": {"text": "", "value": 0.0}}
    figures = figures_of(FULL, LORA, best="full")
    figures["disagreements"] = [
        {"row": "r:1", "prompt": "<script>", "expected": "x & y", "answers": answers}
    ]
    page = make_page(figures)
    assert "Where they disagree" in page and "&lt;b&gt;bold" in page and "x &amp; y" in page
    assert "<script" not in page and "<b>bold" not in page and "<i>empty</i>" in page


def test_a_scatter_counts_in_powers_of_ten_where_values_need_it() -> None:
    def marks(*xs: float) -> list[ScatterMark]:
        return [ScatterMark(f"m{x}", x, 0.5, 0.4, 0.6, "m0", "tip") for x in xs]

    assert "100 k" in scatter_chart(marks(2e4, 3e6), title="t", x_label="x", y_label="y")
    assert "2.5" in scatter_chart(marks(2.0, 3.0), title="t", x_label="x", y_label="y")
    assert scatter_chart([], title="t", x_label="x", y_label="y") == ""
