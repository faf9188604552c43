"""Flags that several commands have, and their output."""

from __future__ import annotations

import atexit
import gc
import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, get_args

from veneer.bounds import LENGTH
from veneer.cli.flags import add_repeated, add_switch, add_value
from veneer.errors import ConfigError, InputError
from veneer.files.home import expanded
from veneer.files.strict_json import finite_or_null
from veneer.private.argparse import Container
from veneer.wording import cut, shown

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.adapters.preamble import Preamble
    from veneer.base import Base
    from veneer.training.output.working import ReportProgress


def require_stdin() -> TextIO:
    """Returns stdin. InputError if it is closed (`<&-`, or a service without stdin)."""
    if sys.stdin is None or sys.stdin.closed:
        raise InputError(
            "standard input is closed", [], "Give the text as an argument, or on stdin."
        )
    return sys.stdin


@contextmanager
def pause_collection() -> Iterator[None]:
    """Pauses the garbage collector while torch and transformers are imported: their objects stay,
    and it would take a sixth of the time. Later collections skip these objects, until the process
    ends and some libraries report what is left."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
        atexit.register(gc.unfreeze)


def add_action(actions: Any, name: str, help: str) -> ArgumentParser:
    """Adds an action of a command; its help is also the first line of its own page."""
    description = help[0].upper() + help[1:] + "."
    parser: ArgumentParser = actions.add_parser(
        name, help=help, description=description, allow_abbrev=False
    )
    return parser


def add_json(parser: Container, *, default: Any = False) -> None:
    message = "print the result as JSON on stdout, messages on stderr"
    add_switch(parser, "--json", message, default=default)


def add_lookup(parser: Container) -> None:
    add_value(
        parser,
        "--lookup",
        None,
        (
            "auto: guess tokens that an answer may copy and check several in one step; off: one"
            " token a step; the text is the same; default: auto"
        ),
        default="auto",
        choices=["auto", "off"],
    )


def add_map(parser: Container) -> None:
    add_repeated(
        parser,
        "--map",
        "COLUMN=NAME",
        "rename a column: --map question=prompt --map answer=completion; COLUMN=null drops it",
        dest="columns",
    )


def parse_columns(args: Namespace) -> dict[str, str | None]:
    """Parses --map COLUMN=NAME. ConfigError if one is malformed."""
    columns: dict[str, str | None] = {}
    for text in args.columns:
        column, sign, name = text.partition("=")
        if not column or not name or not sign:
            step = "For instance --map question=prompt --map answer=completion."
            raise ConfigError(f"--map {text}: write --map COLUMN=NAME", next_step=step)
        columns[column] = None if name == "null" else name
    return columns


def add_variables(parser: ArgumentParser, what: str = "") -> None:
    add_repeated(
        parser,
        "--variable",
        "NAME=VALUE",
        (
            "variable for the chat template, such as enable_thinking=false; NAME=null removes one"
            + what
        ),
        dest="variables",
    )


def add_preamble(parser: ArgumentParser) -> None:
    """Adds --system and --variable, whose defaults are those that the adapter was trained with."""
    add_value(
        parser,
        "--system",
        "TEXT",
        (
            "system message for conversations without one; default: the one the adapter was"
            " trained with; '': none"
        ),
    )
    add_variables(parser, "; default: as the adapter was trained")


def parse_variables(args: Namespace) -> dict[str, Any]:
    """Parses --variable NAME=VALUE, with YAML values. Raises ConfigError with all faults."""
    from veneer.adapters.preamble import check_variables
    from veneer.cli.config_file import UncheckedSettings, parse_yaml

    variables: dict[str, Any] = {}
    for assignment in args.variables:
        name, sign, text = assignment.partition("=")
        if not sign or not name:
            raise ConfigError(
                f"--variable {assignment}: write --variable NAME=VALUE",
                next_step="For instance enable_thinking=false.",
            )
        variables[name] = parse_yaml(text, f"--variable {name}", UncheckedSettings())
    check_variables(variables)
    return variables


def resolve_preamble(args: Namespace, base: Base) -> Preamble:
    """Returns the preamble of conversations with these flags; prints it if the adapter brings
    one."""
    preamble = base.preamble.overridden(args.system, parse_variables(args))
    if base.preamble and preamble:
        parts = [] if preamble.system is None else [f"system: {cut(preamble.system, 60)!r}"]
        parts += [
            f"{name}: {json.dumps(value, ensure_ascii=False)}"
            for name, value in preamble.variables.items()
        ]
        off = (
            "  (--system '' leaves it out)"
            if preamble.system is not None and args.system is None
            else ""
        )
        line = f"asked as the adapter was trained · {' · '.join(parts)}{off}"
        make_console(json=True).print(shown(line), style="dim")
    return preamble


def add_card(parser: ArgumentParser) -> None:
    """Adds flags for what a model card shows beside the adapter's manifest."""
    add_value(
        parser,
        "--figures",
        "FILE",
        "output of veneer evaluate --json, added to the model card",
        type=Path,
    )
    add_switch(
        parser, "--sample", "show one of your held-out rows, with both answers, in the model card"
    )


def add_library(parser: ArgumentParser) -> None:
    add_value(parser, "--library", "DIR", "library folder; default: your own library")


def adapters_command(args: Namespace, *words: object) -> str:
    """Returns a `veneer adapters` command in the library of `args`, quoted for a shell."""
    library = [] if args.library is None else ["--library", expanded(args.library).absolute()]
    return shown(shlex.join(map(str, ["veneer", "adapters", *words, *library])))


def add_data(parser: ArgumentParser, *others: str) -> None:
    """Adds --length, --format, --train-on and other choices of `data` settings, with their help."""
    from veneer.cli.config_file import summarize_setting
    from veneer.training.config import DataConfig, RunConfig

    length = RunConfig.model_fields["length"].default
    add_value(
        parser,
        "--length",
        "N",
        f"longest row in tokens; default: {length}",
        type=LENGTH,
        default=length,
    )
    for name in ("format", "train_on", *others):
        field, summary = DataConfig.model_fields[name], summarize_setting(("data", name))
        choices = get_args(field.annotation)
        is_long = len(" ".join(choices)) > 60
        add_value(
            parser,
            "--" + name.replace("_", "-"),
            name.upper() if is_long else None,
            f"{summary}; one of {', '.join(choices)}" if is_long else summary,
            default=field.default,
            choices=choices,
        )


def print_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """Prints JSON on stdout; numbers that are not finite become null."""
    print(json.dumps(finite_or_null(data), indent=2, ensure_ascii=False, allow_nan=False))


def working(label: str) -> AbstractContextManager[ReportProgress]:
    """Shows progress until the block ends (training/output/working.py); imports rich."""
    from veneer.training.output.working import working

    return working(label)


def make_console(*, json: bool = False, wraps: bool = False) -> Console:
    """Returns the console for people: stdout, or stderr if stdout carries data. It interprets no
    markup.

    wraps: whether it breaks long lines; else the terminal does. A failing write to stdout is an
    error (cli/main.py), one to stderr is not.
    """
    from rich.console import Console

    from veneer.training.output.console import log_console

    class ResultConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would leave by SystemExit(1)

    console = (
        log_console(stderr=True)
        if json
        else ResultConsole(highlight=False, markup=False, emoji=False)
    )
    console.soft_wrap = not wraps
    return console
