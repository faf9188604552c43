"""The plan of jobs that train together, beside what joint training does."""

import json
from dataclasses import replace

import pytest

from tests.support.joint import config, make_world, together
from veneer.cli.main import main
from veneer.plan.joint_forwards import JobLoad, simulate
from veneer.plan.simulation.remembered import remember_idle_bytes
from veneer.runs import train_jobs
from veneer.training import loop
from veneer.training.budget import JobMemory, other_teachers, plan_jobs
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen

MEMORY = JobMemory(peak=1000, step=200, tokens=20, values=40, optimizer=60)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    rows = [{"prompt": f"row {n}", "completion": "is it"} for n in range(8)]
    (folder / "even.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(tokens, *, micro_batches=1, steps=4, seconds=1.0, joint=1.0, shared=0.0, path=None):
    return JobLoad(MEMORY, tokens, micro_batches, steps, seconds, joint, shared, path)


@pytest.fixture
def forwards(monkeypatch):
    """The number of jobs in each forward, and the tokens of a row of each."""
    counts = []
    own = loop.forward_backward

    def counted(micro_batches):
        counts.append([sum(len(e.ids) for e in m.examples) for m in micro_batches])
        own(micro_batches)

    monkeypatch.setattr(loop, "forward_backward", counted)
    return counts


JOBS = {
    "a": {"batch": 2, "steps": 5},
    "b": {"batch": 2, "steps": 3},
    "c": {"batch": 4, "micro_batch": 2, "steps": 4},
}


@pytest.mark.parametrize("rows_at_once", [None, 4, 1])
def test_the_loop_computes_the_forwards_that_are_planned(rows_at_once, world, tmp_path, forwards):
    data = {"train": str(world / "even.jsonl"), "validation_share": 0}
    configs = [config(world, tmp_path / n, data=data, **job) for n, job in JOBS.items()]
    together(configs[:1])
    row = forwards[0][0] // 2  # all rows have as many tokens
    forwards.clear()
    budget = None if rows_at_once is None else rows_at_once * row
    together([c.model_copy(update={"out": f"{c.out} together"}) for c in configs], budget=budget)
    planned = simulate(
        [load(2 * row, steps=5), load(2 * row, steps=3), load(2 * row, micro_batches=2, steps=4)],
        None,
        budget=budget,
    )
    trial = simulate([load(2 * row, steps=1)] * 3, None, budget=budget)
    assert len(forwards) == planned.forwards + trial.forwards
    assert max(map(len, forwards)) == planned.shared == {None: 3, 4: 2, 1: 1}[rows_at_once]


def test_jobs_without_room_wait_until_another_ends():
    all_at_once = simulate([load(10)] * 4, None)
    assert (all_at_once.training, all_at_once.forwards, all_at_once.seconds) == (4, 4, 16.0)
    held = 3 * 100 + 200  # values and optimizers of three jobs, and a step of the largest
    few = simulate([load(10)] * 4, round(held / 0.8))
    assert few.training == 3 and few.forwards > 4 and few.peak < all_at_once.peak
    assert simulate([load(10)] * 4, round((held + 100) / 0.8)).training == 4


def test_time_together_saves_what_a_forward_takes_once_and_is_never_longer_than_alone():
    loads = [load(10, seconds=3.0, joint=2.0, shared=0.5), load(10, seconds=3.0, joint=2.0)]
    assert simulate(loads, None).seconds == pytest.approx(4 * (2.0 + 2.0))
    loads = [load(10, seconds=3.0, joint=2.0, shared=0.5)] * 3
    assert simulate(loads, None).seconds == pytest.approx(4 * (3 * 2.0 - 2 * 0.5))
    slow = [load(10, seconds=1.0, joint=2.0)] * 2
    assert simulate(slow, None).seconds == pytest.approx(4 * 2.0)
    apart = simulate([load(10, path=True), load(10, path=False)], None)
    assert (apart.shared, apart.forwards) == (1, 8)


def test_long_runs_are_scaled():
    short, long = (simulate([load(10, steps=n)] * 8, None) for n in (100, 100_000))
    assert long.forwards == pytest.approx(1000 * short.forwards, rel=0.01)
    assert long.seconds == pytest.approx(1000 * short.seconds, rel=0.01)


def test_a_fleet_is_planned_as_its_run_plans_it(world, tmp_path, capsys):
    jobs = [{"out": str(tmp_path / f"job-{n}"), "batch": 2 + n} for n in range(2)]
    file = tmp_path / "fleet.yaml"
    common = config(world, tmp_path, rows="even", steps=2).model_dump(mode="json", exclude={"out"})
    file.write_text(json.dumps({**common, "jobs": jobs}))
    assert main(["plan", str(file), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["together"]
    schedule = planned["schedule"]
    assert (schedule["shared"], schedule["training"], schedule["forwards"]) == (2, 2, 2)
    assert 0 < schedule["seconds"] <= planned["run_seconds_one_after_another"]
    configs = [config(world, j["out"], rows="even", batch=j["batch"], steps=2) for j in jobs]
    train_jobs(configs, resume=False, screens=[QuietScreen() for _ in configs])
    start = read_records(tmp_path / "job-0" / "metrics.jsonl")[0]
    of_run = start["planned_memory_bytes"] - start["idle_memory_bytes"]  # this process did more
    assert of_run == pytest.approx(schedule["peak"] - remember_idle_bytes(), rel=0.25)


def taught(base, size):
    return replace(MEMORY, teacher_base=(base, None, "auto"), teacher=size)


def test_the_base_of_a_teacher_that_the_first_job_lacks_counts_once():
    a, b = taught("a", 100), taught("b", 70)
    assert other_teachers([a, taught("a", 130), b, taught("b", 60)]) == 70
    assert other_teachers([MEMORY, a]) == 100
    assert other_teachers([a]) == 0
    assert plan_jobs([MEMORY, a], None).peak == plan_jobs([MEMORY, MEMORY], None).peak + 100


def test_a_job_waits_until_there_is_room_for_the_base_of_its_teacher():
    jobs = [load(10), replace(load(10), memory=taught("a", 100))]
    held = round((2 * 100 + 200) / 0.8)  # values and optimizers of two jobs, and a step
    assert simulate([load(10)] * 2, held).training == 2
    assert simulate(jobs, held + 99).training == 1
    both = simulate(jobs, held + 100)
    assert both.training == 2 and both.peak == simulate([load(10)] * 2, held).peak + 100
