"""What the flags of every command do when they are given several times."""

from argparse import Action, ArgumentTypeError
from contextlib import suppress

import pytest

from veneer.cli import main
from veneer.cli.training.train_jobs import _command_again
from veneer.private.argparse import actions_of, subparsers_of


def parsers(name: str, parser: main.Parser) -> dict[str, main.Parser]:
    """The parser of a command, or those of its actions."""
    for argument in actions_of(parser):
        if (inner := subparsers_of(argument)) is not None:
            return {f"{name} {action}": subparser for action, _, subparser in inner}
    return {name: parser}


def parsers_of_all_commands() -> dict[str, main.Parser]:
    found: dict[str, main.Parser] = {}
    for name in main.COMMANDS:
        parser = main.Parser(prog=f"veneer {name}", allow_abbrev=False)
        main.command_module(name).add_arguments(parser)
        found |= parsers(name, parser)
    return found


PARSERS = parsers_of_all_commands()
FLAGS = {
    f"{name} {argument.option_strings[-1]}": (parser, argument)
    for name, parser in PARSERS.items()
    for argument in actions_of(parser)
    if argument.option_strings and argument.nargs != 0
}


def accepted_value(argument: Action) -> str:
    """A value that the flag takes, as typed."""
    if argument.choices is not None:
        return str(next(iter(argument.choices)))
    for value in ("x", "2", "0.5"):
        with suppress(ArgumentTypeError):
            (argument.type or str)(value)
            return value
    raise AssertionError(f"none of these is a value of {argument.option_strings[-1]}")


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_given_twice_keeps_both_values_or_is_refused(flag, capsys):
    parser, argument = FLAGS[flag]
    typed = [argument.option_strings[-1], accepted_value(argument)]
    for other in actions_of(parser):
        other.required = False
    once = getattr(parser.parse_args(typed), argument.dest)
    if isinstance(once, list):
        assert len(once) == 1
        assert getattr(parser.parse_args([*typed, *typed]), argument.dest) == once * 2
        return
    assert argument.nargs in (None, "?")
    for words in ([*typed, *typed], [*typed, "=".join(typed)]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        said = capsys.readouterr().err
        assert f"{typed[0]}: takes one value, and is given several times" in said


def test_what_follows_two_dashes_is_no_repeated_flag(capsys):
    assert main.main(["explain", "--", "--json", "--json"]) == 2
    assert "several times" not in capsys.readouterr().err


def test_the_command_that_goes_on_names_each_folder_once():
    words = ["train", "--resume=a", "--quiet", "--resume", "b"]
    args = PARSERS["train"].parse_args(words[1:])
    args.words = words
    assert args.resume == ["a", "b"]
    assert _command_again(args) == "veneer train --quiet --resume a b"
