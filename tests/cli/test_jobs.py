"""Several jobs from one run file, and the grid of --sweep."""

import json
import os
import signal

import pytest
import yaml

from tests.support.tiny import save_tiny
from veneer.cli.config_file import read_settings
from veneer.cli.job_settings import read_jobs
from veneer.cli.main import main
from veneer.cli.training.file_jobs import begun_jobs
from veneer.cli.training.train_jobs import short_names
from veneer.errors import ConfigError
from veneer.training.config import RunConfig
from veneer.training.trainee import Trainee

ABOVE = {
    "base": "b",
    "data": {"train": "rows.jsonl", "validation_share": 0.2},
    "method": {"name": "lora", "rank": 4, "dropout": 0.1},
    "steps": 9,
}


def read(tmp_path, settings, flags=None, sets=(), sweep=None, draws=None):
    file = tmp_path / "jobs.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return read_jobs(read_settings(file), flags or {}, sets, {}, sweep, draws)


def test_a_file_without_jobs_and_a_command_without_a_sweep_are_one_run(tmp_path):
    assert read(tmp_path, {**ABOVE, "out": "o"}) is None


def test_a_run_file_is_read_once_so_it_may_be_a_pipe(tmp_path, capfd):
    reader, writer = os.pipe()
    folder = str(tmp_path / "no base")
    os.write(writer, yaml.safe_dump({**ABOVE, "base": folder, "out": "o"}).encode())
    os.close(writer)
    assert main(["train", f"/dev/fd/{reader}"]) == 2
    os.close(reader)
    error = capfd.readouterr().err
    assert folder in error and "is missing" not in error


def test_a_job_overrides_what_stands_above_it_key_by_key(tmp_path):
    jobs = [
        {"out": "a"},
        {"out": "b", "method": {"rank": 8}, "data": "other.jsonl", "steps": 3},
        {"out": "c", "method": "dora"},
        {"out": "d", "method": {"rank": 2, "name": "dora"}, "seed": 5},
    ]
    a, b, c, d = read(tmp_path, {**ABOVE, "jobs": jobs})
    assert (a.out, a.method.rank, a.method.dropout, a.steps) == ("a", 4, 0.1, 9)
    assert (b.method.rank, b.method.dropout, b.steps) == (8, 0.1, 3)
    assert (b.data.train, b.data.validation_share) == ("other.jsonl", 0.2)
    assert (c.method.name, c.method.dropout) == ("dora", 0.0)
    assert (d.method.name, d.method.rank, d.seed) == ("dora", 2, 5)


def test_flags_and_set_override_every_job(tmp_path):
    jobs = [{"out": "a", "seed": 1}, {"out": "b", "steps": 3}]
    found = read(tmp_path, {**ABOVE, "jobs": jobs}, {"steps": 5}, ["method.rank=7"])
    assert [(c.steps, c.method.rank, c.seed) for c in found] == [(5, 7, 1), (5, 7, 0)]


def test_a_sweep_is_the_grid_of_its_values_each_in_a_folder_of_its_own(tmp_path):
    sweep = [
        "learning_rate=3e-4,1e-3,3e-3",
        "rank=8,32",
        "method.targets=[q_proj],[q_proj, v_proj]",
    ]
    found = read(tmp_path, {**ABOVE, "out": "o"}, sweep=sweep)
    assert len({c.out for c in found}) == len(found) == 12
    assert found[0].out == "o/learning_rate-3e-4_rank-8_method.targets-q_proj"
    assert {(c.learning_rate, c.method.rank) for c in found} == {
        (rate, rank) for rate in (3e-4, 1e-3, 3e-3) for rank in (8, 32)
    }
    assert found[1].method.targets == ["q_proj", "v_proj"]


def test_a_sweep_over_methods_names_the_method_before_its_settings(tmp_path):
    found = read(tmp_path, {**ABOVE, "out": "o"}, sweep=["rank=2,3", "method=lora,dora"])
    assert [(c.method.name, c.method.rank) for c in found] == [
        ("lora", 2),
        ("lora", 3),
        ("dora", 2),
        ("dora", 3),
    ]


def test_a_sweep_that_gives_one_setting_twice_is_refused(tmp_path):
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path, {**ABOVE, "out": "o"}, sweep=["rank=8,16", "method.rank=4"])
    assert "--sweep gives method.rank 2 times" in str(refusal.value.faults)


@pytest.mark.parametrize("values", ["8,08", "8,+8", "8,16,8.0", "8,'8'", "8,1_6,16"])
def test_a_sweep_trains_no_setting_twice_under_two_spellings(values, tmp_path):
    jobs = [{"out": "a"}, {"out": "b"}]
    with pytest.raises(ConfigError, match=r"C314 --sweep: .* are the same settings: keep one"):
        read(tmp_path, {**ABOVE, "jobs": jobs}, sweep=[f"rank={values}"])
    found = read(tmp_path, {**ABOVE, "jobs": jobs}, sweep=["rank=8,16"])  # jobs may be alike
    assert [(c.out, c.method.rank) for c in found] == [
        (f"{out}/rank-{rank}", rank) for out in "ab" for rank in (8, 16)
    ]


