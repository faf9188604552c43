"""A run's folder: what another process, a damaged file, another base or a dead reader can and
cannot do to it."""

import contextlib
import errno
import importlib
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import veneer
from tests.support.helpers import run_where_it_may_only_be_read
from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.cli import main
from veneer.data.split import BY_THRESHOLD
from veneer.errors import (
    AdapterMismatchError,
    ConfigError,
    CorruptFileError,
    InputError,
    RunInterrupted,
    SourceError,
)
from veneer.files import atomic
from veneer.files.atomic import write_manifest
from veneer.files.lock import BusyError
from veneer.files.strict_json import read_json
from veneer.training import prepare
from veneer.training.config import RunConfig
from veneer.training.held_out import evaluations
from veneer.training.output.loggers import Logger
from veneer.training.output.records import Records, read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state import checkpoint
from veneer.training.state.checkpoint import newest_valid, numbers, save_checkpoint
from veneer.training.state.folder import resume_config
from veneer.training.state.place import locked_folder
from veneer.training.state.progress import load_state
from veneer.training.trainee import Trainee

fcntl = None if os.name == "nt" else importlib.import_module("fcntl")


class Hearing(QuietScreen):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a base and rows."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "base")
    lines = [json.dumps({"prompt": f"number {n}", "completion": f"it is {n}"}) for n in range(14)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(world, out, **settings):
    fields = {
        "base": str(world / "base"),
        "data": {"train": str(world / "rows.jsonl"), "validation_share": 0.2},
    }
    fields |= {"method": {"name": "lora", "rank": 2}, "steps": 6, "batch": 3, "evaluate_every": 2}
    return RunConfig.model_validate({**fields, "out": str(out), **settings})


def train(world, out, **settings):
    return run_training(config(world, out, **settings), resume=False, screen=QuietScreen())


def resume(out, screen=None):
    return run_training(resume_config(out), resume=True, screen=screen or QuietScreen())


class Death(BaseException):
    """The process is gone: nothing of ours catches it."""


def train_and_die(world, out, *, at, monkeypatch, **settings):
    """The process dies after the checkpoint of step `at`; None: before the first step."""
    own, own_step = Trainee.save, Trainee.begin_step

    def save(self):
        own(self)
        if self.progress.step == at:
            raise Death

    def step(self):
        if at is None:
            raise Death
        return own_step(self)

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(Trainee, "save", save)
        patch.setattr(Trainee, "begin_step", step)
        train(world, out, **settings)


def names(out):
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


# where a run begins


def test_a_run_that_died_before_its_first_checkpoint_begins_again_by_resume(
    world, tmp_path, monkeypatch
):
    train(world, tmp_path / "whole")
    train_and_die(world, tmp_path / "died", at=None, monkeypatch=monkeypatch)
    with pytest.raises(ConfigError, match="--resume"):
        train(world, tmp_path / "died")
    resume(tmp_path / "died")
    ours, theirs = (
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("died", "whole")
    )
    assert ours.read_bytes() == theirs.read_bytes()
    assert [r["kind"] for r in read_records(tmp_path / "died" / "metrics.jsonl")].count(
        "start"
    ) == 1


def test_what_a_process_left_before_it_wrote_anything_whole_does_not_forbid_a_run(world, tmp_path):
    out = tmp_path / "out"
    (out / ".partial-1-0").mkdir(parents=True)
    (out / ".lock").touch()
    train(world, out, steps=1)
    assert not [name for name in names(out) if ".partial" in name or ".lock" in name]


def test_a_run_that_is_refused_leaves_nothing_behind(world, tmp_path):
    with pytest.raises(InputError):
        train(world, tmp_path / "out", base=str(tmp_path / "no base"))
    assert names(tmp_path) == []


def test_remains_of_a_process_that_died_go_when_the_run_is_resumed(world, tmp_path, monkeypatch):
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    for place in (tmp_path / ".partial-1-0", tmp_path / "checkpoints" / ".partial-1-0"):
        place.mkdir()
        (place / "state.safetensors").write_bytes(b"half")
    resume(tmp_path)
    assert not [name for name in names(tmp_path) if "partial" in name]


def test_a_run_that_ran_out_of_patience_stops_there_when_it_dies_before_its_result(
    world, tmp_path, monkeypatch
):
    losses = iter([9.0, 1.0, 2.0, 3.0, 4.0, 0.5, 0.4])
    monkeypatch.setattr(evaluations, "mean_loss", lambda rows, nats: next(losses))
    train_and_die(world, tmp_path, at=6, monkeypatch=monkeypatch, steps=20, patience=2)
    summary = resume(tmp_path)
    assert (summary["reason"], summary["steps"], summary["best_step"]) == ("early_stop", 6, 2)


# what it must find again


def test_another_base_in_the_same_place_is_refused_with_both_sides(world, tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    train_and_die(world, tmp_path / "out", at=2, monkeypatch=monkeypatch, base=str(base))
    save_tiny(base, seed=1)
    with pytest.raises(AdapterMismatchError, match=r"values of the weights: \w+… against \w+…"):
        resume(tmp_path / "out")
    save_tiny(base)
    assert resume(tmp_path / "out")["steps"] == 6


@pytest.mark.parametrize("began", ["now", "earlier"])
def test_an_edited_config_beside_the_same_weights_is_refused(began, world, tmp_path, monkeypatch):
    """A run that an earlier version began kept samples of the weights alone: the config is not
    compared."""
    base = save_tiny(tmp_path / "base")
    train_and_die(world, tmp_path / "out", at=2, monkeypatch=monkeypatch, base=str(base))
    path = base / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.01'))
    if began == "now":
        with pytest.raises(
            AdapterMismatchError, match=r"config.json rms_norm_eps: 1e-06 against 0.01"
        ):
            resume(tmp_path / "out")
    else:
        checkpoint = tmp_path / "out" / "checkpoints" / "000002"
        state = json.loads((checkpoint / "state.json").read_text())
        state["origin"]["base"] = Fingerprint.from_dict(state["origin"]["base"]).earlier.to_dict()
        (checkpoint / "state.json").write_text(json.dumps(state))
        (checkpoint / "MANIFEST.json").unlink()
        write_manifest(checkpoint)
        assert resume(tmp_path / "out")["steps"] == 6


@pytest.mark.parametrize("what", ["tokenizer", "chat template"])
def test_another_tokenizer_or_template_is_refused(what, world, tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    train_and_die(world, tmp_path / "out", at=2, monkeypatch=monkeypatch, base=str(base))
    tokenizer = tiny_tokenizer()
    if what == "tokenizer":
        tokenizer.add_tokens(["number"])
    else:
        tokenizer.chat_template += " "
    tokenizer.save_pretrained(base)
    with pytest.raises(AdapterMismatchError, match=what):
        resume(tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", 9), ("learning_rate", 0.5), ("method", {"name": "lora", "rank": 4})],
    ids=str,
)
def test_settings_that_were_changed_in_run_yaml_are_refused_with_both_sides(
    setting, value, world, tmp_path, monkeypatch
):
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    file = tmp_path / "run.yaml"
    stored = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**stored, setting: value}))
    with pytest.raises(ConfigError, match="not what the run started with") as caught:
        resume(tmp_path)
    assert any(
        fault.startswith(setting) and "then" in fault and "now" in fault
        for fault in caught.value.faults
    )
    file.write_text(
        yaml.safe_dump({**stored, "keep": 5, "checkpointing": True})
    )  # changes nothing that is learnt
    assert resume(tmp_path)["steps"] == 6


