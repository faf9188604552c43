"""benchmarks/gpu: refused where there is no GPU; all of it tried at tiny sizes, so that it runs
where there is one."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from tests.support.accelerator import Accelerator
from tests.support.kernels.tape import Tape
from veneer.decoding import forward
from veneer.kernels.cuda import launch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def script(monkeypatch, capsys):
    """Returns a function that runs the script in this process: exit code, stdout, stderr."""
    monkeypatch.syspath_prepend(str(SCRIPT))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = spec_from_file_location("gpu_script", SCRIPT / "__main__.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        code = module.main()
        return code, *capsys.readouterr()

    return run


def test_without_a_gpu_it_refuses_and_says_what_to_do(script, tmp_path):
    code, _, said = script("--out", tmp_path / "out")
    assert code == 2 and "no CUDA device is here" in said and "--trial" in said
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), "--trial", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    return done, out / "trial"


def test_every_item_runs_and_its_result_is_written(tried):
    done, out = tried
    assert done.returncode == 0, done.stdout + done.stderr
    results = {path.stem: json.loads(path.read_text()) for path in out.glob("[0-9]*.json")}
    assert len(results) == 35
    assert not {name: result["error"] for name, result in results.items() if "error" in result}
    assert results["7.5"]["values"]["float32"] == {"repeated": True, "resumed": True}
    gathered = json.loads((out / "gpu.json").read_text())["measurements"]
    assert len(gathered) == 35
    assert all(
        each[key] for each in gathered for key in ("what", "machine", "commit", "command", "values")
    )


def test_it_goes_on_where_it_was_cut_off(tried, script):
    _, out = tried
    (out / "1.1.json").unlink()
    (out / "1.2.json").write_text('{"here": {')
    failed = json.loads((out / "1.3.json").read_text())
    (out / "1.3.json").write_text(json.dumps({**failed, "error": "ended after 60 s"}))
    old = json.loads((out / "2.1.json").read_text())
    (out / "2.1.json").write_text(json.dumps({**old, "here": {**old["here"], "commit": "another"}}))
    code, shown, _ = script("--trial", "--out", out.parent)
    assert code == 0
    again = [line.partition(":")[0] for line in shown.splitlines() if "there already" not in line]
    items = ["1.1 versions", "1.2 product roof", "1.3 copy bandwidth", "2.1 decoded bits"]
    assert again[:4] == items and len(again) == 5


def test_nothing_begins_without_time(script, tmp_path):
    code, shown, _ = script("--trial", "--out", tmp_path, "--minutes", "0")
    assert code == 1 and "the next call goes on here" in shown
    assert not list(tmp_path.rglob("*.json"))


def test_an_item_by_itself_writes_its_value_as_one_line(script):
    code, shown, _ = script("--trial", "--item", "1.1 versions")
    assert code == 0 and json.loads(shown)["gpu"] is None


def test_its_items_find_all_tensors_on_a_device_that_is_no_cpu(monkeypatch):
    """A pretended one (tests/support/accelerator.py), where an answer's steps are replayed from a
    tape."""
    monkeypatch.syspath_prepend(str(SCRIPT))
    items, tiny = (
        importlib.import_module("parts").items,
        importlib.import_module("place").place(trial=True),
    )
    monkeypatch.setattr(launch, "module", lambda name: None)
    for name in (
        "synchronize",
        "memory_allocated",
        "max_memory_allocated",
        "reset_peak_memory_stats",
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    with Accelerator("cuda:0") as there:
        tape, at = Tape(there), replace(tiny, device=there.device)
        monkeypatch.setattr(forward, "recorder_here", lambda: tape)
        asked = ("2.1", "2.2", "2.4", "3.2", "4.3")
        found = {item.name[:3]: item.run(at) for item in items(at) if item.name[:3] in asked}
    assert len(found) == 5 and tape.replayed > tape.captured > 3
    assert found["2.4"]["adapters"]["graphs"]["graphs"] == 1 and found["4.3"]["answers_alike"] == 32
