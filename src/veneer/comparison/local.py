"""Runs jobs as processes of this machine, one after another, so that each has the machine to
itself.

On Linux they are forked by a process that has imported what they need
(cli/training/fork_server.py); elsewhere each starts a new interpreter.
"""

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
from veneer.comparison.environment import NodeEnvironment, find_environment
from veneer.comparison.jobs import CommandJob, FinishedJob, Outcome, Say, interrupted
from veneer.training.config import RunConfig
from veneer.training.state.checkpoint import newest_valid

INTERRUPTED = (130, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a command that was asked to end; it has saved."""


class LocalExecutor:
    shares_forwards = True

    def __init__(self) -> None:
        self._waiting = deque[CommandJob]()
        self._server: ForkServer | None = None

    def inspect(self, base: str, configs: Sequence[RunConfig]) -> NodeEnvironment:
        return find_environment(base, configs)

    def queue(self, jobs: Sequence[CommandJob]) -> None:
        self._waiting.extendleft(reversed(jobs))

    def wait_for_job(self, say: Say) -> FinishedJob:
        job = self._waiting.popleft()
        try:
            outcome = self._command(job_command(job), lambda: say(f"{job.label}: {job.step()}"))
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


def job_command(job: CommandJob) -> list[str]:
    """Returns the command that continues the job's folder, which holds one run, or a folder for
    each of several. Without a checkpoint they start over.
    """
    if not job.resume:
        return [str(word) for word in job.begin]
    checkpoints = [newest_valid(folder)[0] for folder in job.folder.glob("**/checkpoints")]
    if any(checkpoints) and not (job.folder / "summary.json").exists():
        return [str(word) for word in job.resume]
    shutil.rmtree(job.folder, ignore_errors=True)
    return [str(word) for word in job.begin]


def command_of(
    arguments: Sequence[str],
    each_second: Callable[[], None],
    variables: Mapping[str, str],
    cwd: Path | None = None,
) -> Outcome:
    """Runs `veneer ...` in a process of its own; KeyboardInterrupt ends it after it has saved.

    It has a session of its own: else Ctrl-C would reach it twice, and a second one stops at once.
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
        child.send_signal(signal.SIGTERM)  # SIGINT may be ignored, as shells start background jobs
        child.communicate()
        raise
    return Outcome(child.returncode, out, talk, ("veneer", *arguments))


class ForkServer:
    """Runs commands of Veneer in forks of a process that has imported what they need. Linux."""

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
        """Runs a command as the function does, in the server's environment and folder."""
        files = {name: self._folder / name for name in ("out", "talk")}
        request = {
            "arguments": list(arguments),
            **{name: str(file) for name, file in files.items()},
        }
        child: int | None = None
        try:
            self._ask(request)
            child = self._read_answer("pid", each_second)
            code = self._read_answer("code", each_second)
        except BaseException:
            child = child or self._read_answer("pid")
            if child is not None:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
                self._read_answer("code")
            raise
        if code is None:  # the server has ended, and its children with it
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

    def _ask(self, request: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the missing answer shows it
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def _read_answer(self, name: str, each_second: Callable[[], None] = lambda: None) -> int | None:
        """Returns a field of the server's next answer, None if the server has ended."""
        answers = self._process.stdout
        assert answers is not None
        while not select.select([answers], [], [], 1.0)[0]:
            each_second()
        line = answers.readline()
        return int(json.loads(line)[name]) if line else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
