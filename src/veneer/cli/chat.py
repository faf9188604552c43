"""Talk to a base, with or without an adapter; the answer is shown as it is made.

In the conversation: /system TEXT sets the system message and starts anew, /reset starts anew,
/exit or Ctrl-D leaves, Ctrl-C stops an answer. Three double quotes open a text of several lines,
three more end it.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from veneer.cli.common import add_base, add_preamble, asked_as, load_base, standard_input, variables_of
from veneer.cli.generate import add_sampling
from veneer.errors import VeneerError
from veneer.wording import shown

if TYPE_CHECKING:
    from veneer.base import Base

HELP = "/system TEXT  /reset  /exit"
FENCE = '"""'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_base(parser)
    add_preamble(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    source = standard_input()
    base = load_base(args)
    if source.isatty():
        import readline  # noqa: F401  # input() then has arrow keys and a history

        print(f"{HELP}  {FENCE} several lines {FENCE}  (Ctrl-C stops an answer)", file=sys.stderr)
    system = asked_as(args, base).system
    messages = _opening(system)
    while True:
        try:
            line, fenced = _read()
        except EOFError:
            return 0
        command, _, rest = line.partition(" ")
        if fenced:  # whatever it begins with, it is no command
            if line:
                messages = _answer(base, [*messages, {"role": "user", "content": line}], args)
        elif command == "/exit":
            return 0
        elif command in ("/reset", "/system"):
            if command == "/system":
                system = rest.strip() or None
            messages = _opening(system)
            print("new conversation", file=sys.stderr)
        elif line.startswith("/"):
            print(f"unknown command {command}: there is {HELP}", file=sys.stderr)
        elif line:
            messages = _answer(base, [*messages, {"role": "user", "content": line}], args)


def _read() -> tuple[str, bool]:
    """The next line; or, fenced, all lines up to the closing fence (or the end of input), as they are.

    Raises EOFError where the input has ended.
    """
    on_terminal = sys.stdin.isatty()
    line = input("> " if on_terminal else "").strip()
    if not line.startswith(FENCE):
        return line, False
    lines, text = [], line.removeprefix(FENCE)
    while not text.rstrip().endswith(FENCE):
        lines.append(text)
        try:
            text = input("… " if on_terminal else "")
        except EOFError:
            text = FENCE
    lines.append(text.rstrip().removesuffix(FENCE))
    return "\n".join(lines).strip("\n"), True


def _opening(system: str | None) -> list[dict[str, Any]]:
    return [{"role": "system", "content": system}] if system is not None else []


def _answer(base: Base, messages: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The conversation with the answer, which is printed; without the question where it failed."""
    pieces: list[str] = []

    def show(text: str) -> None:
        pieces.append(text)
        print(shown(text), end="", flush=True)

    try:
        answer = base.generate(
            messages,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            system="",  # what stands in front is in the messages
            variables=variables_of(args),
            on_text=show,
        )
    except KeyboardInterrupt:
        answer = "".join(pieces)
    except VeneerError as error:  # too long for the model, say: the conversation goes on without it
        print(shown(error), file=sys.stderr)
        return messages[:-1]
    print()
    return [*messages, {"role": "assistant", "content": answer}]
