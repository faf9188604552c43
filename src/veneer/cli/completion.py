"""Print shell completion of commands, flags and their choices. Pressing Tab starts no Python.

For instance:

  veneer completion bash > ~/.local/share/bash-completion/completions/veneer
  veneer completion zsh > ~/.veneer.zsh; echo 'source ~/.veneer.zsh' >> ~/.zshrc
  veneer completion fish > ~/.config/fish/completions/veneer.fish
"""

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from veneer.cli.flags import add_value
from veneer.private.argparse import actions_of, subparsers_of


def add_arguments(parser: ArgumentParser) -> None:
    add_value(parser, "shell", None, "your shell", choices=SHELLS)


def run(args: Namespace) -> int:
    print(SHELLS[args.shell](collect_words()), end="")
    return 0


@dataclass(frozen=True)
class CommandWords:
    """Words that may follow a command.

    flags   every flag with its choices; empty for a flag without choices
    """

    about: str
    flags: dict[str, tuple[str, ...]]
    actions: tuple[str, ...]
    choices: tuple[str, ...]


def collect_words() -> dict[str, CommandWords]:
    """Collects the words of every command, and of every action as `command action`."""
    from veneer.cli.main import COMMANDS, command_module

    words: dict[str, CommandWords] = {}
    for name, about in COMMANDS.items():
        parser = ArgumentParser(add_help=True)
        command_module(name).add_arguments(parser)
        words |= _words_of_parser(name, about, parser)
    words["train"].flags.update(_words_of_settings())
    return words


def _words_of_settings() -> dict[str, tuple[str, ...]]:
    """Collects the choices of `train`'s flags from the settings."""
    from veneer.adapters.config import METHODS
    from veneer.cli.config_file import FLAGS
    from veneer.files.settings import words_at
    from veneer.objectives.config import OBJECTIVES
    from veneer.training.config import SHORT_FORMS, RunConfig

    words = {
        f"--{name.replace('_', '-')}": words_at(RunConfig, path) for name, path in FLAGS.items()
    }
    return {flag: choices for flag, choices in words.items() if choices} | {
        "--method": (*METHODS, *SHORT_FORMS),
        "--objective": tuple(OBJECTIVES),
    }


def _words_of_parser(name: str, about: str, parser: ArgumentParser) -> dict[str, CommandWords]:
    flags: dict[str, tuple[str, ...]] = {}
    inner: dict[str, CommandWords] = {}
    actions: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    for argument in actions_of(parser):
        if (subparsers := subparsers_of(argument)) is not None:
            for action, about_action, subparser in subparsers:
                inner |= _words_of_parser(f"{name} {action}", about_action, subparser)
            actions = tuple(argument.choices or ())
        elif argument.option_strings:
            known = tuple(map(str, argument.choices or ()))
            flags |= {flag: known for flag in argument.option_strings if flag.startswith("--")}
        else:
            choices += tuple(map(str, argument.choices or ()))
    return {name: CommandWords(about, flags, actions, choices), **inner}


def bash(words: Mapping[str, CommandWords]) -> str:
    tops = [name for name in words if " " not in name]
    nested = [name for name in tops if words[name].actions]
    values, flags, others = [], [], []
    for name, its in words.items():
        flags.append(f"    {shlex.quote(name)}) words={shlex.quote(' '.join(its.flags))} ;;")
        values += [
            f"    {shlex.quote(f'{name} {flag}')}) words={shlex.quote(' '.join(known))} ;;"
            for flag, known in its.flags.items()
            if known
        ]
        if its.actions or its.choices:
            others.append(
                f"    {shlex.quote(name)})"
                f" words={shlex.quote(' '.join(its.actions + its.choices))} ;;"
            )
    return "\n".join(
        [
            "# veneer: what may be typed next; made by `veneer completion`",
            "_veneer() {",
            "  local words='' command=${COMP_WORDS[1]} current=${COMP_WORDS[COMP_CWORD]}",
            "  local before=${COMP_WORDS[COMP_CWORD-1]}",
            f"  case $command in {'|'.join(nested)})",
            '    if [ "$COMP_CWORD" -gt 2 ]; then command="$command ${COMP_WORDS[2]}"; fi ;;',
            "  esac",
            '  case "$command $before" in',
            *values,
            "  esac",
            '  if [ "$COMP_CWORD" -eq 1 ]; then',
            f"    words={shlex.quote(' '.join([*tops, '--help', '--version']))}",
            '  elif [ -z "$words" ]; then',
            '    case "$current" in',
            '    -*) case "$command" in',
            *flags,
            "    esac ;;",
            '    *) case "$command" in',
            *others,
            "    esac ;;",
            "    esac",
            "  fi",
            '  COMPREPLY=( $(compgen -W "$words" -- "$current") )',
            "}",
            "complete -o default -F _veneer veneer",
            "",
        ]
    )


def zsh(words: Mapping[str, CommandWords]) -> str:
    """Returns bash's completion, which zsh runs."""
    return "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n" + bash(words)


def fish(words: Mapping[str, CommandWords]) -> str:
    lines = ["# veneer: what may be typed next; made by `veneer completion`"]
    for name, command_words in words.items():
        top, _, action = name.partition(" ")
        about = _fish(command_words.about)
        if action:
            has_command = (
                f"__fish_seen_subcommand_from {top}; and __fish_seen_subcommand_from {action}"
            )
            no_action = (
                f"__fish_seen_subcommand_from {top}; and not __fish_seen_subcommand_from"
                f" {' '.join(words[top].actions)}"
            )
            lines.append(f"complete -c veneer -n {_fish(no_action)} -a {action} -d {about}")
        else:
            has_command = f"__fish_seen_subcommand_from {top}"
            lines.append(f"complete -c veneer -n __fish_use_subcommand -a {top} -d {about}")
        for flag, values in command_words.flags.items():
            takes = f" -xa {_fish(' '.join(values))}" if values else ""
            lines.append(f"complete -c veneer -n {_fish(has_command)} -l {flag[2:]}{takes}")
        if command_words.choices:
            choices = _fish(" ".join(command_words.choices))
            lines.append(f"complete -c veneer -n {_fish(has_command)} -a {choices}")
    return "\n".join([*lines, ""])


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[Mapping[str, CommandWords]], str]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
}
