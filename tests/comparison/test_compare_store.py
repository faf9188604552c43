"""What a comparison on a cluster gathers, and a trial as a node runs it: without a cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.comparison.test_compare import write_rows
from tests.support.tiny import save_tiny
from veneer.cli.main import main
from veneer.comparison import ray_trial
from veneer.comparison.environment import find_environment
from veneer.comparison.ray_trial import TrialRequest, copy_as_it_goes_on, done_name, run_trial
from veneer.comparison.store import RunStore, files_of
from veneer.errors import ConfigError, CorruptFileError
from veneer.files.atomic import verify_manifest
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.state.checkpoint import checkpoint_path, numbers, prune, save_checkpoint
from veneer.training.state.origin import Origin
from veneer.training.state.progress import RunProgress, load_state


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: Any, tmp_path: Path) -> RunStore:
    addresses = {
        "folder": str(tmp_path / "s"),
        "file": f"file://{tmp_path}/s",
        "memory": f"memory://{tmp_path.name}/s",
    }
    return RunStore(addresses[request.param])


def test_a_folder_comes_back_as_it_was_put_and_nothing_else_stays_in_it(
    store: RunStore, tmp_path: Path
) -> None:
    folder, there = tmp_path / "a", tmp_path / "b"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "x.json").write_text("1")
    (folder / "same.txt").write_text("2")
    (folder / ".lock").write_text("")
    (folder / ".partial-1").write_text("")
    assert store.listed("run") is None
    store.put_folder(folder, "run")
    store.get_folder("run", there)
    assert files_of(there) == files_of(folder) and sorted(files_of(there)) == [
        "adapter/x.json",
        "same.txt",
    ]
    shutil.rmtree(folder / "adapter")
    (folder / "new.txt").write_text("3")
    store.put_folder(folder, "run")
    store.get_folder("run", there)
    assert sorted(path.name for path in there.rglob("*")) == ["new.txt", "same.txt"]
    store.put_text("runs/run.k.done", "{}")
    assert store.text("runs/run.k.done") == "{}" and store.text("runs/other.k.done") is None


def test_what_does_not_arrive_whole_or_would_lie_elsewhere_is_refused(tmp_path: Path) -> None:
    store, folder = RunStore(str(tmp_path / "s")), tmp_path / "a"
    folder.mkdir()
    (folder / "x").write_text("right")
    ((_, digest),) = store.put_folder(folder, "run").items()
    (tmp_path / "s" / "runs" / "run" / digest).write_text("wrong")
    with pytest.raises(CorruptFileError, match="arrived damaged"):
        store.get_folder("run", tmp_path / "b")
    store.put_text("runs/run.json", json.dumps({"../x": digest}))
    with pytest.raises(CorruptFileError, match="leads out"):
        store.get_folder("run", tmp_path / "b")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match="unknown to fsspec"):
        RunStore("nothing://x")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrialRequest, Path]:
    """(folder, a run as a node is asked for it, the same run here)."""
    folder = tmp_path_factory.mktemp("trial")
    base, rows = save_tiny(folder / "base"), write_rows(folder / "rows.jsonl", 8)
    config = RunConfig.of(
        {
            "base": str(base),
            "data": {"train": str(rows), "validation": str(rows)},
            "out": str(folder / "here"),
        }
        | {"steps": 60, "save_every": 2, "evaluate_every": 30, "show_answers": False, "keep": 1}
    )
    (folder / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["train", str(folder / "run.yaml"), "--quiet"]) == 0
    store = RunStore(str(folder / "store"))
    file, run_file = (
        {"input": store.put_file(path), "name": path.name} for path in (rows, folder / "run.yaml")
    )
    within = {"folder": "."}
    return (
        folder,
        TrialRequest(
            store=store.address,
            name="lora-1",
            key="k",
            begin=[
                "train",
                run_file,
                "--data",
                file,
                "--validation",
                file,
                "--out",
                within,
                "--json",
                "--quiet",
            ],
            resume=["train", "--resume", within, "--json", "--quiet"],
            config=config.model_dump(mode="json"),
            rows={"train": file, "validation": file},
            threads=torch.get_num_threads(),
            cwd=str(folder),
            circumstances=find_environment(str(base), []).circumstances,
        ),
        folder / "here",
    )


def asked_for(asked: TrialRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_trial(json.dumps(asdict(asked))))
    return found


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            number, _, rest = status.read_text().partition(" (")
            if int(rest.rpartition(")")[2].split()[1]) == pid:
                found.append(int(number))
    return found


def until(found: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    end = time.monotonic() + 300
    while not (what := found()):
        assert process.poll() is None and time.monotonic() < end, "it ended, or never came so far"
        time.sleep(0.002)
    return what


def has_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint lies below the folder. Folders that come and go meanwhile do not count,
    which `Path.rglob` would stop at."""
    return any(
        name.startswith("000")
        for path, names, _ in os.walk(folder)
        for name in names
        if path.endswith("/checkpoints")
    )


