"""Commands in forked processes: the bits, the memory, the exit codes and the ends of processes of
their own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.comparison.test_compare import write_rows
from tests.support.tiny import save_tiny
from veneer.comparison import local
from veneer.comparison.jobs import CommandJob, Outcome
from veneer.comparison.local import ForkServer, LocalExecutor, command_of
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere each command starts anew"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forked")
    save_tiny(folder / "base")
    write_rows(folder / "rows.jsonl", 12)
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    found = ForkServer(os.environ)
    yield found
    found.close()


def train(place: Path, out: Path, steps: int, *more: str) -> list[str]:
    given = ["--base", str(place / "base"), "--data", str(place / "rows.jsonl"), "--out", str(out)]
    return ["train", *given, "--steps", str(steps), "--json", "--quiet", *more]


def test_a_run_learns_the_same_bits_and_needs_the_same_memory(
    place: Path, server: ForkServer, tmp_path: Path
) -> None:
    found: dict[str, Any] = {}
    for name, run in (
        ("alone", lambda asked: command_of(asked, lambda: None, os.environ)),
        ("forked", None),
    ):
        asked = train(place, tmp_path / name, 3, "--set", "method.dropout=0.1")
        done = server.command_of(asked, lambda: None) if run is None else run(asked)
        assert done.code == 0, done.talk
        steps = [
            record["loss"]
            for record in read_records(tmp_path / name / "metrics.jsonl")
            if record["kind"] == "step"
        ]
        found[name] = json.loads(done.out), steps
    alone, forked = found["alone"][0], found["forked"][0]
    assert found["forked"][1] == found["alone"][1] and len(found["alone"][1]) == 3
    for figure in ("adapter_sha256", "validation_loss", "base_fingerprint", "trained_tokens"):
        assert forked[figure] == alone[figure]
    for figure in ("idle_memory_bytes", "peak_memory_bytes"):
        assert forked[figure] == pytest.approx(alone[figure], rel=0.04), figure


def test_each_command_has_its_own_code_stdout_and_talk(server: ForkServer) -> None:
    done = server.command_of(["--version"], lambda: None)
    assert (done.code, done.out.split()[0], done.talk) == (0, "veneer", "")
    done = server.command_of(["data", "check", "nothing.jsonl", "--base", "nowhere"], lambda: None)
    assert (
        (done.code, done.out) == (2, "") and "nowhere" in done.talk and "Traceback" not in done.talk
    )
    assert done.command == ("veneer", "data", "check", "nothing.jsonl", "--base", "nowhere")


def test_an_interrupt_is_passed_on_and_the_run_saves_first(
    place: Path, server: ForkServer, tmp_path: Path
) -> None:
    def once_it_steps() -> None:
        if (tmp_path / "run" / "metrics.jsonl").is_file() and steps_of(tmp_path / "run"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        server.command_of(train(place, tmp_path / "run", 100_000), once_it_steps)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert server.command_of(["--version"], lambda: None).code == 0, "it serves on"


def test_a_run_ends_with_its_server_and_the_next_one_gets_another(
    place: Path, tmp_path: Path
) -> None:
    here, killed = LocalExecutor(), list[int]()

    def job(name: str, steps: int) -> CommandJob:
        folder = tmp_path / name
        config = RunConfig.of({"base": "b", "data": "d", "out": str(folder)})
        return CommandJob(name, folder, begin=tuple(train(place, folder, steps)), config=config)

    def kill_once_it_steps(_: str) -> None:
        if not killed and (tmp_path / "a" / "metrics.jsonl").is_file() and steps_of(tmp_path / "a"):
            killed.append(here._server._process.pid)  # type: ignore[union-attr]
            os.kill(killed[0], signal.SIGKILL)

    try:
        here.queue([job("a", 100_000), job("b", 1)])
        _, outcome = here.wait_for_job(kill_once_it_steps)
        assert outcome.code == -signal.SIGKILL and killed
        waited(lambda: (tmp_path / "a" / "checkpoints").is_dir())  # SIGTERM reached it
        at = steps_of(tmp_path / "a")
        time.sleep(1)
        assert steps_of(tmp_path / "a") == at
        _, outcome = here.wait_for_job(lambda _: None)
        assert outcome.code == 0, outcome.talk
    finally:
        here.stop()


def test_a_server_that_does_not_start_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        local, "module_command", lambda name: [sys.executable, "-c", "raise Exception(7)"]
    )
    server = ForkServer(os.environ)
    outcome = server.command_of(["--version"], lambda: None)
    server.close()
    assert (
        outcome == Outcome(1, "", outcome.talk, ("veneer", "--version"))
        and "Exception: 7" in outcome.talk
    )


def steps_of(run: Path) -> list[int]:
    return [
        record["step"] for record in read_records(run / "metrics.jsonl") if record["kind"] == "step"
    ]


def waited(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")