def test_a_state_of_another_version_is_refused_by_name(world, tmp_path, monkeypatch):
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    path = tmp_path / "checkpoints" / "000002"
    state = read_json(path / "state.json")
    del state["origin"]["base"]
    save_checkpoint(tmp_path / "checkpoints", 4, checkpoint.load_checkpoint(path)[0], state)
    with pytest.raises(CorruptFileError, match="version"):
        resume(tmp_path)


def test_a_run_that_began_with_other_masks_of_dropout_is_refused_and_one_without_goes_on(
    world, tmp_path, monkeypatch
):
    def write_run_of_earlier_version(out, **settings):
        train_and_die(world, out, at=2, monkeypatch=monkeypatch, **settings)
        path = out / "checkpoints" / "000002"
        tensors, state = checkpoint.load_checkpoint(path)
        assert state["origin"].pop("masks") == "prefix"
        save_checkpoint(
            out / "checkpoints",
            2,
            {name: tensor.clone() for name, tensor in tensors.items()},
            state,
        )

    write_run_of_earlier_version(
        tmp_path / "drops", method={"name": "lora", "rank": 2, "dropout": 0.1}
    )
    with pytest.raises(ConfigError, match="with other masks of dropout") as caught:
        resume(tmp_path / "drops")
    assert "masks then by row, now by prefix" in str(
        caught.value
    ) and "the version that began it" in str(caught.value)
    assert numbers(tmp_path / "drops" / "checkpoints") == [2] and caught.value.exit_code == 2
    write_run_of_earlier_version(tmp_path / "plain", method={"name": "lora", "rank": 2})
    assert resume(tmp_path / "plain")["steps"] == 6


