"""Jobs as processes of this machine, one after another: each has the machine for itself, and its peak is its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from veneer.child import end_with_parent, environment_for, module_command
from veneer.compare.jobs import Job, Outcome, Over, Say, interrupted
from veneer.compare.surroundings import Surroundings, surroundings
from veneer.train.checkpoint import newest_valid
from veneer.train.config import RunConfig

INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)
"""How a command ends that was asked to: it has saved before."""


class Here:
    def __init__(self) -> None:
        self._waiting = deque[Job]()

    def look(self, base: str, asked: Sequence[RunConfig]) -> Surroundings:
        return surroundings(base, asked)

    def take(self, jobs: Sequence[Job]) -> None:
        self._waiting.extendleft(reversed(jobs))

    def over(self, say: Say) -> Over:
        job = self._waiting.popleft()
        try:
            outcome = command_of(chosen(job), lambda: say(f"{job.what}: {job.step()}"), os.environ)
        except KeyboardInterrupt:
            raise interrupted() from None
        if outcome.code in INTERRUPTED:
            raise interrupted()
        return job, outcome

    def stop(self) -> None:
        self._waiting.clear()


def chosen(job: Job) -> list[str]:
    """The command that goes on from what the job's folder holds; a run without a checkpoint begins anew."""
    if not job.resume:
        return [str(each) for each in job.begin]
    path, _ = newest_valid(job.folder / "checkpoints")
    if path is not None and not (job.folder / "summary.json").exists():
        return [str(each) for each in job.resume]
    shutil.rmtree(job.folder, ignore_errors=True)
    return [str(each) for each in job.begin]


def command_of(
    arguments: Sequence[str], each_second: Callable[[], None], variables: Mapping[str, str], cwd: Path | None = None
) -> Outcome:
    """`veneer ...` in a process of its own. KeyboardInterrupt goes on to it, and it saves first.

    In a session of its own: Ctrl-C would reach it twice otherwise, and twice means at once.
    """
    child = subprocess.Popen(
        [*module_command("veneer.cli.main"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=environment_for(variables),
        cwd=cwd,
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        while True:
            try:
                out, talk = child.communicate(timeout=1.0)
                break
            except subprocess.TimeoutExpired:
                each_second()
    except BaseException:
        child.send_signal(signal.SIGTERM)  # SIGINT may be ignored there: a shell starts jobs so
        child.communicate()
        raise
    return Outcome(child.returncode, out, talk, ("veneer", *arguments))
