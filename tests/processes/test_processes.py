"""One run on several processes: what it learns does not depend on how many, and what one meets, all
do."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors.torch import load_file

from tests.processes.worker import start_worker
from tests.soak.counts import rounds
from tests.support.helpers import CLEAN
from tests.support.processes import is_suspended
from tests.support.tiny import save_tiny
from veneer.child import environment_for
from veneer.training.output.records import read_records
from veneer.training.processes.launch import GRACE_SECONDS, listening
from veneer.training.processes.world import _connection

WAIT = "60"
"""Seconds for which a process waits for the others here."""
LIMIT = 480
"""Seconds after which processes are ended, whatever they do."""

RUNS = {
    "lora": {"method": {"name": "lora", "rank": 3, "alpha": 5.0, "dropout": 0.2}},
    "dora nf4": {"method": {"name": "dora", "rank": 2}, "quantize": "nf4"},
    "prefix": {"method": {"name": "prefix", "tokens": 3}},
    "bottleneck": {"method": {"name": "bottleneck", "size": 4}, "checkpointing": True},
    "full": {"method": {"name": "full"}, "learning_rate": 1e-3, "dtype": "bfloat16"},
    "lora plus": {
        "method": {"name": "lora", "rank": 2, "lr_ratio": 4.0},
        "order": "shuffled",
        "weight_decay": 0.1,
    },
}
UNSET = {
    "no micro_batch": {
        "method": {"name": "lora", "rank": 2, "dropout": 0.2},
        "micro_batch": None,
        "batch": 12,
    }
}
TAUGHT = {
    "teacher": {
        "method": {"name": "lora", "rank": 2, "dropout": 0.2},
        "objective": {"name": "distil", "system": "Say x.", "own_answers": 0.5, "answer_tokens": 6},
    }
}
HERE = {name: RUNS[name] for name in [*RUNS][: len(rounds("processes", ci=3))]} | UNSET | TAUGHT
STANDING = pytest.mark.skipif(
    not rounds("standing", ci=0), reason="waits for who never comes: make soak"
)
MANY = pytest.mark.skipif(not rounds("processes", ci=0), reason="starts many processes: make soak")
PLAIN = {f"plain {name}": {**RUNS[name], "reduce": "plain"} for name in ("lora", "full")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base and ragged rows."""
    folder = tmp_path_factory.mktemp("processes")
    save_tiny(folder / "base")
    draw = random.Random(0)
    rows = [
        {
            "prompt": "say " + " ".join(draw.choices("abcdefgh", k=draw.randint(1, 14))),
            "completion": " ".join(draw.choices("xyz", k=draw.randint(1, 9))),
        }
        for _ in range(31)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(world, out, **others):
    fields = {
        "base": str(world / "base"),
        "data": {"train": str(world / "rows.jsonl"), "validation_share": 0.2},
    }
    fields |= {
        "steps": 4,
        "batch": 7,
        "micro_batch": 2,
        "evaluate_every": 2,
        "show_answers": False,
        "dtype": "float32",
    }
    return {**fields, "learning_rate": 0.01, "reduce": "exact", "out": str(out), **others}


@contextmanager
def started(jobs, processes, wait=WAIT):
    """The processes that compute these jobs one after another, each with the pipe of what it says
    and the file of its stderr; none of them is left when the block ends."""
    common = {"OMP_NUM_THREADS": "1", "VENEER_WAIT_SECONDS": wait}
    common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    with ExitStack() as stack:
        meetings = [stack.enter_context(listening()) for _ in jobs]
        folder = stack.enter_context(TemporaryDirectory())
        found = []
        try:
            for rank in range(processes):
                own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                log, (said, answers) = Path(folder, str(rank)), CLEAN.Pipe(duplex=False)
                found.append((start_worker(jobs, meetings, own, answers, log), said, log))
                answers.close()
            yield found
        finally:
            for process, *_ in found:
                process.kill()
                process.join()


def answers_of(process, said, log):
    """What a process says of each job; of one that dies its exit code stands behind."""
    process.join(LIMIT)
    assert process.exitcode in (0, 9), (process.exitcode, log.read_text())
    found = []
    with suppress(EOFError):
        while True:
            found.append(said.recv())
    return found + [process.exitcode] * (process.exitcode != 0)


def run_processes(jobs, processes):
    """What each process says of each job."""
    with started(jobs, processes) as waiting:
        return [answers_of(*one) for one in waiting]


def values(out):
    folder = next(path for path in (out / "adapter", out / "model") if path.is_dir())
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def losses(out):
    records = read_records(out / "metrics.jsonl")
    return [
        (r["kind"], r["step"], r["loss"]) for r in records if r["kind"] in ("step", "evaluation")
    ]


@pytest.fixture(scope="module")
def alone(world):
    """Every run computed by one process."""
    out = world / "alone"
    jobs = [
        {"config": settings(world, out / name, **own)} for name, own in {**HERE, **PLAIN}.items()
    ]
    assert run_processes(jobs, 1) == [["done"] * len(jobs)]
    return out


@pytest.fixture(scope="module")
def folders(world):
    """One of each process, which alone sees it."""
    rows = (world / "rows.jsonl").read_text()
    for name in ("first", "second"):
        (world / name).mkdir()
        (world / name / "rows.jsonl").write_text(rows)
    (world / "first" / "missing.jsonl").write_text(rows)
    (world / "first" / "others.jsonl").write_text(rows)
    (world / "second" / "others.jsonl").write_text("".join(rows.splitlines(keepends=True)[:-1]))
    return [str(world / name) for name in ("first", "second")]


@pytest.fixture(scope="module")
def said(world, folders):
    """Every run computed by two processes: what each said of it, by name. They start once for
    all."""
    jobs = {
        name: {"config": settings(world, world / "two" / name, **own)}
        for name, own in {**HERE, **PLAIN}.items()
    }
    for name, out in (("rows", "run"), ("missing", "missing"), ("others", "others"), ("rows", ".")):
        run = settings(world, out, **RUNS["prefix"])
        run["data"] = {**run["data"], "train": f"{name}.jsonl"}
        jobs[out] = {"config": run, "folders": folders}
    run = settings(world, world / "died", **RUNS["lora"])
    (unset,) = UNSET.values()
    stop = {"step": 2, "rank": 1, "does": "signal"}
    jobs["stopped"] = {"config": settings(world, world / "stopped", **unset), "at": stop}
    jobs["died"] = {"config": run, "at": {"step": 3, "rank": 1, "does": "die"}}
    return dict(zip(jobs, zip(*run_processes([*jobs.values()], 2), strict=True), strict=True))


@pytest.fixture(scope="module")
def two(world, said):
    assert all(said[name] == ("done", "done") for name in (*HERE, *PLAIN))
    return world / "two"


@pytest.mark.parametrize("name", HERE)
def test_exact_sums_give_the_same_bits_on_two_processes(alone, two, name):
    one, other = values(alone / name), values(two / name)
    assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
    assert losses(alone / name) == losses(two / name)
    kept = [
        json.loads((out / name / "summary.json").read_text())["held_out"] for out in (alone, two)
    ]
    assert kept[0] == kept[1] and kept[0]["rows"] > 1 and kept[0]["before"] and kept[0]["change"]


@pytest.fixture(scope="module")
def three(world, said):
    """The folder of what three processes compute: a run without a micro-batch; and the run that was
    stopped and the one that died, resumed."""
    (unset,) = UNSET.values()
    jobs = [
        {"config": settings(world, world / "three", **unset)},
        {"config": settings(world, world / "stopped", **unset), "resume": True},
        {"config": settings(world, world / "died", **RUNS["lora"]), "resume": True},
    ]
    assert run_processes(jobs, 3) == [["done"] * 3] * 3
    return world


def test_where_no_micro_batch_is_set_three_processes_and_a_resume_give_the_same_bits(
    three, alone, said
):
    assert all(told_of.startswith("130 stopped at step 2 of 4") for told_of in said["stopped"])
    (name,) = UNSET
    one = values(alone / name)
    for out in (three / "three", three / "stopped"):
        other = values(out)
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
        assert losses(alone / name) == losses(out)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_sums_differ_by_rounding_alone(alone, two, name):
    one, other = losses(alone / name), losses(two / name)
    assert [each[:2] for each in one] == [each[:2] for each in other]
    for (_, _, a), (_, _, b) in zip(one, other, strict=True):
        assert abs(a - b) <= (1e-6 if "lora" in name else 1e-2) * abs(a)


@MANY
def test_four_processes_with_more_of_them_than_micro_batches_give_the_same_bits(world, alone):
    out = world / "four"
    jobs = [{"config": settings(world, out / "lora", **RUNS["lora"])}]
    jobs += [{"config": {**settings(world, out / "few", **RUNS["prefix"]), "batch": 3}}]
    assert run_processes(jobs, 4) == [["done"] * 2] * 4
    one, other = values(alone / "lora"), values(out / "lora")
    assert all(one[key].equal(other[key]) for key in one)
    assert losses(alone / "lora") == losses(out / "lora")


@MANY
def test_a_run_goes_on_with_another_number_of_processes(world, alone):
    out = world / "resumed"
    run = settings(world, out, **RUNS["lora"])
    stop = {"rank": 1, "does": "signal"}
    first = run_processes([{"config": run, "at": {"step": 1, **stop}}], 2)
    assert all(said[0].startswith("130 stopped at step 1 of 4") for said in first)
    second = run_processes(
        [{"config": run, "resume": True, "at": {"step": 3, "rank": 0, "does": "signal"}}], 1
    )
    assert second[0][0].startswith("130 stopped at step 3 of 4")
    assert run_processes([{"config": run, "resume": True}], 4) == [["done"]] * 4
    one, other = values(alone / "lora"), values(out)
    assert all(one[key].equal(other[key]) for key in one)
    assert losses(alone / "lora") == losses(out)


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on_from_its_checkpoint(
    three, alone, said
):
    left, dead = said["died"]
    assert dead == 9
    assert left.startswith("6 another process of this run has ended")
    one, other = values(alone / "lora"), values(three / "died")
    assert all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize(
    ("said", "means"),
    [
        (
            "[/pytorch/gloo/tcp/pair.cc:537] Read error [::1]:1: Connection reset by peer. GLHF!",
            "its connection was closed, as when a process ends",
        ),
        (
            (
                "[/pytorch/x/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to"
                " complete"
            ),
            "it did not answer in time",
        ),
        (
            (
                "The client socket has failed to connect to [host]:1 (errno: 111 - Connection"
                " refused)."
            ),
            "it cannot be reached",
        ),
        ("[/x/y.cc:3] something new", "something new"),
    ],
)
def test_a_message_of_the_backend_is_told_in_a_sentence(said, means):
    assert _connection(said) == means


@STANDING
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("own", [{}, {"shard": True}], ids=["whole", "shards"])
def test_a_process_that_stands_still_ends_the_others_in_time_and_the_run_goes_on(
    world, alone, rank, own, tmp_path
):
    run = settings(world, tmp_path / "run", **RUNS["lora"], **own)
    job = {"config": run, "at": {"step": 3, "rank": rank, "does": "stop"}}
    with started([job], 2, wait="20") as found:
        (stopping, *_), other, begun = found[rank], found[1 - rank], time.monotonic()
        while not is_suspended(stopping.pid):
            assert time.monotonic() - begun < LIMIT and stopping.is_alive()
            time.sleep(0.1)
        begun = time.monotonic()
        (said,), err = answers_of(*other), other[2].read_text()
        assert time.monotonic() - begun < 20 + 40
    assert said.startswith("6 another process of this run has ended, or did not answer in time"), (
        err
    )
    assert "did not answer in time" in said and "gloo" not in said + err, err
    assert "VENEER_WAIT_SECONDS" in said and "--resume" in said
    assert run_processes([{"config": run, "resume": True}], 2) == [["done"]] * 2
    one, two = values(alone / "lora"), values(tmp_path / "run")
    assert all(one[key].equal(two[key]) for key in one)
    assert losses(alone / "lora") == losses(tmp_path / "run")


def test_no_shared_disk_is_needed_and_the_leader_alone_writes(world, alone, said):
    assert said["run"] == ("done", "done")
    assert not (world / "second" / "run").exists()
    one, other = values(alone / "prefix"), values(world / "first" / "run")
    assert all(one[key].equal(other[key]) for key in one)


def test_what_one_process_meets_ends_all_and_is_told_by_all(said):
    first, second = said["missing"]
    assert second.startswith("2 ") and "missing.jsonl" in second
    assert first.startswith("6 the run ends before its first step") and "process 1" in first
    found = said["others"]
    assert all(
        result.startswith("2 the processes of this run do not have the same") for result in found
    )
    assert all("rows: process 0 has" in result for result in found)
    first, second = said["."]
    assert first.startswith("2 ") and "not empty" in first
    assert second.startswith("6 the run ends at its folder")


def test_the_command_starts_its_processes_and_torchrun_starts_the_same_run(world, alone, tmp_path):
    run = settings(world, tmp_path / "started", **RUNS["lora"])
    file = tmp_path / "run.yaml"
    common = {**environment_for(os.environ), "OMP_NUM_THREADS": "1"}
    file.write_text(json.dumps(run))
    own = [sys.executable, "-m", "veneer", "train", str(file), "--quiet"]
    done = subprocess.run(
        [*own, "--processes", "2"], env=common, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    file.write_text(json.dumps({**run, "out": str(tmp_path / "torchrun")}))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*torchrun, *own[1:]], env=common, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    one = values(alone / "lora")
    for out in ("started", "torchrun"):
        other = values(tmp_path / out)
        assert all(one[key].equal(other[key]) for key in one)


def test_processes_that_are_stopped_say_once_how_to_go_on(world, tmp_path):
    run = {**settings(world, tmp_path / "run", **RUNS["lora"]), "steps": 100_000}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    command = [sys.executable, "-m", "veneer", "train", str(tmp_path / "run.yaml"), "--quiet"]
    with subprocess.Popen(
        [*command, "--processes", "2"],
        env={**environment_for(os.environ), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        records, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT
        while not (records.is_file() and '"step"' in records.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 130
    assert said.count("Continue with: veneer train --resume") == 1, said


@pytest.mark.parametrize(
    ("rank", "does", "wait", "code"),
    [
        ("0", "os._exit(7)", LIMIT, 7),
        pytest.param("1", "os.kill(os.getpid(), 19)", 5, 6, marks=STANDING),
    ],
)
def test_where_a_process_is_gone_before_all_have_met_the_others_end(
    rank, does, wait, code, tmp_path
):
    """Process 0, which the others wait for: whatever they would wait. One that stands still: when
    they have waited."""
    hook = f"import os\nif os.environ.get('RANK') == '{rank}':\n    {does}\n"
    (tmp_path / "sitecustomize.py").write_text(hook)
    run = {"base": "smollm2", "data": {"train": "rows.jsonl"}, "out": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    common = {**os.environ, "PYTHONPATH": str(tmp_path), "VENEER_WAIT_SECONDS": str(wait)}
    begun = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "veneer",
        "train",
        str(tmp_path / "run.yaml"),
        "--processes",
        "3",
    ]
    environment = environment_for(common)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT, cwd=tmp_path
    )
    assert done.returncode == code
    assert time.monotonic() - begun < GRACE_SECONDS + (10 if code == 7 else wait + 60)
