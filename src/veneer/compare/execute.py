"""One run, one evaluation: each in a process of its own, found again when it is asked for a second time.

A process of its own makes its peak memory its own. The folder of a run is named by a hash of all that its figures
depend on (settings, rows, the base's files, programs, machine), so a comparison that is started again finds what is
finished, continues what has a checkpoint, and a comparison with other candidates or more seeds re-uses the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from veneer.child import environment_for, module_command
from veneer.compare.circumstances import folder_hash
from veneer.compare.plan import Candidate, Comparison
from veneer.errors import DataError, Interrupted, VeneerError
from veneer.evaluate.general import BUILT_IN
from veneer.evaluate.labels import labels_file
from veneer.files.atomic import atomic_file
from veneer.files.hashes import file_hash
from veneer.files.strict_json import read_json
from veneer.files.system_errors import tells_of_the_disk
from veneer.train.checkpoint import newest_valid
from veneer.train.config import RunConfig
from veneer.train.folder import held
from veneer.train.records import read_records

Say = Callable[[str], None]
FAILURE = "failure.json"
DIVERGED, DOES_NOT_FIT, INTERRUPTED = 5, 3, 130


@dataclass(frozen=True)
class Done:
    """A run that is over: its summary, or why there is none (failure: `diverged`, `does not fit`)."""

    folder: Path
    config: RunConfig
    summary: dict[str, Any]
    failure: str | None = None

    @property
    def loss(self) -> float | None:
        """Best held-out loss, nats per trained token."""
        return self.summary.get("validation_loss")


@dataclass(frozen=True)
class Worker:
    """Runs commands of Veneer. `say` hears what goes on; `ran` counts what was not found finished.

    hidden_size: of the base; default learning rates depend on it. circumstances: see circumstances.py.
    """

    comparison: Comparison
    hidden_size: int
    circumstances: Mapping[str, str]
    say: Say
    ran: list[Path]

    def train(self, candidate: Candidate, *, rate: float, seed: int, steps: int, with_result: bool) -> Done:
        """The run of this candidate; with_result: its adapter or model must be there, not only its figures."""
        config = candidate.config.model_copy(
            update={"learning_rate": rate, "seed": seed, "steps": steps, "epochs": None, "keep": 1, "log": []}
        )
        folder = self.comparison.out / "runs" / f"{candidate.name}-{self._key(config)}"
        config = config.model_copy(update={"out": str(folder), "show_answers": False})
        what = f"{candidate.name}, learning rate {rate:g}, seed {seed}"
        found = self._finished(folder, config, with_result)
        if found is not None:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # where its page could not be written
            return _with_loss(what, found)
        self.ran.append(folder)
        if folder.exists():
            with held(folder):  # or its process outlived a comparison that was killed: BusyError
                pass
        path, _ = newest_valid(folder / "checkpoints")
        if path is not None and not (folder / "summary.json").exists():
            arguments = ["train", "--resume", str(folder), "--json", "--quiet"]
        else:
            shutil.rmtree(folder, ignore_errors=True)
            file = self._run_file(config)
            arguments = ["train", str(file), "--json", "--quiet"]
        code, _, talk = self._command(arguments, lambda: f"{what}: {_step(folder)}of {steps:,} steps")
        if code == 0:
            # What a comparison goes on from is whole runs: their checkpoints would fill the disk.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        elif code == DIVERGED or (code == DOES_NOT_FIT and not tells_of_the_disk(talk)):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            _write_json(folder / FAILURE, {"exit_code": code, "message": talk.strip()})
        else:
            raise _failed(what, code, talk, f"veneer {' '.join(arguments)}")
        done = self._finished(folder, config, with_result)
        assert done is not None
        self.say(f"{what}: {done.failure or _told(_with_loss(what, done))}")
        return done

    def evaluate(self, name: str, done: Done | None) -> dict[str, Any]:
        """What `veneer evaluate --json` says of a run's result on the test rows; of the base where there is no run.

        The predictions lie beside it: `predictions.jsonl`.
        """
        folder = self.comparison.out / "base" if done is None else done.folder
        which = ["--base", self.comparison.base]
        if done is not None:
            model = folder / "model"
            which = ["--base", str(model)] if model.is_dir() else ["--adapter", str(folder)]
        config = self.comparison.candidates[0].config if done is None else done.config
        c = self.comparison
        wanted = [
            "--data",
            str(c.test),
            "--format",
            config.data.format,
            "--train-on",
            config.data.train_on,
            "--length",
            str(config.length),
            "--dtype",
            config.dtype,
            "--device",
            config.device,
            "--max-tokens",
            str(c.max_new_tokens),
        ]
        for metric in c.metrics:
            wanted += ["--metric", metric]
        if c.labels is not None:
            wanted += ["--labels", c.labels]
        if c.general is not None:
            wanted += ["--general"] if c.general == BUILT_IN else ["--general", c.general]
        labels = None if c.labels is None else labels_file(c.labels)
        general = None if c.general in (None, BUILT_IN) else Path(c.general)
        files = [file for file in (c.test, labels, general) if file is not None]
        judged = "" if done is None else folder_hash(model if model.is_dir() else folder / "adapter")
        key = _hash([wanted, [file_hash(file) for file in files], dict(self.circumstances), judged])
        kept = folder / "evaluation.json"
        if kept.is_file():
            found = read_json(kept)
            if found.get("key") == key and (folder / "predictions.jsonl").is_file():
                return found
        folder.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)  # before its predictions give way to others
        self.ran.append(kept)
        arguments = ["evaluate", *which, *wanted, "--predictions", str(folder / "predictions.jsonl"), "--json"]
        code, out, talk = self._command(arguments, lambda: f"{name}: evaluating")
        if code:
            raise _failed(f"the evaluation of {name}", code, talk, f"veneer {' '.join(arguments)}")
        found = {**json.loads(out), "key": key}
        _write_json(kept, found)
        return found

    def drop_result(self, done: Done) -> None:
        """Remove the model of a full run that was not chosen; its figures stay."""
        shutil.rmtree(done.folder / "model", ignore_errors=True)

    def _key(self, config: RunConfig) -> str:
        """Over the settings, but where the rows lie and where the run goes; the rows themselves; the circumstances."""
        settings = config.model_dump(
            mode="json", exclude={"out": True, "show_answers": True, "data": {"train", "validation"}}
        )
        rows = [file_hash(self.comparison.train), file_hash(self.comparison.validation)]
        return _hash([settings, rows, dict(self.circumstances)])

    def _finished(self, folder: Path, config: RunConfig, with_result: bool) -> Done | None:
        if (folder / FAILURE).is_file():
            told = read_json(folder / FAILURE)
            if told.get("exit_code") == DIVERGED:
                return Done(folder, config, {}, "diverged")
            if folder in self.ran:
                return Done(folder, config, {}, "does not fit")
            return None  # memory may be free by now
        if not (folder / "summary.json").is_file():
            return None
        if with_result and not any((folder / name).is_dir() for name in ("adapter", "model")):
            return None
        return Done(folder, config, read_json(folder / "summary.json"))

    def _run_file(self, config: RunConfig) -> Path:
        file = self.comparison.out / "runs" / f"{Path(config.out).name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file, replace=True) as partial:
            text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            partial.write_text(text, encoding="utf-8")
        return file

    def _command(self, arguments: Sequence[str], progress: Callable[[], str]) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of `veneer ...`. Interrupted goes on to the command, which saves first.

        In a session of its own: Ctrl-C would reach it twice otherwise, and twice means at once.
        """
        child = subprocess.Popen(
            [*module_command("veneer.cli.main"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment_for(os.environ),
            start_new_session=True,
        )
        try:
            while True:
                try:
                    out, talk = child.communicate(timeout=1.0)
                    break
                except subprocess.TimeoutExpired:
                    self.say(progress())
        except BaseException as fault:
            child.send_signal(signal.SIGTERM)  # SIGINT may be ignored there: a shell starts jobs so
            child.communicate()
            if isinstance(fault, KeyboardInterrupt):
                raise self._interrupted() from None
            raise
        if child.returncode in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
            raise self._interrupted()
        return child.returncode, out, talk

    def _interrupted(self) -> Interrupted:
        return Interrupted(
            "stopped; finished runs stay, the one that was running has saved a checkpoint if it had begun",
            next_step="Go on with the same command: what is finished is not run again.",
        )


def _with_loss(what: str, done: Done) -> Done:
    """The run, which has a held-out loss unless it failed. Raises DataError: nothing could choose its learning rate."""
    if done.failure is None and done.loss is None:
        raise DataError(
            f"{what}: there is no held-out loss to choose the learning rate by",
            [f"the run is in {done.folder}"],
            "See which held-out rows are left: veneer data check. Rows that are too long may have been left out.",
        )
    return done


def _told(done: Done) -> str:
    s = done.summary
    return (
        f"held-out loss {s['validation_loss']:.4f}, {s['total_seconds']:.0f} s, {s['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def _step(folder: Path) -> str:
    file = folder / "metrics.jsonl"
    steps = [r["step"] for r in read_records(file) if r["kind"] == "step"] if file.is_file() else []
    return f"{steps[-1]:,} " if steps else "0 "


def _failed(what: str, code: int, talk: str, command: str) -> VeneerError:
    error = VeneerError(f"{what} failed (exit code {code})", talk.strip().splitlines()[-12:], f"Alone: {command}")
    error.exit_code = code if code > 0 else 1
    return error


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path, replace=True) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
