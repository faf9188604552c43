"""`veneer`: finds the command, runs it, and turns errors into a message and an exit code.

A command is one file with `add_arguments(parser)` and `run(args) -> int`, imported only when it is
run. This file imports neither torch nor transformers nor pydantic nor rich, so help is instant.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TextIO

from veneer import __version__
from veneer.cli.typed_flags import find_repeated_flags, find_unknown_flags
from veneer.errors import DoesNotFitError, VeneerError, is_out_of_memory, missing_on_device
from veneer.files.system_errors import refusal
from veneer.private import argparse as private
from veneer.private.interpreter import call_exit_functions, finish_threads
from veneer.training.output.streams import LogStream, ResultStream, silence
from veneer.vocabulary import ACTIONS_ELSEWHERE, CHOICES_ELSEWHERE, COMMANDS_ELSEWHERE, nearest_word
from veneer.wording import reflowed, shown, wrapped

GROUPS = {
    "start": {
        "demo": "fine-tune a small model in minutes and show answers before and after",
        "doctor": "show versions, hardware and caches, for a bug report",
        "explain": "explain an error code or a setting",
        "completion": "print shell completion for bash, zsh or fish",
    },
    "train": {
        "data": "check, convert, split or sample rows",
        "plan": "predict memory, time and cost before a run",
        "train": "train an adapter, or all weights",
        "distil": "train an adapter that replaces a long prompt or a document",
        "tune": "search settings on your rows, train the best and judge it",
        "runs": "list, follow, stop and resume training jobs of a server or studio",
        "report": "rebuild the report of a run",
        "compare": "compare methods on your rows",
    },
    "use": {
        "evaluate": "measure loss and metrics on held-out rows",
        "score": "write the log-probability of given answers, by row",
        "generate": "answer one prompt",
        "chat": "talk to a base, with or without an adapter",
        "studio": "train, judge and serve adapters from a page in the browser",
        "serve": "answer OpenAI-style HTTP requests for a base and its adapters",
    },
    "manage adapters": {
        "adapters": "keep adapters in a library: list, add, tag, verify, push, pull",
        "merge": "merge adapters into the base: a plain model",
        "combine": "combine several adapters into one",
        "extract": "extract an adapter from a fully fine-tuned model",
        "export": "write an adapter for PEFT, vLLM, llama.cpp or Ollama",
        "lint": "check whether another program can load an adapter",
        "quantize": "write a base in 4 bits",
    },
}
"""Commands and their summaries, by purpose."""
COMMANDS = {name: summary for commands in GROUPS.values() for name, summary in commands.items()}
FOLDERS = {
    **dict.fromkeys(
        ("adapters", "combine", "export", "extract", "lint", "merge", "quantize"), "library."
    ),
    **dict.fromkeys(
        (
            *("train", "tune", "compare", "distil", "evaluate", "score"),
            *("report", "runs", "plan", "demo"),
        ),
        "training.",
    ),
    **dict.fromkeys(("serve", "studio", "chat", "generate"), "answers."),
    "data": "rows.",
}
"""The folder of a command's module; other commands are beside this file."""


READER_GONE = 128 + 13
"""Exit code of a program that SIGPIPE ended: its output pipe was closed (`veneer ... | head`)."""

EXIT_CODES = """exit codes: 0 done, 1 a bug of ours, 2 the input is wrong,
3 it does not fit (memory, disk), 4 a check refused, 5 training diverged,
6 another process of the run failed, 130 interrupted with a checkpoint saved,
141 output pipe closed"""


class HelpFormatter(private.HelpFormatter):
    """Keeps descriptions as written, and wraps lines that are too wide for the terminal."""

    def fill(self, text: str, width: int) -> str:
        return reflowed(text, width)

    def lay_out_usage(self, usage: str, width: int) -> str:
        return wrapped(usage, width) + "\n\n"