def test_random_draws_are_within_their_ranges_and_follow_the_seed(tmp_path):
    sweep = [
        "learning_rate=log:1e-4..3e-3",
        "rank=log:2..64",
        "batch=1,2,8",
        "warmup=even:0..0.1",
        "keep=even:1..3",
    ]

    def drawn(seed):
        jobs = read(tmp_path, {**ABOVE, "out": "o"}, {"seed": seed}, sweep=sweep, draws=12)
        assert len({job.out for job in jobs}) == 12 and {job.seed for job in jobs} == {int(seed)}
        return [(j.learning_rate, j.method.rank, j.batch, j.warmup, j.keep) for j in jobs]

    first = drawn("3")
    assert first == drawn("3") != drawn("4")
    rates, ranks, batches, warmups, kept = zip(*first, strict=True)
    assert all(1e-4 <= rate <= 3e-3 for rate in rates) and min(rates) < 5e-4
    assert all(2 <= rank <= 64 for rank in ranks) and set(batches) <= {1, 2, 8}
    assert all(0 <= warmup <= 0.1 for warmup in warmups) and set(kept) <= {1, 2, 3}


def test_draws_from_lists_are_a_part_of_the_grid(tmp_path):
    found = read(tmp_path, {**ABOVE, "out": "o"}, sweep=["rank=2,3,4", "batch=1,2"], draws=5)
    assert len({(job.method.rank, job.batch) for job in found}) == 5


@pytest.mark.parametrize(
    ("sweep", "draws", "fault"),
    [
        ("learning_rate=log:1e-4..3e-3", None, "a range needs --draws"),
        ("learning_rate=log:3e-3..1e-4", 3, "LOW below HIGH"),
        ("learning_rate=log:0..1", 3, "above 0 for log"),
        ("learning_rate=even:x..1", 3, "write a range as"),
        ("rank=2,3", 3, "has only 2 different points"),
        ("learning_rate=log:1..5000", 30, "learning_rate"),
    ],
)
def test_ranges_that_cannot_be_drawn_from_are_refused(sweep, draws, fault, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path, {**ABOVE, "out": "o"}, sweep=[sweep], draws=draws)
    assert fault in str(refusal.value)


def test_every_fault_is_named_with_its_job(tmp_path):
    jobs = [{"out": "a", "seed": "x"}, {"seed": 3}, {"out": "c", "ranc": 3}, {"out": "d"}]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {**ABOVE, "steps": "many", "jobs": jobs}, {"out": "z"}, sweep=["rank", "=3"])
    text = str(caught.value)
    for part in ("(job a)", "job 2 is not", "'ranc'", "(job c)", "--out", "--sweep rank:", "=3:"):
        assert part in text, part
    assert text.count("steps") == 1  # a fault of all jobs is shown once


@pytest.mark.parametrize("jobs", [[], {}, "x", [3]])
def test_jobs_that_are_no_list_of_settings_are_refused(jobs, tmp_path):
    with pytest.raises(ConfigError, match="C315"):
        read(tmp_path, {**ABOVE, "jobs": jobs})


def test_jobs_are_named_by_what_their_folders_do_not_share():
    assert short_names(["r/a", "r/b/c"]) == ["a", "b/c"]


@pytest.fixture
def files(tmp_path):
    save_tiny(tmp_path / "base")
    lines = [json.dumps({"prompt": f"number {n}", "completion": f"it is {n}"}) for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "base": str(tmp_path / "base"),
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation_share": 0.3},
        "steps": 2,
        "batch": 2,
        "show_answers": False,
    }
    return tmp_path, settings


def test_train_writes_a_whole_run_for_every_job_and_a_table(files, capsys):
    tmp_path, settings = files
    jobs = [{"out": str(tmp_path / "a")}, {"out": str(tmp_path / "b"), "method": {"rank": 3}}]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({**settings, "jobs": jobs}))
    assert main(["train", str(tmp_path / "jobs.yaml")]) == 0
    for name in "ab":
        names = {path.name for path in (tmp_path / name).iterdir()}
        assert {"run.yaml", "metrics.jsonl", "adapter", "summary.json", "report.html"} <= names
        assert "jobs" not in (tmp_path / name / "run.yaml").read_text()
    shown = capsys.readouterr().out
    assert "  rank  " in shown and "held out" in shown


