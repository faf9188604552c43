"""Runs and evaluations of a comparison, each a job that is found again when it was computed before.

Each job has a process of its own, so its peak memory is its own. The folder of a run is named by a
hash of all that its figures depend on (settings, rows, the base's files, programs, machine). So a
comparison that is started again uses what is finished and continues what has a checkpoint, and one
with other candidates or more seeds reuses the rest.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.comparison.environment import folder_hash
from veneer.comparison.jobs import RUNNING, CommandJob, JobGenerator, Outcome, Say
from veneer.comparison.pace import Pace
from veneer.comparison.plan import Candidate, Comparison
from veneer.errors import DataError, VeneerError
from veneer.evaluation.general import BUILT_IN
from veneer.evaluation.labels import labels_file
from veneer.files.atomic import write_text
from veneer.files.hashes import file_hash
from veneer.files.strict_json import read_json
from veneer.files.system_errors import is_about_disk
from veneer.library.library import Library
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.state.folder import write_run_file
from veneer.training.state.place import locked_folder
from veneer.training.supervisor import HALVED

FAILURE = "failure.json"
DIVERGED, DOES_NOT_FIT = 5, 3


@dataclass(frozen=True)
class FinishedRun:
    """Holds a finished run: its summary, or why it has none (failure: `diverged`, `does not
    fit`).

    alone: whether it had the process to itself, so that memory and time are its own
    """

    folder: Path
    config: RunConfig
    summary: dict[str, Any]
    failure: str | None = None
    alone: bool = True

    @property
    def loss(self) -> float | None:
        """Returns the best held-out loss, nats per trained token."""
        return self.summary.get("validation_loss")

    @property
    def was_halved(self) -> bool:
        """Returns whether it stopped early because other learning rates were better."""
        return self.summary.get("reason") == HALVED

    @property
    def is_as_alone(self) -> bool:
        """Returns whether a run that trains alone would keep the same values.

        Halving adds evaluations. One of them may be the best, and they count for patience.
        """
        steps, best = self.summary.get("steps"), self.summary.get("best_step")
        if self.was_halved or self.config.patience is not None or steps is None or best is None:
            return False
        return best == steps or best % self.config.evaluation_interval(steps) == 0

    @property
    def has_result(self) -> bool:
        """Returns whether its adapter or model is there."""
        return any((self.folder / name).is_dir() for name in ("adapter", "model"))


@dataclass(frozen=True)
class JobRunner:
    """Yields commands of Veneer as jobs (jobs.py).

    circumstances: see environment.py. say: shows progress. ran: folders of what was not finished
    before. pace: counts finished runs.
    shares_forwards: whether the learning rates of a search train in the same forwards.
    """

    comparison: Comparison
    circumstances: Mapping[str, str]
    say: Say
    ran: list[Path]
    pace: Pace = field(default_factory=lambda: Pace(1))
    shares_forwards: bool = False

    def settings(self, candidate: Candidate, *, rate: float, seed: int, steps: int) -> RunConfig:
        """Returns the settings of a run that trains alone, in the folder named by them."""
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
        return config.model_copy(update={"out": str(folder), "show_answers": False})

    def train(
        self, candidate: Candidate, *, rate: float, seed: int, steps: int, with_result: bool
    ) -> JobGenerator[FinishedRun]:
        """Trains a candidate. with_result: its adapter or model must exist, not only its
        figures.
        """
        config = self.settings(candidate, rate=rate, seed=seed, steps=steps)
        folder = Path(config.out)
        label = f"{candidate.name}, lr {rate:g}, seed {seed}"
        earlier = self._finished(folder, config, with_result)
        if earlier is not None:
            # They remain if the page of the run could not be written.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            self.pace.finished(made=False)
            return require_loss(label, earlier)
        self.ran.append(folder)
        if folder.exists():
            # BusyError if a process of a killed comparison still works there.
            with locked_folder(folder):
                pass
        job = CommandJob(
            label,
            folder,
            begin=("train", self.run_file(config), *self.places(folder), "--json", "--quiet"),
            resume=("train", "--resume", folder, "--json", "--quiet"),
            config=config,
            step=lambda: f"{steps_of(folder):,}/{steps:,}{RUNNING}",
        )
        _, outcome = yield [job]
        code, messages = outcome.code, outcome.talk
        if code == 0:
            # A comparison continues from finished runs; their checkpoints would fill the disk.
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        elif is_result(outcome):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            write_json(folder / FAILURE, {"exit_code": code, "message": messages.strip()})
        else:
            raise failed_job(label, outcome)
        run = self._finished(folder, config, with_result)
        assert run is not None
        self.say(
            self.pace.line(f"{label}: {run.failure or summary_text(require_loss(label, run))}")
        )
        self.pace.finished(made=True)
        return run

    def evaluate(self, name: str, run: FinishedRun | None) -> JobGenerator[dict[str, Any]]:
        """Returns `veneer evaluate --json` of a run on the test rows, or of the base without a run.

        Predictions are written beside it, to `predictions.jsonl`. The evaluation records their hash
        and is not reused with other predictions. If the run gives values that are not finite on
        these rows, `failure` is `diverged`, and `message` names the rows.
        """
        folder = self.comparison.out / "base" if run is None else run.folder
        model_arguments: list[str | Path] = ["--base", self.comparison.base]
        if run is not None:
            model = folder / "model"
            model_arguments = ["--base", model] if model.is_dir() else ["--adapter", folder]
        config = self.comparison.candidates[0].config if run is None else run.config
        comparison = self.comparison
        arguments: list[str | Path] = ["--data", comparison.test, "--format", config.data.format]
        arguments += [
            "--train-on",
            config.data.train_on,
            "--length",
            str(config.length),
            "--dtype",
            config.dtype,
        ]
        arguments += ["--device", config.device, "--max-new-tokens", str(comparison.max_new_tokens)]
        for metric in comparison.metrics:
            arguments += ["--metric", metric]
        labels = None if comparison.labels is None else labels_file(comparison.labels)
        general = None if comparison.general in (None, BUILT_IN) else Path(comparison.general)
        if comparison.labels is not None:
            arguments += ["--labels", labels or comparison.labels]
        if comparison.general is not None:
            arguments += ["--general"] if general is None else ["--general", general]
        files = [file for file in (comparison.test, labels, general) if file is not None]
        model_hash = (
            "" if run is None else folder_hash(model if model.is_dir() else folder / "adapter")
        )
        key = _hash(
            [
                list(map(str, arguments)),
                [file_hash(file) for file in files],
                dict(self.circumstances),
                model_hash,
            ]
        )
        evaluation_file, predictions = folder / "evaluation.json", folder / "predictions.jsonl"
        if evaluation_file.is_file():
            evaluation = read_json(evaluation_file)
            if evaluation.get("key") == key and evaluation.get("predictions") == _hash_of(
                predictions
            ):
                return evaluation
        folder.mkdir(parents=True, exist_ok=True)
        evaluation_file.unlink(missing_ok=True)  # before its predictions are overwritten
        self.ran.append(evaluation_file)
        job = CommandJob(
            name,
            folder,
            begin=(
                "evaluate",
                *model_arguments,
                *arguments,
                "--predictions",
                predictions,
                "--json",
            ),
            config=config,
            step=lambda: f"evaluating{RUNNING}",
        )
        _, outcome = yield [job]
        if outcome.code == DIVERGED and run is not None:
            self.say(self.pace.line(f"{name}: diverged, by its values on the test rows"))
            result = {"failure": "diverged", "message": outcome.talk.strip()}
        elif outcome.code:
            raise failed_job(f"the evaluation of {name}", outcome)
        else:
            result = json.loads(outcome.out)
        evaluation = {**result, "key": key, "predictions": _hash_of(predictions)}
        write_json(evaluation_file, evaluation)
        return evaluation

    def drop_result(self, run: FinishedRun) -> None:
        """Removes the model of a full run that was not chosen; its figures stay."""
        shutil.rmtree(run.folder / "model", ignore_errors=True)

    def _key(self, config: RunConfig) -> str:
        """Hashes what a run's figures depend on: settings, rows, the files of parent adapters,
        circumstances.

        Where rows and run are stored does not count, their bytes do.
        """
        settings = config.model_dump(
            mode="json",
            exclude={"out": True, "show_answers": True, "data": {"train", "validation"}},
        )
        rows = [file_hash(self.comparison.train), file_hash(self.comparison.validation)]
        parents = [folder_hash(Library().locate(parent.adapter)) for parent in config.from_adapter]
        return _hash([settings, rows, parents, dict(self.circumstances)])

    def places(self, folder: Path) -> tuple[str | Path, ...]:
        """Returns the arguments that name places, which differ on other machines."""
        comparison = self.comparison
        return ("--data", comparison.train, "--validation", comparison.validation, "--out", folder)

    def _finished(self, folder: Path, config: RunConfig, with_result: bool) -> FinishedRun | None:
        if (folder / FAILURE).is_file():
            failure = read_json(folder / FAILURE)
            if failure.get("exit_code") == DIVERGED:
                return FinishedRun(folder, config, {}, "diverged")
            if folder in self.ran:
                return FinishedRun(folder, config, {}, "does not fit")
            return None  # memory may be free by now
        if not (folder / "summary.json").is_file():
            return None
        run = FinishedRun(folder, config, read_json(folder / "summary.json"))
        return run if run.has_result or not with_result else None

    def run_file(self, config: RunConfig) -> Path:
        """Writes a run's settings beside its folder; returns the file."""
        file = self.comparison.out / "runs" / f"{Path(config.out).name}.yaml"
        write_run_file(config, file)
        return file


