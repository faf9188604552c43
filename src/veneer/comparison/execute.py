"""One run, one evaluation: each a job of its own, found again when it is asked for a second time.

A process of its own makes its peak memory its own. The folder of a run is named by a hash of all
that its figures depend on (settings, rows, the base's files, programs, machine), so a comparison
that is started again finds what is finished, continues what has a checkpoint, and a comparison with
other candidates or more seeds re-uses the rest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from veneer.comparison.circumstances import folder_hash
from veneer.comparison.jobs import RUNNING, Asking, CommandJob, Outcome, Say
from veneer.comparison.pace import Pace
from veneer.comparison.plan import Candidate, Comparison
from veneer.errors import DataError, VeneerError
from veneer.evaluation.general import BUILT_IN
from veneer.evaluation.labels import labels_file
from veneer.files.atomic import atomic_file
from veneer.files.hashes import file_hash
from veneer.files.strict_json import read_json
from veneer.files.system_errors import tells_of_the_disk
from veneer.library.library import Library
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.state.place import held

FAILURE = "failure.json"
DIVERGED, DOES_NOT_FIT = 5, 3


@dataclass(frozen=True)
class FinishedRun:
    """A run that is over: its summary, or why there is none (failure: `diverged`, `does not
    fit`)."""

    folder: Path
    config: RunConfig
    summary: dict[str, Any]
    failure: str | None = None

    @property
    def loss(self) -> float | None:
        """Best held-out loss, nats per trained token."""
        return self.summary.get("validation_loss")


@dataclass(frozen=True)
class JobRunner:
    """Asks for commands of Veneer (jobs.py). `say` hears what goes on; `ran` counts what was not
    found finished; `pace` the runs that are over.

    hidden_size: of the base; default learning rates depend on it. circumstances: see
    circumstances.py.
    """

    comparison: Comparison
    hidden_size: int
    circumstances: Mapping[str, str]
    say: Say
    ran: list[Path]
    pace: Pace = field(default_factory=lambda: Pace(1))

    def train(
        self, candidate: Candidate, *, rate: float, seed: int, steps: int, with_result: bool
    ) -> Asking[FinishedRun]:
        """The run of this candidate; with_result: its adapter or model must be there, not only its
        figures."""
        config = candidate.config.model_copy(
            update={
                "learning_rate": rate,
                "seed": seed,
                "steps": steps,
                "epochs": None,
                "keep": 1,
                "log": [],
            }
        )
        folder = self.comparison.out / "runs" / f"{candidate.name}-{self._key(config)}"
        config = config.model_copy(update={"out": str(folder), "show_answers": False})
        what = f"{candidate.name}, lr {rate:g}, seed {seed}"
        found = self._finished(folder, config, with_result)
        if found is not None:
            shutil.rmtree(
                folder / "checkpoints", ignore_errors=True
            )  # where its page could not be written
            self.pace.finished(made=False)
            return _with_loss(what, found)
        self.ran.append(folder)
        if folder.exists():
            with held(folder):  # or its process outlived a comparison that was killed: BusyError
                pass
        job = CommandJob(
            what,
            folder,
            begin=("train", self._run_file(config), *self._places(folder), "--json", "--quiet"),
            resume=("train", "--resume", folder, "--json", "--quiet"),
            config=config,
            step=lambda: f"{_step(folder):,}/{steps:,}{RUNNING}",
        )
        _, outcome = yield [job]
        code, talk = outcome.code, outcome.talk
        if code == 0:
            # What a comparison goes on from is whole runs: their checkpoints would fill the disk.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        elif code == DIVERGED or (code == DOES_NOT_FIT and not tells_of_the_disk(talk)):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            _write_json(folder / FAILURE, {"exit_code": code, "message": talk.strip()})
        else:
            raise _failed(what, outcome)
        done = self._finished(folder, config, with_result)
        assert done is not None
        self.say(self.pace.said(f"{what}: {done.failure or _told(_with_loss(what, done))}"))
        self.pace.finished(made=True)
        return done

    def evaluate(self, name: str, done: FinishedRun | None) -> Asking[dict[str, Any]]:
        """What `veneer evaluate --json` says of a run's result on the test rows; of the base where
        there is no run.

        Predictions are written beside it, to `predictions.jsonl`. The evaluation records their hash
        and is not used over other ones. Where the result of a run gives values that are not finite
        on these rows, `failure` is `diverged`, and `message` names the rows.
        """
        folder = self.comparison.out / "base" if done is None else done.folder
        which: list[str | Path] = ["--base", self.comparison.base]
        if done is not None:
            model = folder / "model"
            which = ["--base", model] if model.is_dir() else ["--adapter", folder]
        config = self.comparison.candidates[0].config if done is None else done.config
        c = self.comparison
        wanted: list[str | Path] = ["--data", c.test, "--format", config.data.format]
        wanted += [
            "--train-on",
            config.data.train_on,
            "--length",
            str(config.length),
            "--dtype",
            config.dtype,
        ]
        wanted += ["--device", config.device, "--max-new-tokens", str(c.max_new_tokens)]
        for metric in c.metrics:
            wanted += ["--metric", metric]
        labels = None if c.labels is None else labels_file(c.labels)
        general = None if c.general in (None, BUILT_IN) else Path(c.general)
        if c.labels is not None:
            wanted += ["--labels", labels or c.labels]
        if c.general is not None:
            wanted += ["--general"] if general is None else ["--general", general]
        files = [file for file in (c.test, labels, general) if file is not None]
        judged = (
            "" if done is None else folder_hash(model if model.is_dir() else folder / "adapter")
        )
        key = _hash(
            [
                list(map(str, wanted)),
                [file_hash(file) for file in files],
                dict(self.circumstances),
                judged,
            ]
        )
        kept, predictions = folder / "evaluation.json", folder / "predictions.jsonl"
        if kept.is_file():
            found = read_json(kept)
            if found.get("key") == key and found.get("predictions") == _hash_of(predictions):
                return found
        folder.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)  # before its predictions give way to others
        self.ran.append(kept)
        job = CommandJob(
            name,
            folder,
            begin=("evaluate", *which, *wanted, "--predictions", predictions, "--json"),
            config=config,
            step=lambda: f"evaluating{RUNNING}",
        )
        _, outcome = yield [job]
        if outcome.code == DIVERGED and done is not None:
            self.say(self.pace.said(f"{name}: diverged, by its values on the test rows"))
            told = {"failure": "diverged", "message": outcome.talk.strip()}
        elif outcome.code:
            raise _failed(f"the evaluation of {name}", outcome)
        else:
            told = json.loads(outcome.out)
        found = {**told, "key": key, "predictions": _hash_of(predictions)}
        _write_json(kept, found)
        return found

    def drop_result(self, done: FinishedRun) -> None:
        """Remove the model of a full run that was not chosen; its figures stay."""
        shutil.rmtree(done.folder / "model", ignore_errors=True)

    def _key(self, config: RunConfig) -> str:
        """Hash of the settings except the places of the rows and of the run, of the rows' bytes, of
        the files of the adapters that the run goes on from, and of the circumstances."""
        settings = config.model_dump(
            mode="json",
            exclude={"out": True, "show_answers": True, "data": {"train", "validation"}},
        )
        rows = [file_hash(self.comparison.train), file_hash(self.comparison.validation)]
        parents = [folder_hash(Library().locate(parent.adapter)) for parent in config.from_adapter]
        return _hash([settings, rows, parents, dict(self.circumstances)])

    def _places(self, folder: Path) -> tuple[str | Path, ...]:
        """Where things are, which the run file says, too: on another machine they are elsewhere."""
        c = self.comparison
        return ("--data", c.train, "--validation", c.validation, "--out", folder)

    def _finished(self, folder: Path, config: RunConfig, with_result: bool) -> FinishedRun | None:
        if (folder / FAILURE).is_file():
            told = read_json(folder / FAILURE)
            if told.get("exit_code") == DIVERGED:
                return FinishedRun(folder, config, {}, "diverged")
            if folder in self.ran:
                return FinishedRun(folder, config, {}, "does not fit")
            return None  # memory may be free by now
        if not (folder / "summary.json").is_file():
            return None
        if with_result and not any((folder / name).is_dir() for name in ("adapter", "model")):
            return None
        return FinishedRun(folder, config, read_json(folder / "summary.json"))

    def _run_file(self, config: RunConfig) -> Path:
        file = self.comparison.out / "runs" / f"{Path(config.out).name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file, replace=True) as partial:
            text = yaml.safe_dump(
                config.model_dump(mode="json"), sort_keys=False, allow_unicode=True
            )
            partial.write_text(text, encoding="utf-8")
        return file


def _with_loss(what: str, done: FinishedRun) -> FinishedRun:
    """The run, which has a held-out loss unless it failed. Raises DataError: nothing could choose
    its learning rate."""
    if done.failure is None and done.loss is None:
        raise DataError(
            f"{what}: there is no held-out loss to choose the learning rate by",
            [f"the run is in {done.folder}"],
            "See which held-out rows are left: veneer data check. Rows that are too long may have"
            " been left out.",
        )
    return done


def _told(done: FinishedRun) -> str:
    s = done.summary
    return (
        f"held-out loss {s['validation_loss']:.4f}, {s['total_seconds']:.0f} s,"
        f" {s['peak_memory_bytes'] / 1e9:.2f} GB"
    )


def _step(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    steps = [r["step"] for r in read_records(file) if r["kind"] == "step"] if file.is_file() else []
    return int(steps[-1]) if steps else 0


def _failed(what: str, outcome: Outcome) -> VeneerError:
    code, talk = outcome.code, outcome.talk.strip().splitlines()[-12:]
    error = VeneerError(
        f"{what} failed (exit code {code})", talk, f"Alone: {' '.join(outcome.command)}"
    )
    error.exit_code = code if code > 0 else 1
    return error


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _hash_of(file: Path) -> str | None:
    """SHA-256 of the file, in hex. Returns None if there is no file."""
    return file_hash(file) if file.is_file() else None


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path, replace=True) as partial:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
