"""Commands that are killed at any moment, then given again: the result is that of the one never
killed, to the bit.

SIGKILL takes the process as it is; SIGTERM, SIGINT and SIGHUP let `train` save first. Training may
be killed several times before it ends. Afterwards nothing unfinished lies about.
"""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load

from tests.soak.counts import rounds
from tests.soak.world import FROM_LIBRARY, make_world
from tests.support.helpers import start_veneer, wait_until_begun
from veneer.files.atomic import verify_manifest
from veneer.library.library import Library
from veneer.training.output.records import read_records
from veneer.training.state.checkpoint import checkpoint_path, numbers

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
STEPS = 8
TRAIN = (
    "train --base {w}/base --data {w}/rows.jsonl --validation {w}/rows.jsonl --out {o}/result"
    " --quiet --steps 8 --batch 3 --set save_every=1 --set evaluate_every=3 --set method.rank=2"
    " --set method.dropout=0.1 --set length=256 --set dtype=float32 --set keep=2"
)
COMMANDS = {
    **{name: FROM_LIBRARY[name] for name in ("export", "merge", "push", "pull")},
    "add": "adapters add {w}/a --name added --library {o}/library",
    "report": "report {o}/run",
    "predictions": (
        "evaluate --base {w}/base --data {w}/rows.jsonl --predictions {o}/result.jsonl --json"
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("kills") / "world")


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """(folder of the run that was never killed, seconds that it took)."""
    out = tmp_path_factory.mktemp("whole")
    run(TRAIN, world, out)  # what is loaded and compiled once is, before the clock runs
    shutil.rmtree(out / "result")
    start = time.monotonic()
    assert run(TRAIN, world, out)[0] == 0
    return out / "result", time.monotonic() - start


def run(line, world, out, *, kill_after=None, number=signal.SIGKILL):
    """(exit code, stderr) of the command in a process of its own, killed after so many seconds."""
    arguments = line.format(w=world, o=out).split()
    said = out.parent / f"{out.name}.said"
    with said.open("w") as err, Path(os.devnull).open("w") as nowhere:
        process = start_veneer(arguments, stdout=nowhere.fileno(), stderr=err.fileno())
        if kill_after is not None:
            wait_until_begun(process)
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it has ended
                os.kill(process.pid, number)
        process.join()
        code = process.exitcode
    text = said.read_text()
    assert "Traceback" not in text, text
    return code, text


def unfinished(folder):
    return [
        p
        for p in folder.rglob("*")
        if p.name.startswith((".partial", ".replaced")) or p.name == ".lock"
    ]


def contents(folder):
    """Every file's bytes, but what holds times."""
    files = (p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else ()
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("seed", rounds("kills", ci=2))
def test_a_run_that_is_killed_and_resumed_is_the_run_that_never_was(seed, world, whole, tmp_path):
    reference, seconds = whole
    chance = random.Random(seed)
    out = tmp_path / "o"
    out.mkdir()
    killed, done = [], False
    while not done:
        begun = (out / "result" / "run.yaml").is_file()
        line = f"train --quiet --resume {out}/result" if begun else TRAIN
        last = len(killed) >= chance.randrange(1, 4)
        number, after = chance.choice(SIGNALS), chance.uniform(0, 1.1 * seconds)
        code, said = run(line, world, out, kill_after=None if last else after, number=number)
        assert code in ((0,) if last else (0, 130, -number)), (killed, code, said)
        killed.append((number, after, code))
        done = (out / "result" / "summary.json").is_file()
        if code == 130 and "checkpoint saved" in said:
            folder = out / "result" / "checkpoints"
            assert not verify_manifest(checkpoint_path(folder, numbers(folder)[-1]))
    if not (out / "result" / "report.html").is_file():  # killed between its summary and its page
        assert run("report {o}/result", world, out)[0] == 0
    ours, theirs = contents(out / "result" / "adapter"), contents(reference / "adapter")
    assert ours.keys() == theirs.keys()
    assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"], killed
    trained = [
        [(r["kind"], r.get("step"), r.get("loss")) for r in read_records(folder / "metrics.jsonl")]
        for folder in (out / "result", reference)
    ]
    assert trained[0] == trained[1], killed
    left = numbers(out / "result" / "checkpoints")
    assert left[-1] == STEPS and len(left) <= 3
    assert all(
        not verify_manifest(checkpoint_path(out / "result" / "checkpoints", step)) for step in left
    )
    # a page or a lock of the very last moment goes with the next command: report, above, or none is
    # left
    assert run("report {o}/result", world, out)[0] == 0
    assert [p for p in unfinished(out) if p.name != ".lock"] == []


FLEET = {"first": {"steps": 3}, "second": {"steps": 5, "seed": 4}, "third": {"method": "dora"}}


@pytest.fixture(scope="module")
def fleet(world, tmp_path_factory):
    """(folder of the jobs that were never killed, seconds that they took)."""
    out = tmp_path_factory.mktemp("fleet")
    start = time.monotonic()
    assert run(write_fleet(world, out), world, out)[0] == 0
    return out, time.monotonic() - start


def write_fleet(world, out):
    """Writes the run file of three jobs; returns the command that trains them."""
    rows = str(world / "rows.jsonl")
    settings = {
        "base": str(world / "base"),
        "data": {"train": rows, "validation": rows},
        "steps": 4,
        "batch": 3,
        "save_every": 1,
        "evaluate_every": 2,
        "length": 256,
        "dtype": "float32",
        "show_answers": False,
        "jobs": [{"out": str(out / name), **job} for name, job in FLEET.items()],
    }
    (out / "fleet.yaml").write_text(json.dumps(settings))
    return "train {o}/fleet.yaml --quiet --library {o}/library"


@pytest.mark.parametrize("seed", rounds("kills_of_fleets", ci=1))
def test_a_fleet_that_is_killed_goes_on_as_the_fleet_that_never_was(seed, world, fleet, tmp_path):
    reference, seconds = fleet
    chance, killed = random.Random(seed), []
    line = write_fleet(world, tmp_path)
    for again in range(chance.randrange(1, 4)):
        after = chance.uniform(0.1, 1.0) * seconds
        code, said = run(line + " --resume" * bool(again), world, tmp_path, kill_after=after)
        assert code in (0, -signal.SIGKILL), (killed, said)
        killed.append((after, code))
    code, said = run(f"{line} --resume", world, tmp_path)
    assert code == 0, (killed, said)
    library = Library(tmp_path / "library")
    for name in FLEET:
        ours, theirs = (contents(folder / name / "adapter") for folder in (tmp_path, reference))
        # After a kill the jobs share their forwards otherwise, so last bits of float32 differ.
        tensors = [load(part["adapter_model.safetensors"]) for part in (ours, theirs)]
        assert tensors[0].keys() == tensors[1].keys()
        for key, tensor in tensors[0].items():
            assert (tensor - tensors[1][key]).abs().mean() < 1e-6, (name, key, killed)
        assert library.locate(name)
        trained = [
            [(r["kind"], r.get("step"), r.get("loss")) for r in read_records(file)]
            for file in (folder / name / "metrics.jsonl" for folder in (tmp_path, reference))
        ]
        assert [record[:2] for record in trained[0]] == [record[:2] for record in trained[1]]
        losses = [[loss for *_, loss in records if loss is not None] for records in trained]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), (name, killed)


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """name -> (what the command leaves where it is never killed, seconds)."""
    found = {}
    for name, line in COMMANDS.items():
        out = place(world, tmp_path_factory.mktemp("results") / "o")
        run(line, world, out)
        out = place(world, tmp_path_factory.mktemp("results") / "o")
        start = time.monotonic()
        assert run(line, world, out)[0] == 0
        found[name] = contents(out), time.monotonic() - start
    return found


def place(world, out):
    out.mkdir()
    shutil.copytree(world / "library", out / "library")
    shutil.copytree(world / "run", out / "run")
    return out


@pytest.mark.parametrize("seed", rounds("kills_of_others", ci=2))
def test_a_command_that_is_killed_and_given_again_leaves_what_it_should(
    seed, world, results, tmp_path
):
    chance = random.Random(1000 + seed)
    name = sorted(COMMANDS)[seed % len(COMMANDS)]
    expected, seconds = results[name]
    out = place(world, tmp_path / "o")
    number = chance.choice(SIGNALS)
    after = chance.uniform(0, 1.1 * seconds)
    code, said = run(COMMANDS[name], world, out, kill_after=after, number=number)
    assert code in (0, 130, -number), said
    if code != 0:
        again, told = run(COMMANDS[name], world, out)
        assert again == 0 or "exists" in told, told  # it was done, and killed as it said so
    for folder in (out / "library", out / "elsewhere"):
        if folder.exists():
            library = Library(folder)
            for entry in library.entries(every_version=True):
                library.whole(entry.reference)
    if (out / "library").exists():
        run("adapters gc --yes --library {o}/library", world, out)
    assert [p for p in unfinished(out) if p.name != ".lock"] == [], (number, after)
    made = contents(out)
    own = (
        "names/",
        "library",
        "report",
        "elsewhere",
        "README",
    )  # which say where they lie, or when they were made
    comparable = {k for k in expected if not any(word in k for word in own)}
    assert {k: made.get(k) == expected[k] for k in comparable} == dict.fromkeys(comparable, True), (
        number,
        after,
    )
