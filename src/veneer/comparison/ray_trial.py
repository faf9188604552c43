"""A job on a node of a cluster: its files are brought, it runs as a process does here, what it
leaves is gathered.

All of it happens in a folder that is made for it and goes with it: no disk is shared with anybody.
Whenever the run has saved a checkpoint, the folder as it is is gathered, so that the job goes on
elsewhere when this node is lost. What is asked and what is answered is JSON.
"""

from __future__ import annotations

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
from veneer.comparison.local import INTERRUPTED, chosen, command_of
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
"""Of a command: a text; {folder: path in the run's folder}; {input: its hash, name}."""
ROWS = ("train", "validation")


@dataclass(frozen=True)
class TrialRequest:
    """store   its address
    name       of the run's folder there
    key        of the job
    begin, resume  as in CommandJob
    config     settings of the run, with its rows as words
    threads    that the process takes
    cwd        what names of bases are relative to
    circumstances  that the figures of this comparison depend on: others are refused
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
    """What surroundings.py finds, on this node. VeneerError as text in `refused`."""
    return _answered(lambda: {"found": _surroundings(base, asked, threads, cwd)})


def run_trial(asked: str) -> str:
    """The outcome of a job: {code, out, talk, command}, or {refused}."""
    return _answered(lambda: asdict(_outcome(TrialRequest(**json.loads(asked)))))


def _answered(function: Any) -> str:
    try:
        return json.dumps(function())
    except LostProcessError:  # which another attempt mends
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
def _surroundings(base: str, asked: str, threads: int, cwd: str) -> dict[str, Any]:
    """Once a process of Ray's: what a node has does not change while it is there."""
    command = [*module_command("veneer.comparison.surroundings"), base]
    variables = environment_for(_variables(threads))
    done = subprocess.run(
        command,
        input=asked,
        capture_output=True,
        text=True,
        env=variables,
        cwd=_there(cwd),
        check=False,
    )
    if done.returncode:
        raise RefusedError(
            f"{os.uname().nodename} cannot run this comparison",
            done.stderr.strip().splitlines()[-6:],
            "Mend it there.",
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _there(cwd: str) -> Path | None:
    return Path(cwd) if Path(cwd).is_dir() else None


def _check(asked: TrialRequest) -> None:
    """RefusedError: figures from here and from where the comparison began are not of one kind."""
    expected = asked.circumstances
    found = _surroundings(asked.config["base"], "[]", asked.threads, asked.cwd)["circumstances"]
    differing = [name for name in expected if found.get(name) != expected[name]]
    if differing:
        raise RefusedError(
            f"{os.uname().nodename} is another kind of machine than the one that the comparison"
            " began on",
            [f"{name}: there {expected[name]!r}, here {found.get(name)!r}" for name in differing],
            "Run it on nodes of one kind, with the same base and versions.",
        )


def _outcome(asked: TrialRequest) -> Outcome:
    _check(asked)
    home = own_folder()
    sweep(home)  # what a process that was killed left
    store = RunStore(asked.store)
    with scratch_folder(home) as work:
        trial = _Trial(asked, store, work)
        store.get_folder(asked.name, trial.job.folder)
        trial.rewrite()
        try:
            variables = _variables(asked.threads)
            outcome = command_of(
                chosen(trial.job), trial.gather_checkpoint, variables, _there(asked.cwd)
            )
        except BaseException:  # cancelled; the process has saved
            trial.gather_checkpoint()
            raise
        if outcome.code in INTERRUPTED:
            trial.gather_checkpoint()
            raise LostProcessError(
                f"somebody on {os.uname().nodename} stopped a process of the comparison"
            )
        if outcome.code == 0:
            shutil.rmtree(trial.job.folder / "checkpoints", ignore_errors=True)
        trial.job.folder.mkdir(exist_ok=True)
        files = store.put_folder(trial.job.folder, asked.name)
        store.put_text(
            done_name(asked.name, asked.key),
            json.dumps({"outcome": asdict(outcome), "files": files}),
        )
    return outcome


def own_folder() -> Path:
    """Where jobs of this user work. RefusedError: under its name lies what others could change."""
    home = (
        Path(tempfile.gettempdir()) / f"veneer-{os.getuid()}"
    )  # containers have users without a name
    with explained(home):
        home.mkdir(mode=0o700, exist_ok=True)
        found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise RefusedError(
            f"{home} on {os.uname().nodename} is no folder that this user alone writes to",
            next_step="Remove it, or set TMPDIR there to a folder of this user's.",
        )
    return home


def done_name(name: str, key: str) -> str:
    return f"runs/{name}.{key}.done"


class _Trial:
    """The job as it is here, in `work`."""

    def __init__(self, asked: TrialRequest, store: RunStore, work: Path) -> None:
        self.asked, self.store, self.work = asked, store, work
        folder = work / asked.name
        rows = {name: str(self._word(word, folder)) for name, word in asked.rows.items()}
        config = RunConfig.of(
            {**asked.config, "out": str(folder), "data": {**asked.config["data"], **rows}}
        )
        begin, resume = (
            tuple(self._word(w, folder) for w in words) for words in (asked.begin, asked.resume)
        )
        self.job = CommandJob(asked.name, folder, begin=begin, resume=resume, config=config)
        self._gathered = 0

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
        self._gathered = max(numbers(self.job.folder / "checkpoints"), default=0)

    def gather_checkpoint(self) -> None:
        """The folder as it is now, where the run has saved since the last time."""
        if max(numbers(self.job.folder / "checkpoints"), default=0) <= self._gathered:
            return
        copy = self.work / "gathered"
        shutil.rmtree(copy, ignore_errors=True)
        step = copy_as_it_goes_on(self.job.folder, copy)
        if step is not None:
            with suppress(VeneerError):  # the next second is another chance; what is lost is time
                self.store.put_folder(copy, self.asked.name)
                self._gathered = step


def copy_as_it_goes_on(folder: Path, copy: Path) -> int | None:
    """A run's folder, copied while the run writes and removes checkpoints: all that going on from
    the newest takes.

    Checkpoints first: the records that are copied behind them know of their steps. Returns the
    newest one's step; None where it or the best one went meanwhile, or what stands beside them did.
    """
    with suppress(OSError):  # of checkpoints that go; shutil's own error is one
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
    """The run in the folder names its base, its rows and itself as they are called here."""
    if not (folder / "run.yaml").is_file():
        return
    there = resume_config(folder)
    rows = {name: getattr(config.data, name) for name in ROWS}
    here = {"base": config.base, "out": str(folder), "data": there.data.model_copy(update=rows)}
    write_run_file(there.model_copy(update=here))
