"""Processes of our own: they import what this process imports, and nothing that lies in the current
folder.

`python -m` puts the current folder first on its path, and a folder of data or of somebody's model
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
"""Folders that every Python looks into by itself; before its own library they would shadow parts of
it."""


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """In a child, before its program begins: it gets SIGTERM when the thread that started it is
    gone, killed or not. Linux; elsewhere it goes on alone."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def typed_command(program: str = "veneer") -> str:
    """How a person in this folder calls a program of this installation: its name where that finds
    it, else its path."""
    beside = Path(sys.executable).with_name(program)
    found = shutil.which(program)
    if not beside.exists() or (found and Path(found).resolve() == beside.resolve()):
        return program
    here = Path.cwd()
    return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))


def module_command(name: str) -> list[str]:
    """How this Python runs a module."""
    return [sys.executable, "-P", "-m", name]


def environment_for(variables: Mapping[str, str]) -> dict[str, str]:
    """`variables`, with a PYTHONPATH on which this very Veneer is found. An empty entry would be
    the current folder."""
    home = Path(__file__).resolve().parents[1]
    entries = [entry for entry in variables.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if home.name not in INSTALLED:
        entries.insert(0, str(home))
    others = {name: value for name, value in variables.items() if name != "PYTHONPATH"}
    return others | ({"PYTHONPATH": os.pathsep.join(entries)} if entries else {})