def rewrite_as_first_layout(out, step):
    """The checkpoint as versions wrote it that kept the progress, the day and the rows alone; and
    their run.yaml."""
    folder = out / "checkpoints"
    tensors, state = checkpoint.load_checkpoint(folder / f"{step:06d}")
    origin, progress = state["origin"], state["progress"]
    del progress["losses"]
    progress["sample"] = {"before": "as it was: \0"}
    save_checkpoint(folder, step, tensors, {})
    text = json.dumps({**progress, "date": origin["date"], "data": origin["data"]})
    (folder / f"{step:06d}" / "state.json").write_text(text)
    write_manifest(folder / f"{step:06d}")
    stored = yaml.safe_load((out / "run.yaml").read_text())
    (out / "run.yaml").write_text(yaml.safe_dump({**stored, "dtype": "auto"}))


def test_a_run_of_the_first_layout_goes_on_bit_for_bit_and_says_what_is_not_compared(
    world, tmp_path, monkeypatch
):
    monkeypatch.setattr(prepare, "HELD_OUT_BY", BY_THRESHOLD)  # as that version held rows out
    train(world, tmp_path / "whole")
    train_and_die(world, tmp_path / "died", at=2, monkeypatch=monkeypatch)
    rewrite_as_first_layout(tmp_path / "died", 2)
    hearing = Hearing()
    resume(tmp_path / "died", hearing)
    assert any("is not compared" in each for each in hearing.said)
    ours, theirs = (
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("died", "whole")
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_of_the_first_layout_that_stops_again_goes_on_again(world, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HELD_OUT_BY", BY_THRESHOLD)  # as that version held rows out
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    rewrite_as_first_layout(tmp_path, 2)
    own = Trainee.save

    def save(self):
        own(self)
        raise Death

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(Trainee, "save", save)
        resume(tmp_path)
    assert load_state(tmp_path / "checkpoints" / "000004").origin.base is not None
    assert resume(tmp_path)["steps"] == 6


@pytest.mark.parametrize(
    ("text", "error"),
    [("a: [", SourceError), ("- 1", SourceError), ("steps: 0\nbatsh: 3", ConfigError)],
)
def test_a_run_file_that_describes_no_run_is_an_error_from_python_too(text, error, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(error, match=r"run\.yaml"):
        resume_config(tmp_path)


def test_a_run_file_of_an_earlier_version_may_stop_before_its_first_checkpoint_and_later(
    world, tmp_path, monkeypatch
):
    train_and_die(world, tmp_path, at=None, monkeypatch=monkeypatch)
    stored = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({**stored, "dtype": "auto"})
    )  # as it was once written
    own = Trainee.save

    def save(self):
        own(self)
        raise Death

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(Trainee, "save", save)
        resume(tmp_path)
    assert resume(tmp_path)["steps"] == 6


def test_a_setting_that_the_starting_version_did_not_know_had_its_default(
    world, tmp_path, monkeypatch
):
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    path = tmp_path / "checkpoints" / "000002"
    tensors, state = checkpoint.load_checkpoint(path)
    del state["origin"]["settings"]["patience"]
    save_checkpoint(tmp_path / "checkpoints", 2, tensors, state)
    assert resume(tmp_path)["steps"] == 6


def test_a_setting_that_only_the_starting_version_knows_is_refused_by_name(
    world, tmp_path, monkeypatch
):
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    tensors, state = checkpoint.load_checkpoint(tmp_path / "checkpoints" / "000002")
    state["origin"]["settings"]["momentum"] = 0.9
    save_checkpoint(tmp_path / "checkpoints", 2, tensors, state)
    with pytest.raises(ConfigError, match="momentum"):
        resume(tmp_path)


def test_records_that_are_gone_are_an_error_and_an_empty_file_is_the_way_on(
    world, tmp_path, monkeypatch
):
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(CorruptFileError, match="touch"):
        resume(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    resume(tmp_path)
    steps = [r["step"] for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "step"]
    assert steps == [3, 4, 5, 6]


# one process at a time


def test_a_second_process_in_one_run_is_refused(world, tmp_path, monkeypatch):
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    context = multiprocessing.get_context("fork")
    holds, over = context.Event(), context.Event()

    def hold():
        with locked_folder(tmp_path):
            holds.set()
            over.wait(60)

    other = context.Process(target=hold)
    other.start()
    try:
        assert holds.wait(60)
        with pytest.raises(BusyError, match="busy"):
            resume(tmp_path)
    finally:
        over.set()
        other.join()
    resume(tmp_path)
    steps = [r["step"] for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert ".lock" not in names(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(world, tmp_path, monkeypatch):
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match="cannot be written"):
            resume(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_disk_that_may_only_be_read_is_an_error_and_no_bug_of_ours(world, tmp_path, monkeypatch):
    train_and_die(world, tmp_path, at=2, monkeypatch=monkeypatch)
    before = names(tmp_path)
    code = f"""
from veneer.cli.main import main
for line in (["train", "--resume", {str(tmp_path)!r}], ["report", {str(tmp_path)!r}]):
    if main(line) != 2:
        sys.exit(f"not refused as it should be: {{line}}")
"""
    done = run_where_it_may_only_be_read(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("Read-only file system") == 2
    assert names(tmp_path) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows locks every file system alike")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_as_one_and_not_as_another_process(
    number, tmp_path, monkeypatch
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(InputError, match="cannot be locked") as told,
        locked_folder(tmp_path / "out"),
    ):
        pass
    assert not isinstance(told.value, BusyError) and told.value.next_step


def test_many_processes_lock_in_turn_although_each_removes_the_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    file = tmp_path / "count"
    file.write_text("0")

    def add():
        for _ in range(30):
            while True:
                with contextlib.suppress(BusyError), locked_folder(tmp_path):
                    file.write_text(str(int(file.read_text()) + 1))
                    break

    others = [context.Process(target=add) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert file.read_text() == "120"


# checkpoints


def tensors(seed=0):
    return {"values": torch.randn(5, generator=torch.Generator().manual_seed(seed))}


def test_pruning_takes_nothing_for_a_damaged_checkpoint(tmp_path):
    for step in range(1, 5):
        save_checkpoint(tmp_path, step, tensors(step), {})
    for step in (3, 4):
        damage(tmp_path / f"{step:06d}" / "state.safetensors")
    checkpoint.prune(tmp_path, keep=2, best=None)
    assert numbers(tmp_path) == [1, 2, 3, 4]
    save_checkpoint(tmp_path, 5, tensors(5), {})
    checkpoint.prune(tmp_path, keep=2, best=None)
    assert numbers(tmp_path) == [2, 3, 4, 5]
    assert newest_valid(tmp_path)[0].name == "000005"
    save_checkpoint(tmp_path, 6, tensors(6), {})
    checkpoint.prune(tmp_path, keep=2, best=2)
    assert numbers(tmp_path) == [2, 5, 6]


def test_a_checkpoint_on_a_bad_sector_is_skipped_and_told(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(step), {})
    own = atomic.file_hash

    def bad(path):
        if path.parent.name == "000002" and path.name == "state.safetensors":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return own(path)

    monkeypatch.setattr(atomic, "file_hash", bad)
    path, faults = newest_valid(tmp_path)
    assert path.name == "000001" and faults == [
        "000002: state.safetensors cannot be read: Input/output error"
    ]


def test_a_removal_that_was_left_half_way_is_ended_by_the_next_one(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, tensors(step), {})
    (tmp_path / "000001" / "MANIFEST.json").unlink()
    checkpoint.prune(tmp_path, keep=5, best=2)
    assert numbers(tmp_path) == [2, 3]


def test_the_summary_counts_the_tokens_of_every_step(world, tmp_path):
    summary = run_training(config(world, tmp_path, steps=3), resume=False, screen=QuietScreen())
    steps = [
        record for record in read_records(tmp_path / "metrics.jsonl") if record["kind"] == "step"
    ]
    assert summary["trained_tokens"] == sum(step["trained_tokens"] for step in steps) > 0


def test_a_removal_that_fails_half_way_leaves_no_checkpoint(tmp_path, monkeypatch):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, tensors(step), {})

    def fails(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", fails)
    with pytest.raises(OSError):
        checkpoint.prune(tmp_path, keep=1, best=None)
    assert (tmp_path / "000001" / "state.safetensors").is_file()
    assert not (tmp_path / "000001" / "MANIFEST.json").exists()


def test_a_damaged_best_checkpoint_leaves_the_next_best_and_says_so(world, tmp_path, monkeypatch):
    losses = iter([9.0, 1.0, 3.0, 2.0, 5.0, 4.0])
    monkeypatch.setattr(evaluations, "mean_loss", lambda rows, nats: next(losses))
    own = Trainee.take_best

    def after_damage(self):
        damage(self.inputs.out / "checkpoints" / "000002" / "state.safetensors")
        own(self)

    monkeypatch.setattr(Trainee, "take_best", after_damage)
    screen = Hearing()
    made = config(world, tmp_path, steps=10, keep=3)
    summary = run_training(made, resume=False, screen=screen)
    assert (summary["best_step"], summary["validation_loss"]) == (6, 2.0)
    assert (
        summary["damaged_best"]["step"] == 2
        and "state.safetensors" in summary["damaged_best"]["faults"][0]
    )
    assert any("000002" in text and "damaged" in text for text in screen.said)
    assert any("step 6" in text for text in screen.said)
    values = checkpoint.load_values(tmp_path / "checkpoints" / "000006")
    assert values.norm() > 0 and load_file(tmp_path / "adapter" / "adapter_model.safetensors")


# what is written can be read


@pytest.mark.parametrize(("keep", "left"), [(None, [6]), (1, [2, 6]), (2, [2, 4, 6])])
def test_a_finished_run_keeps_its_newest_checkpoint_unless_keep_says_more(
    world, tmp_path, monkeypatch, keep, left
):
    losses = iter([9.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(evaluations, "mean_loss", lambda rows, nats: next(losses))
    train_and_die(world, tmp_path, at=4, monkeypatch=monkeypatch, keep=keep)
    assert numbers(tmp_path / "checkpoints") == [2, 4], "an unfinished run keeps what it may need"
    assert resume(tmp_path)["best_step"] == 2
    assert numbers(tmp_path / "checkpoints") == left
    with pytest.raises(ConfigError, match="is finished"):
        resume(tmp_path)


def test_a_best_checkpoint_that_somebody_removed_leaves_a_result_too(world, tmp_path, monkeypatch):
    losses = iter([9.0, 1.0, 2.0, 3.0])
    own = Trainee.save

    def save(self):
        own(self)
        shutil.rmtree(
            self.inputs.out / "checkpoints" / "000002", ignore_errors=True
        )  # there was no room left

    monkeypatch.setattr(evaluations, "mean_loss", lambda rows, nats: next(losses))
    monkeypatch.setattr(Trainee, "save", save)
    summary = train(world, tmp_path / "out")
    assert summary["damaged_best"]["step"] == 2 and summary["best_step"] == 4


def test_a_nul_or_half_a_character_in_an_answer_does_not_end_a_run(world, tmp_path, monkeypatch):
    def save(self):
        self.progress.sample = {"before": "a\0b\ud800 \x1b[0m" + "x" * 10}
        own(self)
        raise Death

    own = Trainee.save
    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(Trainee, "save", save)
        train(world, tmp_path)
    assert load_state(newest_valid(tmp_path / "checkpoints")[0]).progress.sample == {
        "before": "a\ufffdb\ufffd \x1b[0m" + "x" * 10
    }
    assert resume(tmp_path)["steps"] == 6


@pytest.mark.parametrize(
    "settings",
    [["clip=.inf"], ["data.train=a\udcff.jsonl"], ['data.train="a\\0"'], ["out=a\udcff"]],
    ids=ascii,
)
def test_what_could_not_be_written_at_the_end_is_refused_before_the_first_step(
    settings, world, tmp_path, capsys
):
    arguments = [f"--set={setting}" for setting in settings]
    given = [
        "--base",
        str(world / "base"),
        "--data",
        str(world / "rows.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main.main(["train", *given, *arguments]) == 2
    err = capsys.readouterr().err
    assert settings[0].partition("=")[0] in err and "Traceback" not in err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "command", [["evaluate", "--max-new-tokens", "2"], ["data", "check"]], ids=" ".join
)
def test_a_file_whose_name_is_no_utf_8_is_refused_by_every_command(command, world, capsys):
    line = [
        *command,
        "--base",
        str(world / "base"),
        "rows\udced" if "check" in command else "--data=rows\udced",
    ]
    assert main.main(line) == 2
    err = capsys.readouterr().err
    assert "not UTF-8" in err and "Traceback" not in err


def test_settings_that_are_wrong_are_all_told_in_python_too(world, tmp_path):
    with pytest.raises(ConfigError) as told:
        veneer.train(
            str(world / "base"),
            "rows.jsonl",
            out=tmp_path / "out",
            steps=0,
            nonsense=1,
            batch="many",
        )
    said = ["C310 steps is 0", "C310 batch is 'many'", "C312 unknown key 'nonsense'"]
    assert [fault.split(":")[0] for fault in told.value.faults] == said


# who listens


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(tmp_path):
    sent, said = [], []

    def fail(values, step):
        raise ConnectionError("gone")

    bad = Logger(fail, lambda: None, "wandb")
    good = Logger(lambda values, step: sent.append(step), lambda: 1 / 0, "mlflow")
    with Records(tmp_path / "m.jsonl", listeners=[bad, good], say=said.append) as records:
        for step in (1, 2):
            records.write({"kind": "step", "step": step, "loss": 1.0})
    assert sent == [1, 2] and len(read_records(tmp_path / "m.jsonl")) == 2
    assert [text.split(":")[0] for text in records.failed] == ["wandb", "mlflow"]
    assert "gone" in said[0]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_and_a_polite_end_save_a_checkpoint_even_when_told_twice(
    number, world, tmp_path, monkeypatch
):
    own = Trainee.begin_step

    def step(self):
        if self.progress.step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return own(self)

    monkeypatch.setattr(Trainee, "begin_step", step)
    with pytest.raises(RunInterrupted):
        train(world, tmp_path)
    assert numbers(tmp_path / "checkpoints")[-1] == 3


def test_a_signal_that_was_to_be_ignored_is_ignored(world, tmp_path, monkeypatch):
    """As under nohup."""
    own = Trainee.begin_step

    def step(self):
        os.kill(os.getpid(), signal.SIGHUP)
        return own(self)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(Trainee, "begin_step", step)
        assert train(world, tmp_path)["steps"] == 6
    finally:
        signal.signal(signal.SIGHUP, before)


# its page


def test_a_page_that_was_not_written_is_written_by_report(world, tmp_path, monkeypatch, capsys):
    train_and_die(world, tmp_path / "a", at=2, monkeypatch=monkeypatch)
    assert main.main(["report", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "report.html")
    assert "not finished" in (tmp_path / "a" / "report.html").read_text()
    assert main.main(["report", str(tmp_path)]) == 2
