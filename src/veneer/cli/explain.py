"""What a code in a message means, what leads to it, and the way out.

For instance:

  veneer explain D107
  veneer explain              all codes, a line each
"""

from __future__ import annotations

import argparse
import re
import tomllib
from difflib import get_close_matches
from pathlib import Path

from veneer.cli.common import add_json, print_json
from veneer.errors import ConfigError

FIELDS = {"title": "", "cause": "why", "way": "way out", "example": "for instance"}
"""What every code has, and what that is called on the screen."""
FILE = Path(__file__).with_name("codes.toml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("codes", nargs="*", metavar="CODE", help="as it stands in the message; default: a list of all")
    parser.add_argument("--markdown", action="store_true", help="all of them as the page docs/errors.md")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    known = codes()
    asked = [code.upper() for code in args.codes]
    if unknown := [code for code in asked if code not in known]:
        near = {code: get_close_matches(code, known, n=3, cutoff=0.7) for code in unknown}
        told = [code + (f": did you mean {', '.join(near[code])}?" if near[code] else "") for code in unknown]
        raise ConfigError("there is no such code", told, "veneer explain lists all.")
    chosen = {code: known[code] for code in asked or known}
    if args.json:
        print_json(chosen)
    elif args.markdown:
        print(page(chosen), end="")
    elif asked:
        print("\n\n".join(text(code, entry) for code, entry in chosen.items()))
    else:
        print("\n".join(f"{code}  {entry['title']}" for code, entry in chosen.items()))
    return 0


def codes() -> dict[str, dict[str, str]]:
    """Every code with its FIELDS."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def codes_in(message: str) -> list[str]:
    """Those that begin a line of an error, each once."""
    return list(dict.fromkeys(re.findall(r"^\s*([A-Z]\d{3}) ", message, re.MULTILINE)))


def more(found: list[str]) -> str:
    """The line that leads here from a message with these codes."""
    return f"More on {'it' if len(found) == 1 else 'each'}: veneer explain {' '.join(found[:6])}"


def text(code: str, entry: dict[str, str]) -> str:
    """For the screen: a line of 80 characters at most, and what belongs to it indented."""
    from textwrap import fill

    lines = [f"{code}  {entry['title']}"]
    for field, called in FIELDS.items():
        if called == "for instance":
            lines += [f"  {called:<14}" + ("\n" + " " * 16).join(entry[field].split("\n"))]
        elif called:
            lines.append(fill(entry[field], 80, initial_indent=f"  {called:<14}", subsequent_indent=" " * 16))
    return "\n".join(lines)


def page(known: dict[str, dict[str, str]]) -> str:
    """docs/errors.md."""
    head = (
        "# Error codes\n\nA message that has a code begins a line with it. `veneer explain D107` says the same as this"
        " page,\nwhich `veneer explain --markdown` wrote.\n\n- `C`: settings, in a run file, in flags and in Python\n"
        "- `D1`: rows as they stand in files; `D2`: rows as the model would see them\n- `T`: training\n"
    )
    sections = [
        f"\n## {code}\n\n**{entry['title']}.** {entry['cause']}\n\n{entry['way']}\n\n```text\n{entry['example']}\n```\n"
        for code, entry in known.items()
    ]
    return head + "".join(sections)
