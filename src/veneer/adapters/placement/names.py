"""Checks what a user names as adapters in the Python API."""

from collections.abc import Container, Iterable, Sequence
from itertools import count

from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.routing import Active
from veneer.bounds import check_weights
from veneer.errors import ConfigError
from veneer.wording import kind_of


def active_adapters(
    name: str | Sequence[str] | None, weights: Sequence[float] | None = None
) -> Active:
    """Pairs one name, several or none with weights, 1 by default. Raises ConfigError."""
    if name is None:
        names: list[str] = []
    elif isinstance(name, str) or not isinstance(name, Iterable):
        names = [name]
    else:
        names = [*name]
    for item in names:
        if not isinstance(item, str):
            raise name_error(item)
    if weights is not None and (isinstance(weights, str) or not isinstance(weights, Iterable)):
        raise ConfigError(
            f"weights is {weights!r}, and takes one for each adapter",
            next_step="For instance [0.5].",
        )
    weights = None if weights is None else [*weights]
    check_weights(weights or ())
    if weights is not None and len(weights) != len(names):
        raise ConfigError(
            f"{len(names)} adapters and {len(weights)} weights: give one weight for each"
        )
    return tuple(zip(names, weights or [1.0] * len(names), strict=True))


def adapter_names(named: str | Sequence[str | None] | None) -> list[str | None]:
    """Lists adapters to use one by one, each once; None is the base alone. Raises ConfigError."""
    names = [named] if isinstance(named, str) or not isinstance(named, Iterable) else [*named]
    for item in names:
        if item is not None:
            check_name(item)
    return list(dict.fromkeys(names))


def check_name(name: object) -> None:
    """Raises ConfigError if this cannot be an adapter's name."""
    if not isinstance(name, str) or not name:
        raise name_error(name)


def chosen_name(name: str | None, word: str, taken: Container[str]) -> str:
    """Returns the name that a user gave, or else a free one. Raises ConfigError for no text."""
    if name is None:
        return free_name(word, taken)
    check_name(name)
    return name


def free_name(word: str, taken: Container[str]) -> str:
    """Returns the word with the first number that makes a name which is not taken."""
    return next(name for number in count(1) if (name := f"{word} {number}") not in taken)


def name_error(name: object) -> ConfigError:
    step = (
        f"Give its name: {name.name!r}."
        if isinstance(name, Attachment)
        else "For instance 'tickets'."
    )
    return ConfigError(f"an adapter is named by text, and this is {kind_of(name)}", next_step=step)
