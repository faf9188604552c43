"""Runs a job on a node of a cluster: downloads its files, runs it as a process, uploads its
results.

It works in a temporary folder; no disk is shared. Whenever the run has saved a checkpoint, its
folder is uploaded, so that the job can continue elsewhere if this node is lost. Requests and
answers are JSON.
"""

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from veneer.child import environment_for, module_command
from veneer.comparison.jobs import CommandJob, Outcome
from veneer.comparison.local import INTERRUPTED, command_of, job_command
from veneer.comparison.store import RunStore
from veneer.errors import LostProcessError, RefusedError, VeneerError
from veneer.files.atomic import verify_manifest
from veneer.files.partial import PREFIX, scratch_folder, sweep
from veneer.files.system_errors import explained
from veneer.training.config import RunConfig
from veneer.training.state.checkpoint import checkpoint_path, newest_valid, numbers
from veneer.training.state.folder import resume_config, write_run_file
from veneer.training.state.progress import load_state

Word = str | dict[str, str]
"""A word of a command: text, {folder: path in the run's folder}, or {input: hash, name}."""
ROWS = ("train", "validation")


@dataclass(frozen=True)
class TrialRequest:
    """Requests a job on a node.

    store          address of the store;  name  of the run's folder there;  key  of the job
    begin, resume  as in CommandJob
    config         settings of the run, with its rows as words
    threads        of the process;  cwd  that names of bases are relative to
    circumstances  of the comparison: a node with others refuses
    """

    store: str
    name: str
    key: str
    begin: list[Word]
    resume: list[Word]
    config: dict[str, Any]
    rows: dict[str, Word]
    threads: int
    cwd: str
    circumstances: dict[str, str]


def look(base: str, asked: str, threads: int, cwd: str) -> str:
    """Returns this node's environment (environment.py) as JSON, or an error in `refused`."""
    return _answered(lambda: {"found": _environment(base, asked, threads, cwd)})


def run_trial(request: str) -> str:
    """Runs a job; returns its outcome {code, out, talk, command} as JSON, or {refused}."""
    return _answered(lambda: asdict(_outcome(TrialRequest(**json.loads(request)))))


def _answered(function: Any) -> str:
    try:
        return json.dumps(function())
    except LostProcessError:  # another attempt may succeed
        raise
    except VeneerError as fault:
        return json.dumps(
            {
                "refused": [fault.headline, fault.faults, fault.next_step],
                "exit_code": fault.exit_code,
            }
        )


