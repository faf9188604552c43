"""`veneer.tune`: from a file of rows to an adapter and a verdict.

OUT/data/      rows to train on, to search with, to judge with (parts.py)
OUT/runs/      an ordinary run folder for each candidate
OUT/adapter/   the result; `--adapter OUT` loads it
OUT/prompts.json  a sample of its training prompts (library/prompts.py)
OUT/judging/   predictions of base and adapter
OUT/tune.json, OUT/tune.html

The steps: check the rows, divide them, ask the plan, measure the pace, search by halving while
training the best one on, judge once. Ctrl-C during training keeps the best so far.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer import api
from veneer.bounds import MINUTES, SEED, check_numbers
from veneer.data.checks.check import refuse
from veneer.data.examples import Layout
from veneer.data.files.columns import ColumnMap
from veneer.data.files.sources import read_rows
from veneer.data.files.writing import Record, as_set
from veneer.errors import RunInterrupted, VeneerError
from veneer.files.atomic import atomic_folder, write_text
from veneer.files.home import expanded
from veneer.files.strict_json import json_text
from veneer.library.library import Library
from veneer.library.names import check_name
from veneer.library.prompts import NAME as PROMPTS
from veneer.library.prompts import prompts_beside, write_prompts
from veneer.report.many_jobs import JobRecord, ranked, read_job
from veneer.training.config import RunConfig
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.state.interrupt import Interrupt
from veneer.training.state.place import locked_folder, refuse_unless_new
from veneer.training.supervisor import SuccessiveHalving
from veneer.tuning.advice import Outlook, ask_plan, choose_objective
from veneer.tuning.candidates import Candidate, candidates, run_config
from veneer.tuning.judging import judge
from veneer.tuning.page import NAME as PAGE
from veneer.tuning.page import make_page
from veneer.tuning.parts import PartFiles, RowParts, divide, write_parts
from veneer.tuning.schedule import Pace, Schedule, read_pace, schedule
from veneer.tuning.screens import JobProgress
from veneer.tuning.supervisors import INTERRUPTED, SequentialSupervisor, TimedSearch
from veneer.tuning.verdict import verdict
from veneer.wording import clock

PROBE_STEPS = 3

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def tune(
    base: str | Path,
    data: str | Path | Iterable[Record],
    *,
    out: str | Path,
    library: str | Path | None = None,
    minutes: float = 10.0,
    seed: int = 0,
    objective: str | None = None,
    format: Layout = "auto",
    columns: ColumnMap | None = None,
    say: Say | None = None,
    confirm: Callable[[], bool] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Searches settings of LoRA for these rows, trains the best, and judges it; returns the content
    of tune.json.

    data      the name of a set of rows, or the rows themselves, each a dict
    library   a library that takes the adapter, under the name of the folder
    minutes   for the search and the training; the judging comes after it
    objective its name; None: dpo for rows of pairs, else answers
    say       shows a line; confirm: asks whether to start, once the plan is shown
    progress  shows the judging

    Raises DataError for rows that a run would refuse, or too few of them; ConfigError if the time
    is too short; RunInterrupted if it was stopped before there was an adapter. If it was stopped
    later, it returns the best so far, and `interrupted` is true.
    """
    check_numbers(minutes=(MINUTES, minutes), seed=(SEED, seed))
    folder = expanded(out)
    if library is not None:
        check_name(folder.name)
        Library(library).require_place()
    refuse_unless_new(folder)
    say = say or (lambda text: None)
    with as_set(data) as name, locked_folder(folder):
        refuse_unless_new(folder)
        data_set, _ = api.check_data(name, base=str(base), format=format, columns=columns)
        refuse(data_set.report, name)
        goal = choose_objective(objective, data_set)
        parts = divide(read_rows(name, format, columns, goal.rows), name)
        say(f"{name}: {parts.line(len(data_set.report.problems))}")
        outlook = ask_plan(str(base), data_set, goal)
        for line in _plan_lines(str(base), outlook, minutes):
            say(line)
        if confirm is not None and not confirm():
            raise RunInterrupted("nothing was started")
        row_tokens = data_set.report.tokens / data_set.report.rows
        runs = _TuneRuns(str(base), folder, parts, outlook, seed, say, row_tokens)
        result, jobs = runs.run(60 * minutes)
        _write_result(folder, result, jobs)
        if not result["interrupted"]:
            result["judging"] = runs.judge(progress or (lambda label, done, total: None))
            _write_result(folder, result, jobs)
        if library is not None and not result["interrupted"]:
            Library(library).add(folder / "adapter", name=folder.name)
            result["library"] = folder.name
            _write_result(folder, result, jobs)
    return result


def _write_result(folder: Path, result: dict[str, Any], jobs: Sequence[JobRecord]) -> None:
    """Adds the verdict to the result, and writes tune.json and tune.html."""
    result["verdict"] = verdict(result)
    write_text(folder / "tune.json", json_text(result), replace=True)
    write_text(folder / PAGE, make_page(result, jobs), replace=True)


