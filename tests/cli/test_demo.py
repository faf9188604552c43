"""The demo from end to end, on a tiny random base and a handful of made-up calls; no network."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import save_tiny
from veneer import demo
from veneer.child import typed_command
from veneer.cli.main import main
from veneer.data.bfcl import BfclEntry, parse_entries
from veneer.errors import ConfigError, SourceError
from veneer.files.lock import BusyError
from veneer.training.state.place import locked_folder

TRAINED, HELD_OUT = 12, 11


def made_up_calls() -> list[BfclEntry]:
    questions, answers = [], []
    for i in range(TRAINED + HELD_OUT):
        schema = {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        function = {"name": f"f{i}", "description": "Count.", "parameters": schema}
        question = [[{"role": "user", "content": f"It's {i}, isn't it?"}]]
        questions.append(json.dumps({"id": str(i), "question": question, "function": [function]}))
        answers.append(json.dumps({"id": str(i), "ground_truth": [{f"f{i}": {"n": [i]}}]}))
    return parse_entries("\n".join(questions).encode(), "\n".join(answers).encode())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("base")))


@pytest.fixture(autouse=True, scope="module")
def offline() -> Iterator[None]:
    split = demo.bfcl.split
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "fetch_wheel", lambda requirement: Path("w.whl"))
        patch.setattr(demo.bfcl, "read_bfcl", lambda wheel: made_up_calls())
        patch.setattr(demo.bfcl, "split", lambda calls: split(calls, TRAINED))
        patch.setattr(demo, "MAX_NEW_TOKENS", 4)
        yield


Demo = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def finished(
    base: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, Any]]:
    """Where every test finds a demo that has run, a copy of it as it was then, and its figures."""
    place = tmp_path_factory.mktemp("demo")
    figures = demo.run_demo(place / "demo", base=base, epochs=1)
    shutil.copytree(place / "demo", place / "kept")
    return place / "demo", place / "kept", figures


@pytest.fixture
def out(finished: tuple[Path, Path, dict[str, Any]]) -> Path:
    """The folder of a finished demo, which a test may change."""
    folder, kept, _ = finished
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    return folder


@pytest.fixture
def first(finished: tuple[Path, Path, dict[str, Any]]) -> dict[str, Any]:
    return finished[2]


@pytest.fixture
def run(base: str, out: Path) -> Demo:
    return lambda **options: demo.run_demo(out, base=base, **{"epochs": 1, **options})


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whether each training was new or resumed, in order."""
    seen: list[str] = []
    train_run = demo.api.train_run

    def counted(config: Any, *, resume: bool, screen: Any) -> dict[str, Any]:
        seen.append("resumed" if resume else "new")
        return train_run(config, resume=resume, screen=screen)

    monkeypatch.setattr(demo.api, "train_run", counted)
    return seen