class Parser(private.Parser):
    """Parses arguments; errors look like all others: the fault, then what to do; exit code 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reports unknown flags first, with suggestions, then repeated ones, whatever else is
        missing."""
        words = list(sys.argv[1:] if args is None else args)
        if private.has_subparsers(self):
            return super().parse_known_args(words, namespace)
        if unknown := find_unknown_flags(self, words):
            head = "unknown flag " if len(unknown) == 1 else f"{len(unknown)} unknown flags:\n  "
            self.error(head + "\n  ".join(unknown))
        if repeated := find_repeated_flags(self, words):
            self.error(f"{', '.join(repeated)}: takes one value, and is given several times")
        return super().parse_known_args(words, namespace)

    def check_value(self, action: argparse.Action, value: Any) -> None:
        """Reports an unknown choice with a suggestion."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            suggestion = nearest_word(
                str(value),
                choices,
                ACTIONS_ELSEWHERE if action.dest == "action" else CHOICES_ELSEWHERE,
            )
            hint = f"did you mean {suggestion}?" if suggestion else f"one of {', '.join(choices)}"
            subject = (
                action.option_strings[-1] if action.option_strings else f"unknown {action.dest}"
            )
            self.error(f"{subject} {value}: {hint}")

    def error(self, message: str) -> NoReturn:
        print_error(f"{self.prog}: {message}\nSee {self.prog} --help.")
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code, which also reports output that could not be
    written."""
    previous_streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = sys.stdout or _open_devnull(), sys.stderr or _open_devnull()
    if hasattr(sys.stdin, "reconfigure"):  # bad bytes are reported by whoever reads the text
        with suppress(OSError):  # the caller may have read from it already
            sys.stdin.reconfigure(errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows code page has no ▼: print ? rather than fail
            stream.reconfigure(errors="replace")
    result: Any = ResultStream(sys.stdout)
    talk: Any = LogStream(sys.stderr)
    sys.stdout, sys.stderr = result, talk
    try:
        code = _run_to_exit_code(
            list(sys.argv[1:] if argv is None else argv), result, alone=argv is None
        )
        with suppress(OSError, ValueError):
            result.flush()
        talk.flush()
        unwritten = _report_unwritten(result) if result.fault is not None else 0
        return code or unwritten
    finally:
        sys.stdout, sys.stderr = previous_streams


def _report_unwritten(result: ResultStream) -> int:
    """Reports that stdout could not be written, unless its reader closed it."""
    fault = result.fault
    silence(result.stream)  # else the interpreter tries again when it ends, and reports that
    if isinstance(fault, BrokenPipeError):
        return READER_GONE
    print_error(
        f"stdout cannot be written: {getattr(fault, 'strerror', None) or fault}\nWrite to another"
        " file."
    )
    return DoesNotFitError.exit_code


def _run_to_exit_code(argv: list[str], result: ResultStream, alone: bool) -> int:
    try:
        return _run(argv, alone)
    except VeneerError as error:
        print_error(_add_explanations(str(error)))
        return error.exit_code
    except SystemExit as exit_request:  # argparse, after --help or an error that it has printed
        return int(exit_request.code or 0)
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    except Exception as fault:
        if fault is result.fault or (
            isinstance(fault, BrokenPipeError) and result.fault is not None
        ):
            return 0  # main reports it
        if is_out_of_memory(fault):
            print_error(
                "out of memory:"
                f" {str(fault).splitlines()[0] if str(fault) else type(fault).__name__}\nFree"
                " memory, or ask for less at once: a smaller base, fewer or shorter rows,"
                " --quantize nf4."
            )
            return DoesNotFitError.exit_code
        # An error of the system, or of a device without a feature, is no bug of Veneer.
        if (refused := refusal(fault) or missing_on_device(fault)) is not None:
            print_error(str(refused))
            return refused.exit_code
        traceback.print_exc()
        print_error(
            "This is a bug in Veneer, not in what you typed. Please report it to the project's"
            " issue tracker, with the lines above and what `veneer doctor --json` prints."
        )
        return 1


def _add_explanations(message: str) -> str:
    """Adds how to explain the codes in an error."""
    from veneer.cli.explain import find_codes, point_to_codes

    codes = find_codes(message)
    return f"{message}\n{point_to_codes(codes)}" if codes else message


def _open_devnull() -> TextIO:
    """Opens a replacement for a stream that was closed before the start (`veneer ... >&-`)."""
    return Path(os.devnull).open("w", encoding="utf-8")


def _run(argv: list[str], alone: bool) -> int:
    """Parses the arguments and runs the command. alone: the process was started for it."""
    parser = Parser(
        prog="veneer",
        description="Fine-tune language models by training a thin layer over a frozen base.",
        epilog=f"{_format_groups()}\n\nDetails: veneer COMMAND --help\n\n{EXIT_CODES}",
        formatter_class=HelpFormatter,
        usage="veneer COMMAND ...",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"veneer {__version__}")
    if not argv:
        return _show_next_steps(parser)
    if argv[0].startswith("-"):
        parser.parse_args(argv)  # --help and --version leave from here
    if argv[0] not in COMMANDS:
        suggestion = COMMANDS_ELSEWHERE.get(argv[0].lower()) or nearest_word(argv[0], COMMANDS)
        hint = f": did you mean `veneer {suggestion}`?" if suggestion else ""
        parser.error(f"unknown command {argv[0]!r}{hint}")
    command = command_module(argv[0])
    command_parser = Parser(
        prog=f"veneer {argv[0]}",
        description=command.__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(command_parser)
    parsed = command_parser.parse_args(argv[1:])
    parsed.words = argv
    if alone:
        import_module("veneer.files.remembered").begin()
        _announce_downloads()
    code: int = command.run(parsed)
    return code


def command_module(name: str) -> ModuleType:
    """Imports the module of a command."""
    return import_module(f"veneer.cli.{FOLDERS.get(name, '')}{name}")


def _format_groups() -> str:
    """Lists the commands by purpose, a line each."""
    lines = []
    for title, commands in GROUPS.items():
        lines += [
            "",
            f"{title}:",
            *(f"  {name:<12}{summary}" for name, summary in commands.items()),
        ]
    return "\n".join(lines[1:])


def _show_next_steps(parser: argparse.ArgumentParser) -> int:
    """Shows next steps on a terminal, and all commands in a file or pipe."""
    if not sys.stdout.isatty():
        parser.print_help()
        return 0
    from veneer.cli.next_steps import format_next_steps
    from veneer.library.folder import default_folder

    print(format_next_steps(Path(), default_folder()))
    return 0


def _announce_downloads() -> None:
    """Announces downloads and conversions on stderr, as they may take a minute."""
    import logging

    class FirstTimeHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line_start = (
                "\r\033[2K" if sys.stderr.isatty() else ""
            )  # over a line that says how long, which comes again below
            print(f"{line_start}  {shown(record.getMessage())}", file=sys.stderr, flush=True)

    bases = logging.getLogger("veneer.bases")
    bases.setLevel(logging.INFO)
    bases.propagate = False
    bases.handlers = [FirstTimeHandler()]


def print_error(message: str) -> None:
    """Prints to stderr; on a terminal the first line is red unless NO_COLOR is set."""
    stream: TextIO = sys.stderr
    first, *rest = shown(message).split("\n")
    if stream.isatty() and not os.environ.get("NO_COLOR"):
        first = f"\033[1;31m{first}\033[0m"
    print("\n".join([first, *rest]), file=stream)


def process() -> NoReturn:
    """Runs `veneer` as a process of its own, and exits with main's code."""
    leave(main())


def leave(code: int) -> NoReturn:
    """Ends the process as Python does, but without freeing its objects: with torch and transformers
    loaded, that takes a second. It waits for threads that are not daemons, calls the functions of
    atexit, and flushes the streams."""
    try:
        finish_threads()
        call_exit_functions()
        for stream in (sys.stdout, sys.stderr):
            with suppress(
                OSError, ValueError, AttributeError
            ):  # main has said that it cannot be written
                stream.flush()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    process()
