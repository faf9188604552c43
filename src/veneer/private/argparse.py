"""Private parts of argparse. Tried with Python 3.11 to 3.14."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

Container = argparse._ActionsContainer
"""A parser, or a group of its flags."""
Group = argparse._ArgumentGroup


def flags_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.Action]:
    """Returns the actions of a parser by their flags."""
    return parser._option_string_actions


def takes_one_value(parser: argparse.ArgumentParser, flag: str) -> bool:
    """Returns whether this is a flag of the parser whose value a second one would replace."""
    action = flags_of(parser).get(flag)
    return isinstance(action, argparse._StoreAction) and action.nargs in (None, "?")


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return parser._actions


def has_subparsers(parser: argparse.ArgumentParser) -> bool:
    return parser._subparsers is not None


def subparsers_of(
    action: argparse.Action,
) -> Iterator[tuple[str, str, argparse.ArgumentParser]] | None:
    """Yields name, help and parser of each subcommand; None if the action has none."""
    if not isinstance(action, argparse._SubParsersAction):
        return None
    helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
    return ((name, helps.get(name, ""), parser) for name, parser in action.choices.items())


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """A formatter whose subclasses lay out descriptions and usage by public methods."""

    def fill(self, text: str, width: int) -> str:
        return text

    def lay_out_usage(self, usage: str, width: int) -> str:
        return usage

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return self.fill(super()._fill_text(text, width, indent), width)

    def _format_usage(self, usage: Any, *others: Any) -> str:
        text = super()._format_usage(usage, *others)
        return text if usage is None else self.lay_out_usage(text, self._width)


class Parser(argparse.ArgumentParser):
    """A parser whose subclasses check a value by a public method, before argparse does."""

    def check_value(self, action: argparse.Action, value: Any) -> None:
        """Raises for a value that the action does not take."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        self.check_value(action, value)
        super()._check_value(action, value)