def test_train_of_a_sweep_prints_the_summaries_as_json(files, capsys):
    tmp_path, settings = files
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "out": str(tmp_path / "o")}))
    assert main(["train", str(tmp_path / "run.yaml"), "--json", "--sweep", "rank=2,3"]) == 0
    summaries = json.loads(capsys.readouterr().out)
    assert [summary["steps"] for summary in summaries] == [2, 2]
    assert (tmp_path / "o" / "rank-3" / "adapter").is_dir()


def test_jobs_that_cannot_start_are_refused_together(files, capsys):
    tmp_path, settings = files
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("")
    jobs = [
        {"out": str(tmp_path / "a")},
        {"out": str(tmp_path / "b"), "data": str(tmp_path / "none.jsonl")},
        {"out": str(tmp_path / "c")},
    ]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({**settings, "jobs": jobs}))
    assert main(["train", str(tmp_path / "jobs.yaml")]) == 2
    shown = capsys.readouterr().err
    assert "nothing is overwritten" in shown and "none.jsonl" in shown
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("flag", [["--processes", "2"], ["--fit", "2GiB"]])
def test_flags_that_several_jobs_cannot_take_are_refused_by_name(flag, files, capsys):
    tmp_path, settings = files
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "out": str(tmp_path / "o")}))
    assert main(["train", str(tmp_path / "run.yaml"), *flag, "--sweep", "rank=2,3"]) == 2
    assert flag[0] in capsys.readouterr().err


def test_interrupted_jobs_are_resumed_together_and_finished_ones_are_left_out(
    files, capsys, monkeypatch
):
    tmp_path, settings = files
    jobs = [{"out": str(tmp_path / "a"), "steps": 1}, {"out": str(tmp_path / "b"), "steps": 3}]
    jobs.append({"out": str(tmp_path / "c"), "steps": 4})
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({**settings, "jobs": jobs}))
    own = Trainee.begin_step

    def begin_step(self):
        if self.progress.step == 1 and self.inputs.steps == 3:
            os.kill(os.getpid(), signal.SIGINT)
        own(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "begin_step", begin_step)
        assert main(["train", str(tmp_path / "jobs.yaml")]) == 130
    folders = [str(tmp_path / name) for name in "abc"]
    error = capsys.readouterr().err
    assert f"Continue with: veneer train {tmp_path / 'jobs.yaml'} --resume" in error
    assert main(["train", "--resume", *folders]) == 0
    steps = [json.loads((tmp_path / n / "summary.json").read_text())["steps"] for n in "abc"]
    assert steps == [1, 3, 4]
    assert main(["train", "--resume", *folders]) == 2  # all are finished


@pytest.mark.parametrize("several", [True, False])
def test_what_is_interrupted_before_its_first_step_names_the_command_that_goes_on(
    several, files, capsys, monkeypatch
):
    tmp_path, settings = files
    out, run_file = tmp_path / "a", tmp_path / "run.yaml"
    jobs = {"jobs": [{"out": str(out)}, {"out": str(tmp_path / "b")}]}
    run_file.write_text(yaml.safe_dump({**settings, **(jobs if several else {"out": str(out)})}))
    own = Trainee.start

    def start(self):
        os.kill(os.getpid(), signal.SIGINT)
        own(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "start", start)
        assert main(["train", str(run_file)]) == 130
    again = ["train", str(run_file), "--resume"] if several else ["train", "--resume", str(out)]
    assert f"Continue with: veneer {' '.join(again)}" in capsys.readouterr().err
    assert main(again) == 0


NO_RESULTS = ["", "{", "[]", "null", "{}", '{"reason": 1}', '{"reason": "done", "steps": "x"}']


def test_a_damaged_result_of_a_finished_job_is_named_and_written_again(files, capsys):
    tmp_path, settings = files
    jobs = [{"out": str(tmp_path / "a"), "steps": 1}, {"out": str(tmp_path / "b"), "steps": 1}]
    run_file = tmp_path / "jobs.yaml"
    run_file.write_text(yaml.safe_dump({**settings, "jobs": jobs}))
    assert main(["train", str(run_file)]) == 0
    file = tmp_path / "a" / "summary.json"
    whole = json.loads(file.read_text())
    for text in [*NO_RESULTS, json.dumps({**whole, "held_out": {"loss": 3}})]:
        file.write_text(text)
        assert main(["train", str(run_file), "--resume"]) == 4, text
        assert str(file) in capsys.readouterr().err
    file.unlink()
    assert main(["train", str(run_file), "--resume"]) == 0
    again = json.loads(file.read_text())
    assert (again["steps"], again["held_out"]) == (1, whole["held_out"])


