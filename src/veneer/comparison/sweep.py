"""Trains a candidate at several learning rates, as jobs of one process where that is possible.

There the rates share each forward, and successive halving stops the worse half at each rung
(training/supervisor.py). A rate that has no result in the end trains once more by itself, which
shows whether it diverges or does not fit. Candidates that cannot share a forward, such as full
fine-tuning, train one rate after the other, and so does a place without shared forwards.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from veneer.comparison.execute import (
    FinishedRun,
    JobRunner,
    failed_job,
    is_result,
    require_loss,
    steps_of,
    summary_text,
    write_json,
)
from veneer.comparison.jobs import RUNNING, CommandJob, JobGenerator, run_together
from veneer.comparison.plan import Candidate
from veneer.comparison.store import key_of
from veneer.files.strict_json import read_json
from veneer.training.config import RunConfig
from veneer.training.coordination import reasons_to_train_alone
from veneer.training.state.folder import resume_config
from veneer.training.state.place import locked_folder

ENDED = "search.json"
"""Says how the search of a folder ended; without it the search goes on."""


def train_rates(
    runner: JobRunner, candidate: Candidate, rates: Sequence[float], steps: int
) -> JobGenerator[dict[float, FinishedRun]]:
    """Trains a candidate with seed 0 at each rate; returns the runs by rate."""
    runs: dict[float, FinishedRun] = {}
    if len(rates) > 1 and runner.shares_forwards and not reasons_to_train_alone(candidate.config):
        sweep = _Sweep(runner, candidate, rates, steps)
        if not sweep.began_alone:
            runs = yield from sweep.train()
    left = [rate for rate in rates if rate not in runs]
    alone = yield from run_together(
        runner.train(candidate, rate=rate, seed=0, steps=steps, with_result=False) for rate in left
    )
    return runs | dict(zip(left, alone, strict=True))


class _Sweep:
    """Trains one candidate at several learning rates, each in a folder inside `folder`."""

    def __init__(
        self, runner: JobRunner, candidate: Candidate, rates: Sequence[float], steps: int
    ) -> None:
        self.runner, self.candidate, self.rates, self.steps = runner, candidate, rates, steps
        self._configs = [
            runner.settings(candidate, rate=rate, seed=0, steps=steps) for rate in rates
        ]
        key = key_of([Path(config.out).name for config in self._configs])
        self.folder = runner.comparison.out / "runs" / f"{candidate.name}-rates-{key}"

    @property
    def began_alone(self) -> bool:
        """Returns whether an earlier search trained a rate by itself, for instance on a cluster."""
        return not self.folder.exists() and any(
            Path(config.out).exists() for config in self._configs
        )

    def train(self) -> JobGenerator[dict[float, FinishedRun]]:
        """Returns the runs that have a result, by rate."""
        is_new = not (self.folder / ENDED).is_file()
        if is_new:
            yield from self._train_together()
        runs = self._finished()
        for rate, run in runs.items():
            text = summary_text(require_loss(self._label(rate), run))
            if is_new:
                self.runner.ran.append(run.folder)
                stop = f", stopped at step {run.summary['steps']}" if run.was_halved else ""
                self.runner.say(self.runner.pace.line(f"{self._label(rate)}: {text}{stop}"))
            self.runner.pace.finished(made=is_new)
        return runs

    def _train_together(self) -> JobGenerator[None]:
        for file in self.folder.glob("*/run.yaml"):
            # BusyError if a process of a killed comparison still works there.
            with locked_folder(file.parent):
                pass
        runner, config = self.runner, self._config()
        words = (
            *("train", runner.run_file(config), *runner.places(self.folder), "--json", "--quiet"),
            *("--sweep", f"learning_rate={','.join(f'{rate:g}' for rate in self.rates)}"),
        )
        label = f"{self.candidate.name}, {len(self.rates)} learning rates together, seed 0"
        job = CommandJob(
            label,
            self.folder,
            begin=(*words, "--halving"),
            resume=(*words, "--resume"),
            config=config,
            step=self._step_text,
        )
        _, outcome = yield [job]
        if outcome.code and not is_result(outcome):
            raise failed_job(label, outcome)
        for folder in self.folder.glob("*/checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)
        write_json(self.folder / ENDED, {"exit_code": outcome.code, "message": outcome.talk})

    def _config(self) -> RunConfig:
        return self._configs[0].model_copy(update={"out": str(self.folder)})

    def _step_text(self) -> str:
        steps = sum(steps_of(file.parent) for file in self.folder.glob("*/run.yaml"))
        return f"{steps:,} of at most {self.steps * len(self.rates):,}{RUNNING}"

    def _label(self, rate: float) -> str:
        return f"{self.candidate.name}, lr {rate:g}, seed 0"

    def _finished(self) -> dict[float, FinishedRun]:
        """Reads the runs that have a summary, in the order of the rates."""
        folders = {
            resume_config(file.parent).learning_rate: file.parent
            for file in self.folder.glob("*/summary.json")
        }
        return {
            rate: FinishedRun(
                folders[rate],
                config.model_copy(update={"out": str(folders[rate])}),
                read_json(folders[rate] / "summary.json"),
                alone=False,
            )
            for rate, config in zip(self.rates, self._configs, strict=True)
            if rate in folders
        }
