"""Talk to a base, with or without an adapter; answers appear as they are generated.

In the conversation:

  /use NAME     use another adapter (a name or a folder); without NAME: the base alone
  /system TEXT  set the system message; without TEXT: none
  /reset        start a new conversation, as /use and /system do
  /help         show this list
  /exit         leave (also Ctrl-D); Ctrl-C stops an answer

For a message of several lines, begin and end it with three double quotes.
"""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from veneer.cli.answers.generate import add_sampling, report_cut
from veneer.cli.bases import add_base, load_base, locate_adapter
from veneer.cli.common import add_preamble, parse_variables, require_stdin, resolve_preamble
from veneer.errors import ConfigError, VeneerError
from veneer.wording import WordWrap, reflowed, shown

if TYPE_CHECKING:
    from veneer.base import Base

HELP = __doc__.partition("In the conversation:\n\n")[2].rstrip()
FENCE = '"""'

Messages = list[dict[str, Any]]


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "veneer chat [--base B] [--adapter A] [--temperature T] ..."
    add_base(parser)
    add_preamble(parser)
    add_sampling(parser)


def run(args: Namespace) -> int:
    source = require_stdin()
    base = load_base(args)
    if base.tokenizer.chat_template is None:
        step = "Use veneer generate to continue a text, or choose a base that was tuned for chat."
        raise ConfigError(f"{base.source} has no chat template, so it cannot chat", next_step=step)
    if source.isatty():
        import readline  # noqa: F401  # input() then has arrow keys and a history

        who = f"adapter {args.adapter}" if args.adapter else "no adapter"
        _print_status(f"{base.source} · {who} · /help lists commands, Ctrl-D leaves")
    system = resolve_preamble(args, base).system
    messages = _start_messages(system)
    while True:
        try:
            line, fenced = _read()
        except EOFError:
            return 0
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if fenced or not line.startswith("/"):  # fenced text is never a command
            if line:
                messages = _answer(base, [*messages, {"role": "user", "content": line}], args)
        elif command in ("/exit", "/quit", "/bye"):
            return 0
        elif command == "/use":
            if _switch_adapter(base, rest, args):
                system = resolve_preamble(args, base).system
                messages = _start_messages(system)
        elif command in ("/reset", "/system"):
            if command == "/system":
                system = rest or None
            messages = _start_messages(system)
            _print_status("new conversation")
        else:
            help = reflowed(HELP, shutil.get_terminal_size().columns)
            _print_status(help if command == "/help" else f"unknown command {command}:\n{help}")


def _print_status(text: str) -> None:
    print(shown(text), file=sys.stderr)


def _switch_adapter(base: Base, name: str, args: Namespace) -> bool:
    """Switches to an adapter, or to the base alone for an empty name. False if that failed."""
    try:
        if name and name not in base.attachments:
            base.load_adapter(
                locate_adapter(name, args.library), name=name, force_base=args.force_base
            )
        base.use(name or None)
    except VeneerError as error:
        _print_status(str(error))
        return False
    _print_status(f"adapter {name}, new conversation" if name else "no adapter, new conversation")
    return True


def _read() -> tuple[str, bool]:
    """Reads the next message: one line, or all lines between fences. Also returns whether it was
    fenced.

    Raises EOFError at the end of the input.
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


def _start_messages(system: str | None) -> Messages:
    return [{"role": "system", "content": system}] if system is not None else []


def _answer(base: Base, messages: Messages, args: Namespace) -> Messages:
    """Prints the answer and returns the conversation with it, without the question if it failed."""
    pieces: list[str] = []
    wrap = WordWrap(shutil.get_terminal_size().columns if sys.stdout.isatty() else None)

    def show(text: str) -> None:
        pieces.append(text)
        print(wrap.push(shown(text)), end="", flush=True)

    answer: str
    try:
        answer = base.generate(
            messages,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            system="",  # the messages already have the system message
            variables=parse_variables(args),
            on_text=show,
        )
    except KeyboardInterrupt:
        answer = "".join(pieces)
    except VeneerError as error:  # for instance too long: the conversation continues without it
        _print_status(str(error))
        return messages[:-1]
    print(wrap.end())
    report_cut(answer, args.max_new_tokens)
    return [*messages, {"role": "assistant", "content": str(answer)}]