def test_halving_refuses_jobs_that_would_be_compared_after_other_rows(files, capsys):
    tmp_path, settings = files
    run = {**settings, "steps": 4, "out": str(tmp_path / "other-steps")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", str(tmp_path / "run.yaml"), "--sweep", "steps=2,4", "--halving"]) == 2
    assert "theirs are different numbers of rows" in capsys.readouterr().err
    assert not (tmp_path / "other-steps").exists()


def test_a_sweep_with_halving_ends_with_a_table_and_a_page(files, capsys):
    tmp_path, settings = files
    out = tmp_path / "o"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "steps": 4, "out": str(out)}))
    sweep = ["--sweep", "learning_rate=1e-6,1e-2", "batch=1,4"]
    assert main(["train", str(tmp_path / "run.yaml"), *sweep, "--halving"]) == 0
    output = capsys.readouterr()
    table = output.out[output.out.rindex("  learning_rate") :].splitlines()
    assert max(map(len, table[:5])) <= 80 and "(halved)" in table[4]
    assert table[-2].startswith("  best: ") and table[-1] == f"  page: {out / 'sweep.html'}"
    assert "halving compares after equal steps" in output.out + output.err
    page = (out / "sweep.html").read_text()
    assert (
        "http:" not in page
        and "https:" not in page
        and "<script" not in page
        and page.count("<polyline") > 8
    )
    reasons = [json.loads(p.read_text())["reason"] for p in out.glob("*/summary.json")]
    assert sorted(reasons) == ["done", "halving", "halving", "halving"]


def test_the_table_compares_batch_sizes_after_equal_tokens(files, capsys):
    tmp_path, settings = files
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**settings, "steps": 4, "out": str(tmp_path / "o")})
    )
    assert main(["train", str(tmp_path / "run.yaml"), "--sweep", "batch=1,4"]) == 0
    shown = capsys.readouterr().out
    assert "  at " in shown and "a larger batch sees more rows" in shown


def test_flags_of_a_sweep_are_refused_without_one(files, capsys):
    tmp_path, settings = files
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**settings, "out": str(tmp_path / "o")}))
    assert main(["train", str(tmp_path / "run.yaml"), "--halving", "--draws", "3"]) == 2
    assert "--draws, --halving: only with --sweep" in capsys.readouterr().err


def test_jobs_are_planned_each_and_together(tmp_path, capsys):
    base = save_tiny(tmp_path / "tiny")
    rows = [json.dumps({"prompt": f"row {n}", "completion": "is " * (n % 5 + 1)}) for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    jobs = [
        {"out": str(tmp_path / "runs" / "small"), "method": {"rank": 2}},
        {"out": str(tmp_path / "runs" / "dora"), "method": "dora", "batch": 4},
        {"out": str(tmp_path / "runs" / "large"), "method": {"rank": 32}, "steps": 12},
    ]
    file = tmp_path / "jobs.yaml"
    data = {"train": str(tmp_path / "rows.jsonl"), "validation_share": 0.2}
    file.write_text(yaml.safe_dump({"base": str(base), "data": data, "steps": 6, "jobs": jobs}))
    assert main(["plan", str(file), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    alone = [job["needed_memory_bytes"] for job in plan["jobs"]]
    together = plan["together"]
    assert [job["out"] for job in plan["jobs"]] == [job["out"] for job in jobs]
    assert max(alone) <= together["needed_memory_bytes"] < sum(alone)
    assert together["least_needed_memory_bytes"] <= together["needed_memory_bytes"]
    assert together["run_seconds_one_after_another"] == pytest.approx(
        sum(job["run_seconds"] for job in plan["jobs"])
    )
    assert main(["plan", str(file), "--set", "device=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "3 jobs" in shown and "dora" in shown and "together: " in shown
    assert main(["plan", str(file), "--memory", "1MB"]) == 3
    assert "does not fit" in capsys.readouterr().out
    assert main(["plan", str(file), "--compare", "--processes", "2"]) == 2
    assert "--compare, --processes" in capsys.readouterr().err
    jobs[0]["dtype"] = "float32"
    file.write_text(yaml.safe_dump({"base": str(base), "data": data, "steps": 6, "jobs": jobs}))
    assert main(["plan", str(file)]) == 2
    assert "dtype" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "chosen"), [("auto", "bfloat16"), ("bfloat16", "auto")])
def test_a_type_left_open_is_that_of_a_begun_run_only_if_that_run_left_it_open(
    given, chosen, tmp_path
):
    base = save_tiny(tmp_path / "tiny")
    begun, new = (
        RunConfig(base=str(base), data="d", out=str(tmp_path / name), dtype=dtype)
        for name, dtype in (("begun", given), ("new", "auto"))
    )
    (tmp_path / "begun").mkdir()
    settings = begun.model_dump(mode="json", exclude={"out"}) | {"dtype": "bfloat16"}
    (tmp_path / "begun" / "run.yaml").write_text(yaml.safe_dump(settings))
    jobs = begun_jobs([begun, new])
    assert [(job.resume, job.config.dtype) for job in jobs] == [(True, "bfloat16"), (False, chosen)]
