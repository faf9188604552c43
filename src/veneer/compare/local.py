"""Jobs as processes of this machine, one after another: each has the machine for itself, and its peak is its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence

from veneer.child import environment_for, module_command
from veneer.compare.jobs import Job, Outcome, Over, Say
from veneer.errors import Interrupted
from veneer.train.checkpoint import newest_valid

INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)
"""How a command ends that was asked to: it has saved before."""


class Here:
    def __init__(self) -> None:
        self._waiting = deque[Job]()

    def take(self, jobs: Sequence[Job]) -> None:
        self._waiting.extendleft(reversed(jobs))

    def over(self, say: Say) -> Over:
        job = self._waiting.popleft()
        try:
            return job, command_of(chosen(job), lambda: say(f"{job.what}: {job.step()}"))
        except KeyboardInterrupt:
            raise Interrupted(
                "stopped; finished runs stay, the one that was running has saved a checkpoint if it had begun",
                next_step="Go on with the same command: what is finished is not run again.",
            ) from None

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


def command_of(arguments: Sequence[str], each_second: Callable[[], None]) -> Outcome:
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
        env=environment_for(os.environ),
        start_new_session=True,
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
    if child.returncode in INTERRUPTED:
        raise KeyboardInterrupt
    return Outcome(child.returncode, out, talk, ("veneer", *arguments))
