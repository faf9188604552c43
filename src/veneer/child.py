"""Starts processes with the same imports as this one, and without modules from the current folder.

`python -m` puts the current folder first on its path, and a folder of data or of a stranger's model
may hold a json.py.
"""

import ctypes
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

INSTALLED = ("site-packages", "dist-packages")
"""Folders that every Python searches by itself; in front of its own library they would
shadow it."""


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Makes a child process get SIGTERM when the thread that started it ends, killed or not.

    Call it before the child's program begins. Linux only; elsewhere the child continues.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def typed_command() -> str:
    """Returns how a user in this folder calls this installation's `veneer`: by name if found, else
    by path."""
    installed = Path(sys.executable).with_name("veneer")
    on_path = shutil.which("veneer")
    if not installed.exists() or (on_path and Path(on_path).resolve() == installed.resolve()):
        return "veneer"
    folder = Path.cwd()
    return shlex.quote(
        str(installed.relative_to(folder) if installed.is_relative_to(folder) else installed)
    )


def module_command(name: str) -> list[str]:
    """Returns the command that runs a module with this Python."""
    return [sys.executable, "-P", "-m", name]


def code_command(code: str) -> list[str]:
    """Returns the command that runs Python code with this Python."""
    return [sys.executable, "-P", "-c", code]


def environment_for(variables: Mapping[str, str]) -> dict[str, str]:
    """Adds a PYTHONPATH that finds this Veneer. Empty entries are dropped: they mean the current
    folder."""
    home = Path(__file__).resolve().parents[1]
    entries = [entry for entry in variables.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if home.name not in INSTALLED:
        entries.insert(0, str(home))
    other_variables = {name: value for name, value in variables.items() if name != "PYTHONPATH"}
    return other_variables | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})
