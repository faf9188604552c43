"""Jobs of a comparison, and where they run.

A generator that needs runs or evaluations yields the jobs that it wants now, and is sent each one
that is finished. `together` combines several generators, so that independent jobs may run at the
same time; `run_jobs` runs them at an executor, for instance as processes of this machine
(local.py).
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from veneer.comparison.environment import NodeEnvironment
from veneer.errors import RunInterrupted
from veneer.training.config import RunConfig

T = TypeVar("T")
Say = Callable[[str], None]
RUNNING = "…"
"""Ends a line that the next line replaces."""


@dataclass(frozen=True, eq=False)
class CommandJob:
    """Describes one command of Veneer.

    label    name for people
    folder   of the run: the command reads and writes there
    begin    arguments after `veneer`; a Path is a file or a folder, in `folder` or an input
    resume   arguments if the folder holds a checkpoint; such a job begins in an empty folder
    config   settings that say what resources it takes
    step     returns its progress, from the files in its folder
    """

    label: str
    folder: Path
    begin: tuple[str | Path, ...]
    config: RunConfig
    resume: tuple[str | Path, ...] = ()
    step: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Outcome:
    """Holds how a command ended. code: exit code; out, talk: stdout and stderr; command: as
    given.
    """

    code: int
    out: str
    talk: str
    command: tuple[str, ...]


FinishedJob = tuple[CommandJob, Outcome]
JobGenerator = Generator[Sequence[CommandJob], FinishedJob, T]


class JobExecutor(Protocol):
    """Runs jobs.

    shares_forwards: whether the learning rates of a search train in one process, in the same
    forwards; else each is a job
    """

    shares_forwards: bool

    def inspect(self, base: str, configs: Sequence[RunConfig]) -> NodeEnvironment:
        """Returns what is available for these settings of runs. Called first."""
        ...

    def queue(self, jobs: Sequence[CommandJob]) -> None:
        """Queues jobs, before those that wait already: they are needed first."""
        ...

    def wait_for_job(self, say: Say) -> FinishedJob:
        """Waits for a job to finish. say: receives its progress. Raises Interrupted."""
        ...

    def stop(self) -> None:
        """Ends running jobs, which save first. No method is called afterwards."""
        ...


def run_together(generators: Iterable[JobGenerator[T]]) -> JobGenerator[list[T]]:
    """Runs several generators; returns their results in order."""
    children, owners, results = list(generators), dict[CommandJob, int](), dict[int, T]()

    def advanced(index: int, finished: FinishedJob | None) -> Sequence[CommandJob]:
        try:
            jobs = next(children[index]) if finished is None else children[index].send(finished)
        except StopIteration as end:
            results[index] = end.value
            return []
        owners.update(dict.fromkeys(jobs, index))
        return jobs

    jobs = [job for index in range(len(children)) for job in advanced(index, None)]
    while len(results) < len(children):
        finished = yield jobs
        jobs = list(advanced(owners.pop(finished[0]), finished))
    return [results[index] for index in range(len(children))]


def run_jobs(generator: JobGenerator[T], executor: JobExecutor, say: Say) -> T:
    """Runs a generator's jobs at an executor; returns its result."""
    try:
        executor.queue(next(generator))
        while True:
            executor.queue(generator.send(executor.wait_for_job(say)))
    except StopIteration as end:
        return end.value


def interrupted() -> RunInterrupted:
    return RunInterrupted(
        "stopped; finished runs stay, and the running one has saved a checkpoint",
        next_step="Run the same command to continue: finished runs are not repeated.",
    )
