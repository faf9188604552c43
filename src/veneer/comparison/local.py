"""Jobs as processes of this machine, one after another: each has the machine for itself, and its
peak is its own.

On Linux they are forked by one that has imported what they need (cli/training/fork_server.py),
elsewhere each starts anew.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from veneer.child import end_with_parent, environment_for, module_command
from veneer.comparison.jobs import CommandJob, Outcome, Over, Say, interrupted
from veneer.comparison.surroundings import NodeEnvironment, surroundings
from veneer.training.config import RunConfig
from veneer.training.state.checkpoint import newest_valid

INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)
"""How a command ends that was asked to: it has saved before."""


class LocalExecutor:
    def __init__(self) -> None:
        self._waiting = deque[CommandJob]()
        self._server: ForkServer | None = None

    def look(self, base: str, asked: Sequence[RunConfig]) -> NodeEnvironment:
        return surroundings(base, asked)

    def take(self, jobs: Sequence[CommandJob]) -> None:
        self._waiting.extendleft(reversed(jobs))

    def over(self, say: Say) -> Over:
        job = self._waiting.popleft()
        try:
            outcome = self._command(chosen(job), lambda: say(f"{job.what}: {job.step()}"))
        except KeyboardInterrupt:
            raise interrupted() from None
        if outcome.code in INTERRUPTED:
            raise interrupted()
        return job, outcome

    def stop(self) -> None:
        self._waiting.clear()
        self._end_server()

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _command(self, arguments: Sequence[str], each_second: Callable[[], None]) -> Outcome:
        if sys.platform != "linux":
            return command_of(arguments, each_second, os.environ)
        if self._server is not None and self._server.has_ended:
            self._end_server()
        self._server = self._server or ForkServer(os.environ)
        return self._server.command_of(arguments, each_second)


def chosen(job: CommandJob) -> list[str]:
    """The command that goes on from what the job's folder holds; a run without a checkpoint begins
    anew."""
    if not job.resume:
        return [str(each) for each in job.begin]
    path, _ = newest_valid(job.folder / "checkpoints")
    if path is not None and not (job.folder / "summary.json").exists():
        return [str(each) for each in job.resume]
    shutil.rmtree(job.folder, ignore_errors=True)
    return [str(each) for each in job.begin]


def command_of(
    arguments: Sequence[str],
    each_second: Callable[[], None],
    variables: Mapping[str, str],
    cwd: Path | None = None,
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


class ForkServer:
    """Commands of Veneer, each in a process that one process forks which has imported all they
    need. Linux."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="veneer-"))
        with (self._folder / "server").open("wb") as talk:
            self._process = subprocess.Popen(
                module_command("veneer.cli.training.fork_server"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=talk,
                bufsize=0,
                env=environment_for(variables),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def command_of(self, arguments: Sequence[str], each_second: Callable[[], None]) -> Outcome:
        """As the function of this name, with the variables and the folder that the server began
        in."""
        files = {name: self._folder / name for name in ("out", "talk")}
        asked = {"arguments": list(arguments), **{name: str(file) for name, file in files.items()}}
        child: int | None = None
        try:
            self._ask(asked)
            child = self._told("pid", each_second)
            code = self._told("code", each_second)
        except BaseException:
            child = child or self._told("pid")
            if child is not None:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
                self._told("code")
            raise
        if code is None:  # the server is gone, and with it what it started
            return Outcome(
                self._process.wait() or 1,
                "",
                _text(self._folder / "server"),
                ("veneer", *arguments),
            )
        return Outcome(code, _text(files["out"]), _text(files["talk"]), ("veneer", *arguments))

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, asked: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer tells it
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")

    def _told(self, what: str, each_second: Callable[[], None] = lambda: None) -> int | None:
        """The next answer, which says this; None: the server is gone."""
        answers = self._process.stdout
        assert answers is not None
        while not select.select([answers], [], [], 1.0)[0]:
            each_second()
        line = answers.readline()
        return int(json.loads(line)[what]) if line else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
