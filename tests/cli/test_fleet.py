"""Many jobs from a template: one for each file, what the screen shows, resuming, the library."""

import json
import shutil

import pytest
import yaml

from tests.support.tiny import save_tiny
from veneer.cli.config_file import read_settings
from veneer.cli.job_settings import read_jobs
from veneer.cli.main import main
from veneer.errors import ConfigError, VeneerError
from veneer.library.library import Library
from veneer.training.trainee import Trainee

NAMES = [f"desk-{number}" for number in range(7)]


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """A folder with seven files of rows, and a run file with a job for each."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    (tmp_path / "desks").mkdir()
    for name in NAMES:
        rows = [json.dumps({"prompt": f"row {n}", "completion": f"{name} {n}"}) for n in range(6)]
        (tmp_path / "desks" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    write(tmp_path, [{"files": "desks/*.jsonl", "out": "runs/{name}"}])
    return tmp_path


def write(folder, jobs, **settings):
    above = {
        "base": "base",
        "data": {"validation_share": 0.3},
        "steps": 2,
        "batch": 2,
        "show_answers": False,
        "jobs": jobs,
    }
    (folder / "fleet.yaml").write_text(yaml.safe_dump({**above, **settings}))


def read(folder, jobs):
    write(folder, jobs)
    return read_jobs(read_settings(folder / "fleet.yaml"), {}, (), {}, None)


def test_a_template_is_one_job_for_each_file(fleet):
    (fleet / "desks" / "all.csv.gz").write_bytes(b"")
    jobs = read(
        fleet,
        [
            {
                "files": "desks/*",
                "out": "runs/{name}",
                "data": {"validation": "held-out/{name}.jsonl"},
                "method": {"name": "lora", "rank": 3},
            },
            {"out": "runs/alone", "data": {"train": "desks/desk-1.jsonl"}},
        ],
    )
    assert [job.out for job in jobs] == [f"runs/{n}" for n in ("all", *NAMES, "alone")]
    assert jobs[1].data.train == "desks/desk-0.jsonl"
    assert jobs[1].data.validation == "held-out/desk-0.jsonl" and jobs[1].method.rank == 3


NO_PATTERNS = ["", ".", "..", "/", "a**", "**a/b", "[a", "a\0b", "x" * 300, "~nobody/*"]


@pytest.mark.parametrize(
    ("job", "fault"),
    [
        ({"files": "none/*.jsonl", "out": "runs/{name}"}, "no file matches 'none/*.jsonl'"),
        *(({"files": text, "out": "runs/{name}"}, repr(text)) for text in NO_PATTERNS),
        ({"files": 3, "out": "runs/{name}"}, "no file matches 3"),
        ({"files": "desks/*.jsonl", "out": "runs/one"}, "write {name} in out"),
        ({"files": "desks/*.jsonl", "out": "r/{name}", "data": "x.jsonl"}, "leave data out"),
    ],
)
def test_templates_that_describe_no_jobs_are_refused(job, fault, fleet):
    with pytest.raises(ConfigError) as refusal:
        read(fleet, [job])
    assert fault in str(refusal.value)


def test_a_fleet_goes_on_after_a_failure_and_is_in_the_library(fleet, capsys, monkeypatch):
    own = Trainee.begin_step

    def begin_step(self):
        if self.inputs.out.name == "desk-3" and self.progress.step == 1:
            raise VeneerError("no further", ["a fault"])
        own(self)

    train = ["train", "fleet.yaml", "--library", "shelf"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "begin_step", begin_step)
        assert main(train) == 1
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("step" in line and "desk-" in line for line in lines) == 0  # no lines of steps
    assert any(line.startswith("  desk-3  failed: no further · ") for line in lines)
    assert lines[-2].split() == ["desk-3", "desks/desk-3.jsonl", "failed"]  # last of the table
    assert lines[-1] == "next: veneer serve --base base --library shelf"
    assert "1 of 7 jobs failed:\n  runs/desk-3: no further\n  runs/desk-3: a fault" in output.err
    assert "veneer train fleet.yaml --library shelf --resume" in output.err
    assert {entry.name for entry in Library("shelf").entries()} == {*NAMES} - {"desk-3"}

    shutil.rmtree("runs/desk-5")  # one has begun, and this one is new
    assert main([*train, "--resume"]) == 0
    assert "5 are finished" in capsys.readouterr().out
    assert {entry.name for entry in Library("shelf").entries()} == {*NAMES}
    assert main([*train, "--resume", "--json"]) == 0  # nothing is left, and nothing is made twice
    summaries = json.loads(capsys.readouterr().out)
    assert [summary["steps"] for summary in summaries] == [2] * 7
    names = {entry.reference for entry in Library("shelf").entries()}
    assert names == {*(f"{name}@1" for name in NAMES if name != "desk-5"), "desk-5@2"}

    write(fleet, [{"files": "desks/*.jsonl", "out": "runs/{name}"}], steps=3)
    assert main([*train, "--resume"]) == 2
    assert "runs/desk-0: steps is 3 now, and was 2" in capsys.readouterr().err


def test_the_library_takes_only_adapters_that_get_a_name_of_their_own(fleet, capsys):
    write(fleet, [{"out": f"{folder}/desk", "data": "desks/desk-1.jsonl"} for folder in "ab"])
    assert main(["train", "fleet.yaml", "--library", "shelf"]) == 2
    assert "a/desk: another job's folder has the name desk, too" in capsys.readouterr().err
    assert not (fleet / "shelf").exists() and not (fleet / "a").exists()


def test_jobs_that_name_files_and_adapters_go_on(fleet, capsys):
    write(fleet, [{"out": "runs/first", "data": "desks/desk-0.jsonl"}])
    assert main(["train", "fleet.yaml", "--quiet"]) == 0
    (fleet / "prompt.txt").write_text("Answer as the desk does.")
    taught = {"name": "distil", "document": "prompt.txt", "teacher": "runs/first"}
    jobs = [
        {"out": "runs/replay", "replay": {"rows": "desks/desk-1.jsonl"}},
        {"out": "runs/taught", "objective": taught},
        {"out": "runs/further", "from_adapter": "runs/first"},
    ]
    write(fleet, [{**job, "data": "desks/desk-0.jsonl"} for job in jobs])
    assert main(["train", "fleet.yaml", "--quiet"]) == 0
    assert main(["train", "fleet.yaml", "--quiet", "--resume"]) == 0, capsys.readouterr().err
    jobs[1]["objective"] = {**taught, "teacher": "runs/further"}
    write(fleet, [{**job, "data": "desks/desk-0.jsonl"} for job in jobs])
    assert main(["train", "fleet.yaml", "--quiet", "--resume"]) == 2
    assert "objective.teacher is" in capsys.readouterr().err


def test_one_run_of_a_file_begins_or_goes_on_with_resume(fleet, capsys):
    write(fleet, [])
    settings = yaml.safe_load((fleet / "fleet.yaml").read_text())
    del settings["jobs"]
    settings |= {"data": "desks/desk-1.jsonl", "out": "one"}
    (fleet / "one.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", "one.yaml", "--resume", "--library", "shelf"]) == 0
    assert "in the library as one@1" in capsys.readouterr().out
    assert main(["train", "one.yaml", "--resume"]) == 2
    assert "is finished" in capsys.readouterr().err
    assert main(["train", "--resume", "one.yaml"]) == 2
    assert "veneer train one.yaml --resume" in capsys.readouterr().err