def _variables(threads: int) -> Mapping[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


@cache
def _environment(base: str, asked: str, threads: int, cwd: str) -> dict[str, Any]:
    """Finds the environment once per process of Ray: a node does not change while it runs."""
    command = [*module_command("veneer.comparison.environment"), base]
    variables = environment_for(_variables(threads))
    process = subprocess.run(
        command,
        input=asked,
        capture_output=True,
        text=True,
        env=variables,
        cwd=_folder_if_exists(cwd),
        check=False,
    )
    if process.returncode:
        raise RefusedError(
            f"{os.uname().nodename} cannot run this comparison",
            process.stderr.strip().splitlines()[-6:],
            "Fix it on that node.",
        )
    environment: dict[str, Any] = json.loads(process.stdout)
    return environment


def _folder_if_exists(cwd: str) -> Path | None:
    return Path(cwd) if Path(cwd).is_dir() else None


def _check(request: TrialRequest) -> None:
    """Raises RefusedError if figures of this node and of the comparison's start are not
    comparable.
    """
    expected = request.circumstances
    actual = _environment(request.config["base"], "[]", request.threads, request.cwd)[
        "circumstances"
    ]
    differing = [name for name in expected if actual.get(name) != expected[name]]
    if differing:
        raise RefusedError(
            f"{os.uname().nodename} is another kind of machine than the one that the comparison"
            " began on",
            [f"{name}: there {expected[name]!r}, here {actual.get(name)!r}" for name in differing],
            "Run it on nodes of one kind, with the same base and versions.",
        )


def _outcome(request: TrialRequest) -> Outcome:
    _check(request)
    home = own_folder()
    sweep(home)  # removes what killed processes left
    store = RunStore(request.store)
    with scratch_folder(home) as work:
        trial = _Trial(request, store, work)
        store.get_folder(request.name, trial.job.folder)
        trial.rewrite()
        try:
            variables = _variables(request.threads)
            outcome = command_of(
                job_command(trial.job),
                trial.upload_checkpoint,
                variables,
                _folder_if_exists(request.cwd),
            )
        except BaseException:  # cancelled, and the process has saved
            trial.upload_checkpoint()
            raise
        if outcome.code in INTERRUPTED:
            trial.upload_checkpoint()
            raise LostProcessError(
                f"somebody on {os.uname().nodename} stopped a process of the comparison"
            )
        if outcome.code == 0:
            shutil.rmtree(trial.job.folder / "checkpoints", ignore_errors=True)
        trial.job.folder.mkdir(exist_ok=True)
        files = store.put_folder(trial.job.folder, request.name)
        store.put_text(
            done_name(request.name, request.key),
            json.dumps({"outcome": asdict(outcome), "files": files}),
        )
    return outcome


def own_folder() -> Path:
    """Returns the folder in which jobs of this user work. RefusedError if others could write
    to it.
    """
    home = (
        Path(tempfile.gettempdir()) / f"veneer-{os.getuid()}"
    )  # containers have users without a name
    with explained(home):
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RefusedError(
            f"{home} on {os.uname().nodename} is no folder that this user alone writes to",
            next_step="Remove it, or set TMPDIR there to a folder of this user's.",
        )
    return home


def done_name(name: str, key: str) -> str:
    return f"runs/{name}.{key}.done"


class _Trial:
    """Holds a job as it is on this node, in `work`."""

    def __init__(self, request: TrialRequest, store: RunStore, work: Path) -> None:
        self.request, self.store, self.work = request, store, work
        folder = work / request.name
        rows = {name: str(self._word(word, folder)) for name, word in request.rows.items()}
        config = RunConfig.of(
            {**request.config, "out": str(folder), "data": {**request.config["data"], **rows}}
        )
        begin, resume = (
            tuple(self._word(word, folder) for word in words)
            for words in (request.begin, request.resume)
        )
        self.job = CommandJob(request.name, folder, begin=begin, resume=resume, config=config)
        self._uploaded_step = 0

    def _word(self, word: Word, folder: Path) -> str | Path:
        if isinstance(word, str):
            return word
        if "folder" in word:
            return folder / word["folder"]
        file = self.work / "inputs" / word["input"] / word["name"]
        if not file.exists():
            self.store.get_file(word["input"], file)
        return file

    def rewrite(self) -> None:
        relocate(self.job.folder, self.job.config)
        self._uploaded_step = max(numbers(self.job.folder / "checkpoints"), default=0)

    def upload_checkpoint(self) -> None:
        """Uploads the run's folder if it has a new checkpoint."""
        if max(numbers(self.job.folder / "checkpoints"), default=0) <= self._uploaded_step:
            return
        copy = self.work / "gathered"
        shutil.rmtree(copy, ignore_errors=True)
        step = copy_as_it_goes_on(self.job.folder, copy)
        if step is not None:
            with suppress(VeneerError):  # it is tried again in a second
                self.store.put_folder(copy, self.request.name)
                self._uploaded_step = step


def copy_as_it_goes_on(folder: Path, copy: Path) -> int | None:
    """Copies a run's folder while the run writes and removes checkpoints, so that the copy can be
    resumed.

    Copies checkpoints first, so that the records copied later contain their steps. Returns the
    newest step, None if that checkpoint, the best one, or another file was removed meanwhile.
    """
    with suppress(OSError):  # a checkpoint was removed; shutil.Error is an OSError, too
        shutil.copytree(folder / "checkpoints", copy / "checkpoints")
    checkpoints = [
        checkpoint_path(copy / "checkpoints", step) for step in numbers(copy / "checkpoints")
    ]
    for path in [path for path in checkpoints if verify_manifest(path)]:
        shutil.rmtree(path)
    newest, _ = newest_valid(copy / "checkpoints")
    if newest is None:
        return None
    best = load_state(newest).progress.best_step
    if best not in (None, *numbers(copy / "checkpoints")):
        return None
    try:
        shutil.copytree(
            folder,
            copy,
            ignore=shutil.ignore_patterns("checkpoints", f"{PREFIX}*"),
            dirs_exist_ok=True,
        )
    except OSError:
        return None
    return int(newest.name)


def relocate(folder: Path, config: RunConfig) -> None:
    """Changes base, rows and folder in the run's file to their names on this machine."""
    if not (folder / "run.yaml").is_file():
        return
    config_of_run = resume_config(folder)
    rows = {name: getattr(config.data, name) for name in ROWS}
    names_here = {
        "base": config.base,
        "out": str(folder),
        "data": config_of_run.data.model_copy(update=rows),
    }
    write_run_file(config_of_run.model_copy(update=names_here))