@pytest.mark.skipif(sys.platform != "linux", reason="finds the trial's process in /proc")
def test_a_trial_that_is_killed_goes_on_elsewhere_from_what_was_gathered(
    world: Any, tmp_path: Path
) -> None:
    """Killed as a node is lost, with the process of the run. That stands still from its first
    checkpoint on: it would end before the node has gathered anything."""
    _, asked, here = world
    store, work = RunStore(asked.store), tmp_path / "of the node"
    work.mkdir()
    code = "import sys; from veneer.comparison.ray_trial import run_trial; run_trial(sys.argv[1])"
    command = [sys.executable, "-c", code, json.dumps(asdict(asked))]
    node = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(work)})
    until(lambda: has_checkpoint(work), node)
    (run,) = children_of(node.pid)
    os.kill(run, signal.SIGSTOP)
    try:
        until(
            lambda: any(path.startswith("checkpoints/") for path in store.listed(asked.name) or {}),
            node,
        )
    finally:
        node.kill()
        node.wait()
        os.killpg(run, signal.SIGKILL)
    store.get_folder(asked.name, tmp_path / "gathered")
    (begun,) = numbers(tmp_path / "gathered" / "checkpoints")[-1:]
    assert 0 < begun < 60
    done = asked_for(asked)
    assert done["code"] == 0 and "--resume" in done["command"], done
    store.get_folder(asked.name, tmp_path / "out")
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "out" / adapter).read_bytes() == (here / adapter).read_bytes()
    assert [
        r["step"] for r in read_records(tmp_path / "out" / "metrics.jsonl") if r["kind"] == "step"
    ] == [*range(1, 61)]
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert store.text(done_name(asked.name, asked.key)) is not None


def saved(run: Path, step: int, best: int | None) -> None:
    """A run that has come so far, as its loop writes it."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "step": step}) + "\n")
    state = {
        "origin": vars(Origin("", None, None, None, None)),
        "progress": vars(RunProgress(step=step, best_step=best)),
    }
    save_checkpoint(run / "checkpoints", step, {"values": torch.zeros(2)}, state)
    prune(run / "checkpoints", keep=1, best=best)


@pytest.mark.parametrize("best", [None, 1], ids=["none is the best", "another is the best"])
@pytest.mark.parametrize("file", ["metrics.jsonl", "state.json", "MANIFEST.json"])
def test_a_run_that_saves_while_it_is_copied_leaves_what_goes_on_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, best: int | None
) -> None:
    """It saves a second time, and removes the first checkpoint, when a file of that name has been
    copied."""
    run, copy, right, steps = (
        tmp_path / "run",
        tmp_path / "copy",
        shutil.copystat,
        iter(range(2, 9)),
    )
    run.mkdir()
    saved(run, 1, best)

    def copied(source: Any, target: Any, **given: Any) -> None:
        right(source, target, **given)
        if Path(source).name == file and (step := next(steps, None)):
            saved(run, step, best and step)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copystat", copied)  # the last that is done for a file
        step = copy_as_it_goes_on(run, copy)
    if step is not None:
        assert numbers(copy / "checkpoints")[-1] == step
        progress = load_state(checkpoint_path(copy / "checkpoints", step)).progress
        assert progress.best_step in (None, *numbers(copy / "checkpoints"))
        assert not any(verify_manifest(path) for path in (copy / "checkpoints").iterdir())
        assert [r["step"] for r in read_records(copy / "metrics.jsonl")][:step] == [
            *range(1, step + 1)
        ]
    assert copy_as_it_goes_on(run, tmp_path / "again") is not None


def test_a_node_of_another_kind_is_refused_with_both_sides(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, asked, _ = world
    ray_trial._environment.cache_clear()
    monkeypatch.setattr(
        ray_trial, "_environment", lambda *_: {"circumstances": {**asked.circumstances, "gpu": "X"}}
    )
    found = asked_for(asked)
    assert "another kind of machine" in found["refused"][0] and "here 'X'" in found["refused"][1][0]


def words_of_a_comparison(place: Path) -> list[str]:
    base, rows = save_tiny(place / "base"), write_rows(place / "rows.jsonl", 4, 0)
    return [
        "compare",
        "--base",
        str(base),
        "--data",
        str(rows),
        "--methods",
        "lora,full",
        "--out",
        str(place / "o"),
    ]


def test_flags_that_only_a_cluster_has_a_use_for_are_refused_elsewhere(
    capsys: Any, tmp_path: Path
) -> None:
    words = words_of_a_comparison(tmp_path)
    assert main([*words, "--cpus", "2", "--store", "s"]) == 2
    assert "--store, --cpus: only for runs on Ray" in capsys.readouterr().err
    assert main(["serve", "--base", str(tmp_path / "base"), "--replicas", "2"]) == 2
    assert "--replicas: only for replicas on Ray" in capsys.readouterr().err


def test_without_ray_the_error_names_the_extra(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    words = words_of_a_comparison(tmp_path)
    assert main([*words, "--on", "ray"]) == 2
    assert "pip install 'veneer[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
