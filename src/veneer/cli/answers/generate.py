"""Answer one prompt, given as an argument or on stdin.

For instance:

  veneer generate --base smollm2-135m "What is a veneer?"
  veneer generate --adapter runs/tickets < ticket.txt
"""

import sys
from argparse import ArgumentParser, Namespace
from typing import Any, TextIO

from veneer.bounds import NEW_TOKENS, TEMPERATURE
from veneer.cli.bases import add_base, load_base
from veneer.cli.common import (
    add_json,
    add_lookup,
    add_preamble,
    parse_variables,
    print_json,
    require_stdin,
    resolve_preamble,
)
from veneer.cli.flags import add_value
from veneer.errors import InputError
from veneer.wording import shown


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "veneer generate [--base B] [--adapter A] [--temperature T] ... [PROMPT]"
    add_value(parser, "prompt", "PROMPT", "the user's message; default: read from stdin", nargs="?")
    add_base(parser)
    add_preamble(parser)
    add_sampling(parser)
    add_lookup(parser)
    add_json(parser)


def add_sampling(parser: ArgumentParser) -> None:
    """Adds --max-new-tokens and --temperature."""
    add_value(
        parser,
        "--max-new-tokens",
        "N",
        "longest answer in tokens; default: 256",
        type=NEW_TOKENS,
        default=256,
    )
    add_value(
        parser,
        "--temperature",
        "T",
        (
            "0 always takes the likeliest token (default); 1 samples from the model's"
            " probabilities; higher values vary more"
        ),
        type=TEMPERATURE,
        default=0.0,
    )


def _read_prompt(source: TextIO) -> str:
    """Reads the prompt from stdin; on a terminal, first says that it waits for one."""
    if source.isatty():
        print("Type the prompt, then Ctrl-D on an empty line:", file=sys.stderr)
    return source.read()


def run(args: Namespace) -> int:
    prompt = args.prompt if args.prompt is not None else _read_prompt(require_stdin())
    if not prompt.strip():
        raise InputError("the prompt is empty", [], "Give it as an argument, or on stdin.")
    base = load_base(args)
    preamble = resolve_preamble(args, base)
    messages: str | list[dict[str, Any]] = prompt  # a base without a chat template takes only text
    if preamble.system is not None:
        messages = preamble.opening([{"role": "user", "content": prompt}])
    if base.tokenizer.chat_template is None:
        print(
            f"{shown(base.source)} has no chat template, so it continues the text", file=sys.stderr
        )
    streams = sys.stdout.isatty() and not args.json
    answer = base.generate(
        messages,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        lookup=args.lookup,
        system="",
        variables=parse_variables(args),
        on_text=_print_piece if streams else None,
    )
    if args.json:
        print_json({"prompt": messages, "answer": answer, "cut_after": answer.cut_after})
    else:
        # A file or a pipe gets the answer as it is; a terminal never gets its control characters.
        print("" if streams else answer)
        report_cut(answer, args.max_new_tokens)
    return 0


def report_cut(answer: str, limit: int) -> None:
    """Reports on stderr that an answer was cut, and how to get the rest."""
    cut_after: int | None = getattr(
        answer, "cut_after", None
    )  # None if the user stopped the answer
    if cut_after is not None:
        remedy = (
            "increase --max-new-tokens" if cut_after == limit else "the model has no more positions"
        )
        print(f"cut after {cut_after:,} tokens: {remedy}", file=sys.stderr)


def _print_piece(text: str) -> None:
    print(shown(text), end="", flush=True)
