"""The home folder, and what `~` stands for."""

from __future__ import annotations

from pathlib import Path

from veneer.errors import ConfigError


def expanded(named: str | Path) -> Path:
    """`~` and `~name` as folders; a name that the system does not know stays as it is written, as
    in a shell."""
    path = Path(named)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def home() -> Path:
    """ConfigError: the system knows none for this user, as in a container whose user has no
    name."""
    try:
        return Path.home()
    except RuntimeError:
        raise ConfigError(
            "this user has no home folder", [], "Set HOME to a folder that can be written."
        ) from None


def name_of(source: str) -> str:
    """What others are told a base is called: a hub's name, or the last part of a path."""
    path = expanded(source)
    if path.exists():
        return path.resolve().name
    return path.name if path.is_absolute() else source
