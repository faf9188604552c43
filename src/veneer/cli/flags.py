"""Adds flags and arguments to a parser: a value, a switch, or a value that may be repeated."""

from collections.abc import Iterable
from typing import Any

from veneer.private.argparse import Container


def add_value(
    parser: Container,
    name: str,
    placeholder: str | None,
    help: str | None = None,
    *,
    type: Any = None,
    default: Any = None,
    choices: Iterable[Any] | None = None,
    nargs: str | None = None,
    const: Any = None,
    required: bool = False,
) -> None:
    """Adds a flag with a value, or an argument without dashes.

    placeholder  stands for the value in the help; None: its name or its choices do
    type         parses the value, and checks it against bounds (bounds.py)
    nargs        + or *: a flag takes several values, and may be given several times
    """
    takes_several = name.startswith("-") and nargs in ("+", "*")
    action = parser.add_argument(
        name,
        action="extend" if takes_several else "store",
        metavar=placeholder,
        help=help,
        type=type,
        default=default,
        choices=choices,
        nargs=nargs,
        const=const,
    )
    action.required = required or (not action.option_strings and action.required)


def add_switch(parser: Container, name: str, help: str, *, default: Any = False) -> None:
    """Adds a flag without a value, which is true if it is given."""
    parser.add_argument(name, action="store_true", default=default, help=help)


def add_repeated(
    parser: Container, name: str, placeholder: str, help: str, *, dest: str | None = None
) -> None:
    """Adds a flag that may be given several times; its values are a list."""
    action = parser.add_argument(name, action="append", default=[], metavar=placeholder, help=help)
    action.dest = dest or action.dest