def is_result(outcome: Outcome) -> bool:
    """Returns whether a run ended by diverging or not fitting, which are results of a candidate."""
    return outcome.code == DIVERGED or (
        outcome.code == DOES_NOT_FIT and not is_about_disk(outcome.talk)
    )


def require_loss(label: str, run: FinishedRun) -> FinishedRun:
    """Returns the run. Raises DataError if it has no held-out loss to choose its learning
    rate by.
    """
    if run.failure is None and run.loss is None:
        raise DataError(
            f"{label}: there is no held-out loss to choose the learning rate by",
            [f"the run is in {run.folder}"],
            "See which held-out rows are left: veneer data check. Rows that are too long may have"
            " been left out.",
        )
    return run


def summary_text(run: FinishedRun) -> str:
    """Returns loss, time and memory of a run in words; time and memory only if it ran alone."""
    summary = run.summary
    loss = f"held-out loss {summary['validation_loss']:.4f}"
    if not run.alone:
        return loss
    seconds, gigabytes = summary["total_seconds"], summary["peak_memory_bytes"] / 1e9
    return f"{loss}, {seconds:.0f} s, {gigabytes:.2f} GB"


def steps_of(folder: Path) -> int:
    """Counts the steps of a run in progress."""
    file = folder / "metrics.jsonl"
    steps = [r["step"] for r in read_records(file) if r["kind"] == "step"] if file.is_file() else []
    return int(steps[-1]) if steps else 0


def failed_job(label: str, outcome: Outcome) -> VeneerError:
    code, messages = outcome.code, outcome.talk.strip().splitlines()[-12:]
    error = VeneerError(
        f"{label} failed (exit code {code})", messages, f"Alone: {' '.join(outcome.command)}"
    )
    error.exit_code = code if code > 0 else 1
    return error


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _hash_of(file: Path) -> str | None:
    """Returns the SHA-256 of the file, in hex. Returns None if there is no file."""
    return file_hash(file) if file.is_file() else None


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", replace=True)
