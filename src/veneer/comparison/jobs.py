"""What a comparison asks of the place where its commands run, and how many questions are asked at
once.

Who wants a run or an evaluation is a generator: it yields the jobs that it wants now and is sent
each one that is over. `together` makes one of several, so that what does not depend on each other
may run at the same time; `answer` asks a place. Which place it is (local.py: processes here, one
after another) is nobody's business but that place's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from veneer.comparison.surroundings import NodeEnvironment
from veneer.errors import Interrupted
from veneer.training.config import RunConfig

T = TypeVar("T")
Say = Callable[[str], None]
RUNNING = "…"
"""How a line ends that the next one replaces."""


@dataclass(frozen=True, eq=False)
class CommandJob:
    """One command of Veneer.

    what     it does, for people
    folder   of the run: the command finds there what it holds, and leaves there what it writes
    begin    the command, as after `veneer`; a Path is a file or a folder, in `folder` or one that
             is read
    resume   the command where the folder holds a checkpoint; such a job begins in an empty folder
    config   settings that say what it takes
    step     how far it is, by what lies in its folder
    """

    what: str
    folder: Path
    begin: tuple[str | Path, ...]
    config: RunConfig
    resume: tuple[str | Path, ...] = ()
    step: Callable[[], str] = lambda: ""


@dataclass(frozen=True)
class Outcome:
    """code: how the command ended; out, talk: its stdout and stderr; command: as it was given."""

    code: int
    out: str
    talk: str
    command: tuple[str, ...]


Over = tuple[CommandJob, Outcome]
Asking = Generator[Sequence[CommandJob], Over, T]


class JobExecutor(Protocol):
    """Where jobs run."""

    def look(self, base: str, asked: Sequence[RunConfig]) -> NodeEnvironment:
        """What is there for these settings of runs. Asked first."""
        ...

    def take(self, jobs: Sequence[CommandJob]) -> None:
        """To run; before those that wait already, which somebody wanted who comes later."""
        ...

    def over(self, say: Say) -> Over:
        """Waits for one that was taken. say: hears how far it is. Raises Interrupted."""
        ...

    def stop(self) -> None:
        """Ends what runs; it saves first what it can go on from. Nothing is asked afterwards."""
        ...


def together(asking: Iterable[Asking[T]]) -> Asking[list[T]]:
    """What each of them returns, in their order."""
    children, owners, results = list(asking), dict[CommandJob, int](), dict[int, T]()

    def advanced(place: int, over: Over | None) -> Sequence[CommandJob]:
        try:
            jobs = next(children[place]) if over is None else children[place].send(over)
        except StopIteration as end:
            results[place] = end.value
            return []
        owners.update(dict.fromkeys(jobs, place))
        return jobs

    wanted = [job for place in range(len(children)) for job in advanced(place, None)]
    while len(results) < len(children):
        over = yield wanted
        wanted = list(advanced(owners.pop(over[0]), over))
    return [results[place] for place in range(len(children))]


def answer(asking: Asking[T], place: JobExecutor, say: Say) -> T:
    """What it returns, once the place has run all that it wants."""
    try:
        place.take(next(asking))
        while True:
            place.take(asking.send(place.over(say)))
    except StopIteration as end:
        return end.value


def interrupted() -> Interrupted:
    return Interrupted(
        "stopped; finished runs stay, what was running has saved a checkpoint if it had begun",
        next_step="Go on with the same command: what is finished is not run again.",
    )