def _plan_lines(base: str, outlook: Outlook, minutes: float) -> list[str]:
    advised, tried = outlook.advised, candidates(outlook.advised)

    def values(field: str) -> str:
        return ", ".join(f"{v:g}" for v in sorted({getattr(c, field) for c in tried}))

    weights = f" over {advised.quantize}" if advised.quantize else ""
    return [
        f"{base} · {advised.objective.name} · lora{weights} · {len(tried)} settings: learning rate"
        f" {values('learning_rate')}; LoRA+ ratio {values('lr_ratio')};"
        f" rank {values('rank')}; batch {values('batch')}",
        f"time: {clock(60 * minutes)}, about a third for the search; judging comes after it",
        f"memory: {outlook.memory_line}",
    ]


@dataclass(frozen=True)
class _Search:
    """The jobs of a search with their results, and the best of them."""

    jobs: list[JobRecord]
    results: Sequence[Mapping[str, Any] | VeneerError]
    best: JobRecord
    seconds: float
    interrupted: bool


class _TuneRuns:
    """The runs of one call, in the folder `out`. row_tokens: of a row, the mean"""

    def __init__(
        self,
        base: str,
        out: Path,
        parts: RowParts,
        outlook: Outlook,
        seed: int,
        say: Say,
        row_tokens: float,
    ) -> None:
        self.base, self.out, self.parts, self.seed, self.say = base, out, parts, seed, say
        self.row_tokens = row_tokens
        self.advised = outlook.advised
        self.tried = candidates(outlook.advised)
        self.files: PartFiles = write_parts(out / "data", parts)

    def run(self, seconds: float) -> tuple[dict[str, Any], list[JobRecord]]:
        """Measures, searches and trains within so many seconds, and writes the adapter."""
        start = time.monotonic()
        try:
            plan = self._plan_time(seconds)
            search = self._search(plan, deadline=start + seconds)
        except (VeneerError, KeyboardInterrupt) as fault:
            self._clean_up(fault)
            raise
        steps, chosen = search.best.steps or 0, self._candidate_of(search.best.folder)
        return {
            "base": self.base,
            "out": str(self.out),
            "rows": {
                "train": len(self.parts.train),
                "search": len(self.parts.search),
                "judge": len(self.parts.judge),
                "by_likeness": self.parts.by_likeness,
                "judge_groups": self.parts.judge_groups,
                "judge_prompts": self.parts.judge_prompts,
            },
            "objective": self.advised.objective.model_dump(mode="json"),
            "reasons": list(self.advised.reasons),
            "search": self._search_facts(search),
            "chosen": {"text": str(chosen), **asdict(chosen)},
            "run": {
                "folder": str(search.best.folder),
                "steps": steps,
                "epochs": steps * chosen.batch / len(self.parts.train),
                "reason": search.best.reason,
                "loss": search.best.loss,
                "whole": plan.is_whole[chosen.batch],
            },
            "interrupted": search.interrupted,
            "judging": None,
            "library": None,
            "seconds": time.monotonic() - start,
        }, search.jobs

    def _plan_time(self, seconds: float) -> Schedule:
        self.say("measuring the time of a step")
        plan = schedule(self.tried, len(self.parts.train), self._measure(), seconds)
        self.say(
            f"a whole run takes {_range(list(plan.steps.values()))} steps; settings stop after"
            f" {', '.join(f'{100 * rung:.2g}%' for rung in plan.rungs)} of them"
        )
        return plan

    def _search(self, plan: Schedule, *, deadline: float) -> _Search:
        """Trains all candidates together until one is left and has ended."""
        configs = [self._config(c, plan.steps[c.batch], plan.warmup) for c in self.tried]
        start = time.monotonic()
        with Interrupt() as interrupt:
            supervisor = TimedSearch(
                SuccessiveHalving(plan.rungs, leaves_one=True),
                deadline=deadline,
                evaluation_seconds=plan.evaluation_seconds,
                interrupt=interrupt,
                say=self.say,
                name=lambda trainee: str(self._candidate_of(trainee.inputs.out)),
            )
            progress = JobProgress(
                len(configs), say=self.say, interrupt=interrupt, running=lambda: supervisor.running
            )
            results = api.train_jobs(
                configs, resume=False, screens=progress.screens, supervisor=supervisor
            )
            jobs = [read_job(c, r) for c, r in zip(configs, results, strict=True)]
            best = _best_job(jobs, results)
            self._publish(best.folder)
        seconds = (supervisor.search_end or time.monotonic()) - start
        interrupted = supervisor.was_interrupted or interrupt.asked
        return _Search(jobs, results, best, seconds, interrupted)

    def _clean_up(self, fault: BaseException) -> None:
        """Removes what was written, so that the next start finds no folder. If runs have
        checkpoints they stay, and after a second Ctrl-C an error names them."""
        kept = sorted({path.parent.parent for path in self.out.glob("runs/*/checkpoints/[0-9]*")})
        if not kept:
            for name in ("data", "runs", "probe"):
                shutil.rmtree(self.out / name, ignore_errors=True)
        if isinstance(fault, KeyboardInterrupt):
            folders = " ".join(map(str, kept))
            raise RunInterrupted(
                "stopped at once" if kept else "stopped before the search began",
                next_step=f"The runs can be continued: veneer train --resume {folders}"
                if kept
                else "Nothing was trained. Start it again.",
            ) from None

    def _candidate_of(self, folder: Path) -> Candidate:
        return next(candidate for candidate in self.tried if candidate.name == folder.name)

    def judge(self, progress: Progress) -> dict[str, Any]:
        """Evaluates base and adapter on the rows to judge with, which nothing has read before."""
        self.say(f"judging on {len(self.parts.judge)} rows")
        return judge(
            self.base,
            self.out / "adapter",
            self.parts.judge,
            [*self.parts.train, *self.parts.search],
            self.files.judge,
            objective=self.advised.objective,
            quantize=self.advised.quantize,
            out=self.out / "judging",
            progress=progress,
        )

    def _config(
        self, candidate: Candidate, steps: int, warmup: float, folder: str = "runs"
    ) -> RunConfig:
        return run_config(
            candidate,
            self.advised,
            base=self.base,
            files=self.files,
            out=self.out / folder,
            steps=steps,
            seed=self.seed,
            warmup=warmup,
        )

    def _measure(self) -> Pace:
        """Trains a few steps of each batch size at the largest rank, one after the other, and drops
        the runs."""
        start, folder = time.monotonic(), self.out / "probe"
        rank = max(candidate.rank for candidate in self.tried)
        configs = [
            self._config(candidate, PROBE_STEPS, 0.0, "probe").model_copy(
                update={"evaluate_every": PROBE_STEPS, "save_every": PROBE_STEPS}
            )
            for candidate in self.tried
            if candidate.rank == rank
        ]
        screens = [QuietScreen() for _ in configs]
        try:
            results = api.train_jobs(
                configs, resume=False, screens=screens, supervisor=SequentialSupervisor()
            )
            for result in results:
                if isinstance(result, VeneerError):
                    raise result
            records = [read_records(Path(config.out) / "metrics.jsonl") for config in configs]
        except RunInterrupted:
            raise KeyboardInterrupt from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        batches = [config.batch for config in configs]
        return read_pace(batches, records, self.row_tokens, time.monotonic() - start)

    def _search_facts(self, search: _Search) -> dict[str, Any]:
        """Returns what the search did, for tune.json."""
        listed = [
            {
                "text": str(self._candidate_of(job.folder)),
                "reason": job.reason,
                "steps": job.steps,
                "tokens": job.tokens,
                "loss": job.loss,
                "error": str(result) if isinstance(result, VeneerError) else None,
            }
            for job, result in zip(search.jobs, search.results, strict=True)
        ]
        return {
            "seconds": search.seconds,
            "candidates": listed,
            "runner_up": self._runner_up(search),
        }

    def _runner_up(self, search: _Search) -> dict[str, Any] | None:
        """Returns the setting that trained longest beside the best, and how far it was behind after
        equal tokens; None if it was not behind. noise: half the 95% interval of the best loss."""
        rivals = [job for job in search.jobs if job is not search.best and job.loss is not None]
        if not rivals:
            return None
        rival = max(rivals, key=lambda job: (job.steps or 0) / self._steps_of(job))
        best_loss = search.best.loss_after(rival.tokens)
        if best_loss is None or rival.loss is None or rival.loss < best_loss:
            return None
        low, high = search.best.low, search.best.high
        return {
            "text": str(self._candidate_of(rival.folder)),
            "gap": rival.loss - best_loss,
            "noise": None if low is None or high is None else (high - low) / 2,
        }

    def _steps_of(self, job: JobRecord) -> int:
        return int(job.settings["steps"])

    def _publish(self, run: Path) -> None:
        """Copies the best run's adapter to OUT/adapter, and removes all checkpoints."""
        with atomic_folder(self.out / "adapter") as partial:
            shutil.copytree(run / "adapter", partial, dirs_exist_ok=True)
        if prompts := prompts_beside(run / "adapter"):
            write_prompts(self.out / PROMPTS, prompts)
        for folder in (self.out / "runs").iterdir():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _best_job(
    jobs: Sequence[JobRecord], results: Sequence[Mapping[str, Any] | VeneerError]
) -> JobRecord:
    """Returns the job that trained furthest, else the one with the lowest held-out loss. Raises the
    first error if all failed."""
    finished = [job for job in ranked(jobs) if job.reason != "failed"]
    if not finished:
        raise next(result for result in results if isinstance(result, VeneerError))
    survivors = [job for job in finished if job.reason not in ("halving", INTERRUPTED)]
    return (survivors or finished)[0]


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
