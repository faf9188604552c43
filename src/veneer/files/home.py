"""Resolves the home folder, `~`, and the folder of the user's data."""

import os
from pathlib import Path

from veneer.errors import ConfigError


def expanded(name: str | Path) -> Path:
    """Expands `~` and `~name`; unknown users stay as they are written, as in a shell."""
    path = Path(name)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def absolute_if_exists(named: str) -> str:
    """Returns the absolute path of a file or folder that exists; any other name unchanged."""
    path = expanded(named)
    return str(path.absolute()) if _exists(path) else named


def home() -> Path:
    """Returns the home folder. Raises ConfigError if the user has none, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        raise ConfigError(
            "this user has no home folder", [], "Set HOME to a folder that can be written."
        ) from None


def name_of(source: str) -> str:
    """Returns the public name of a base: a hub name, or the last part of a path."""
    path = expanded(source)
    if _exists(path):
        return path.resolve().name
    return path.name if path.is_absolute() else source


def _exists(path: Path) -> bool:
    """Whether a path exists; False for a name that no path can have, such as one that is too
    long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def data_folder() -> Path:
    """Returns the folder of Veneer's data of this user, by the conventions of the system."""
    if os.name == "nt":
        data = Path(os.environ.get("LOCALAPPDATA") or home() / "AppData" / "Local")
    elif os.uname().sysname == "Darwin":
        data = home() / "Library" / "Application Support"
    else:
        data = Path(os.environ.get("XDG_DATA_HOME") or home() / ".local" / "share")
    return data / "veneer"
