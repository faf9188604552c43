"""A job whose records or report cannot be written ends alone: the others train to their end."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.tiny import save_tiny
from veneer import runs
from veneer.errors import ConfigError, VeneerError
from veneer.training import loop
from veneer.training.config import RunConfig
from veneer.training.job import JobRun
from veneer.training.output.screen import QuietScreen
from veneer.training.trainee import Trainee

FULL_DISK = Path("/dev/full")


@pytest.fixture
def configs(tmp_path):
    """A job that is to fail, and one with more steps."""
    save_tiny(tmp_path / "base")
    rows = [json.dumps({"prompt": f"row {n}", "completion": "is " * (n % 5 + 1)}) for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    fields = {
        "base": str(tmp_path / "base"),
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation_share": 0.2},
        "method": {"name": "lora", "rank": 2},
        "batch": 2,
        "show_answers": False,
    }
    return [
        RunConfig.model_validate({**fields, "out": str(tmp_path / out), "steps": steps})
        for out, steps in (("bad", 2), ("good", 4))
    ]


def train(configs):
    return runs.train_jobs(configs, resume=False, screens=[QuietScreen() for _ in configs])


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs a device that is always full")
def test_records_that_cannot_be_written_end_their_job_alone(configs, monkeypatch):
    begin_step = Trainee.begin_step

    def begin_on_full_disk(trainee):
        if trainee.inputs.out.name == "bad" and trainee.progress.step == 1:
            trainee.records._file = FULL_DISK.open("w")
        begin_step(trainee)

    monkeypatch.setattr(Trainee, "begin_step", begin_on_full_disk)
    failed, summary = train(configs)
    assert isinstance(failed, VeneerError) and summary["steps"] == 4
    assert (Path(configs[1].out) / "summary.json").exists()


def test_a_report_that_cannot_be_written_ends_its_job_alone(configs, monkeypatch):
    write_report = runs.write_report

    def write_one(folder):
        if folder.name == "bad":
            raise VeneerError("the report cannot be written")
        return write_report(folder)

    monkeypatch.setattr(runs, "write_report", write_one)
    failed, summary = train(configs)
    assert isinstance(failed, VeneerError) and "report" in failed.headline
    assert summary["steps"] == 4


def test_a_folder_removed_in_training_ends_its_job_and_says_what_to_do(configs, monkeypatch):
    begin_step, folder = Trainee.begin_step, Path(configs[0].out)

    def begin_after_removal(trainee):
        if trainee.inputs.out == folder and trainee.progress.step == 1:
            shutil.rmtree(folder)
        begin_step(trainee)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "begin_step", begin_after_removal)
        failed, summary = train(configs)
    assert f"{folder} was removed" in failed.headline and "move it away" in failed.headline
    assert summary["steps"] == 4 and (folder / "adapter").is_dir()
    folder.rename(folder.with_name("moved"))
    assert train(configs[:1])[0]["steps"] == 2


@pytest.mark.parametrize("kind", [ConfigError, RuntimeError])
@pytest.mark.parametrize("cause", ["a job", "several jobs together"])
def test_an_error_in_a_joint_forward_ends_only_the_job_that_causes_it(
    cause, kind, configs, monkeypatch, tmp_path
):
    """An adapter may refuse the rows that a module gets, in forward or backward; or only a part of
    them, and then the job trains alone."""
    forward_backward, sizes = loop.forward_backward, []

    def refusing(micro_batches):
        folders = [micro_batch.gradient.inputs.out.name for micro_batch in micro_batches]
        forward_backward(micro_batches)  # part of it may be in the buffers
        sizes.append(len(folders))
        is_late = micro_batches[0].gradient.step > 0
        if is_late and ("bad" in folders if cause == "a job" else len(folders) > 1):
            raise kind("a module gets other rows")

    monkeypatch.setattr(loop, "forward_backward", refusing)
    third = configs[1].model_copy(update={"out": str(tmp_path / "third"), "seed": 5})
    bad, *good = train([*configs, third])
    if cause == "a job":
        assert isinstance(bad, VeneerError) and "other rows" in bad.headline
        assert sizes[-1] == 2  # the others share forwards again
    else:
        assert bad["steps"] == 2 and sizes[-1] == 1
    monkeypatch.undo()
    for summary, config in zip(good, (configs[1], third), strict=True):
        alone = config.model_copy(update={"out": f"{config.out}-alone"})
        (expected,) = train([alone])
        assert summary["last_loss"] == pytest.approx(expected["last_loss"], rel=2e-6)
        assert summary["steps"] == 4


WORK = [
    (Trainee, "begin_step"),
    (Trainee, "end_step"),
    (Trainee, "evaluate"),
    (Trainee, "save"),
    (Trainee, "take_best"),
    (JobRun, "write"),
]


@pytest.mark.parametrize(("owner", "name"), WORK)
def test_a_bug_in_the_work_of_one_job_ends_that_job_alone(owner, name, configs, monkeypatch):
    own = getattr(owner, name)

    def broken(self):
        inputs = self.inputs if owner is Trainee else self.prepared.inputs
        if inputs.out.name == "bad" and (owner is JobRun or self.progress.step == 2):
            raise RuntimeError("index 5 is out of bounds")
        return own(self)

    configs[0] = configs[0].model_copy(update={"steps": 3 if name.endswith("_step") else 2})
    monkeypatch.setattr(owner, name, broken)
    failed, summary = train(configs)
    assert "bug in Veneer: RuntimeError: index 5" in failed.headline
    assert any("in broken" in fault for fault in failed.faults)
    assert summary["steps"] == 4 and (Path(configs[1].out) / "adapter").is_dir()


def test_a_bug_in_a_run_alone_is_raised_as_it_is(configs, monkeypatch):
    def broken(self):
        raise RuntimeError("index 5 is out of bounds")

    monkeypatch.setattr(Trainee, "evaluate", broken)
    with pytest.raises(RuntimeError, match="index 5"):
        train(configs[:1])