def test_it_leaves_rows_a_run_and_both_sides_answers(out: Path, first: dict[str, Any]) -> None:
    assert len((out / "train.jsonl").read_text().splitlines()) == TRAINED
    assert len((out / "held_out.jsonl").read_text().splitlines()) == HELD_OUT
    assert {path.name for path in (out / "run" / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    untuned, tuned = (
        json.loads((out / f"{name}.json").read_text())["answers"] for name in ("untuned", "tuned")
    )
    assert len(untuned) == len(tuned) == HELD_OUT
    assert untuned != tuned  # the adapter acted
    assert first["untuned"].keys() == first["tuned"].keys()
    assert first["summary"]["steps"] == 2  # 12 rows in batches of 8


def test_a_short_one_trains_so_many_steps_and_holds_out_what_it_answers(
    run: Demo, out: Path
) -> None:
    assert run(steps=1)["summary"]["steps"] == 1
    assert len((out / "held_out.jsonl").read_text().splitlines()) == demo.TRIED


def test_running_it_again_trains_nothing_and_answers_nothing(
    run: Demo, first: dict[str, Any], trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "evaluate_answers", lambda *a, **k: pytest.fail("answered again"))
    assert run() == first
    assert trainings == []


def test_again_and_other_settings_train_anew(run: Demo, trainings: list[str]) -> None:
    run(again=True)
    run(epochs=2)
    assert trainings == ["new"] * 2


def test_a_run_that_was_stopped_continues(
    run: Demo, first: dict[str, Any], trainings: list[str], out: Path
) -> None:
    folder = out / "run"
    (folder / "summary.json").unlink()  # as if it had been stopped after its last checkpoint
    shutil.rmtree(folder / "adapter")
    assert run()["tuned"] == first["tuned"]
    assert trainings == ["resumed"]


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_anew(
    run: Demo, trainings: list[str], out: Path
) -> None:
    (out / "run" / "summary.json").unlink()
    shutil.rmtree(out / "run" / "checkpoints")
    run()
    assert trainings == ["new"]


def test_a_second_demo_in_one_folder_is_refused_and_a_run_that_is_under_way_stays(
    run: Demo, out: Path
) -> None:
    folder = out / "run"
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    for place in (out, folder):
        with locked_folder(place), pytest.raises(BusyError):
            run()
        assert (folder / "run.yaml").is_file()


def test_damaged_answers_are_made_anew(run: Demo, first: dict[str, Any], out: Path) -> None:
    (out / "untuned.json").write_text("{")
    assert run() == first


@pytest.mark.parametrize("name", ["run/precious.txt", "train.jsonl", "held_out.jsonl"])
def test_a_folder_that_the_demo_did_not_make_is_left_alone(run: Demo, out: Path, name: str) -> None:
    shutil.rmtree(out)
    precious = out / name
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(ConfigError, match="not made by the demo"):
        run(again=True)
    assert precious.read_text() == "mine"
    assert [path for path in out.rglob("*") if path.is_file()] == [precious]


def test_a_download_that_fails_says_what_to_do(run: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(requirement: str) -> Path:
        raise SourceError(f"no {requirement}", [], "Check the network.")

    monkeypatch.setattr(demo, "fetch_wheel", unreachable)
    with pytest.raises(SourceError, match="bfcl-eval==") as caught:
        run()
    assert caught.value.next_step


def test_the_screen_shows_the_same_questions_before_and_after_and_both_sides_shares(
    run: Demo, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    text = capsys.readouterr().out
    assert text.count("isn't it?") >= 2 * demo.SHOWN
    assert re.search(r"all arguments accepted\s+\d+%\s+\d+%", text)


def test_the_shown_rows_are_spread_over_all_of_them() -> None:
    assert list(demo.shown_rows(100)) == [0, 20, 40, 60, 80]
    assert list(demo.shown_rows(3)) == [0, 1, 2]


def test_the_next_commands_run_as_they_are_printed(
    run: Demo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    text = capsys.readouterr().out
    commands = [
        shlex.split(line)
        for line in re.findall(r"^  (\S*veneer (?:.|\n(?!  \S*veneer))*)", text, re.M)
    ]
    assert [command[1] for command in commands] == ["generate", "chat", "evaluate"]
    for _, *arguments in commands:
        monkeypatch.setattr("builtins.input", lambda prompt="": (_ for _ in ()).throw(EOFError))
        assert main(arguments) == 0, arguments
        assert capsys.readouterr().out or arguments[0] == "chat"


def test_next_names_the_program_as_it_can_be_called_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_folder = tmp_path / "with space" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("python", "veneer"):
        (bin_folder / name).write_text("#!/bin/sh\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bin_folder / "python"))
    monkeypatch.chdir(tmp_path)

    monkeypatch.setenv("PATH", "/nowhere")
    assert shlex.split(typed_command()) == ["with space/bin/veneer"]
    monkeypatch.chdir(Path(__file__).parent)
    assert shlex.split(typed_command()) == [str(bin_folder / "veneer")]
    monkeypatch.setenv("PATH", str(bin_folder))
    assert typed_command() == "veneer"
    (bin_folder / "veneer").unlink()
    assert typed_command() == "veneer"
