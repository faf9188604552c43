"""Explain an error code or a setting.

For instance:

  veneer explain D107
  veneer explain              all codes, one line each
  veneer explain method.rank
  veneer explain settings     all settings of a run
"""

import re
import tomllib
from argparse import ArgumentParser, Namespace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from veneer.cli.common import add_json, print_json
from veneer.cli.flags import add_switch, add_value
from veneer.errors import ConfigError
from veneer.vocabulary import KeyPath

FIELDS = {"title": "", "cause": "why", "way": "how to fix", "example": "for instance"}
"""Fields of every code, and their labels on the screen."""
FILE = Path(__file__).with_name("codes.toml")


def add_arguments(parser: ArgumentParser) -> None:
    add_value(
        parser,
        "names",
        "NAME",
        "an error code, a setting, or `settings` for all settings; default: all codes",
        nargs="*",
    )
    add_switch(parser, "--markdown", "print all codes as the page docs/errors.md")
    add_json(parser)


def run(args: Namespace) -> int:
    all_codes = load_codes()
    entries_by_name = [_find_entries(name, all_codes) for name in args.names]
    if unknown := [
        name for name, chosen in zip(args.names, entries_by_name, strict=True) if not chosen
    ]:
        similar = {
            name: get_close_matches(name.upper(), all_codes, n=3, cutoff=0.7) for name in unknown
        }
        unknown_names = [
            name + (f": did you mean {', '.join(similar[name])}?" if similar[name] else "")
            for name in unknown
        ]
        step = "`veneer explain` lists the codes, `veneer explain settings` the settings."
        raise ConfigError("there is no such code or setting", unknown_names, step)
    chosen = {
        name: entry for entries in entries_by_name for name, entry in entries.items()
    } or all_codes
    if args.json:
        print_json(chosen)
    elif args.markdown:
        print(format_page(chosen), end="")
    elif entries_by_name:
        texts = [
            format_code(name, entry) if "title" in entry else format_setting(name, entry)
            for name, entry in chosen.items()
        ]
        print(("\n\n" if len(entries_by_name) == len(texts) else "\n").join(texts))
    else:
        print("\n".join(f"{code}  {entry['title']}" for code, entry in chosen.items()))
    return 0


def _find_entries(name: str, all_codes: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Finds the entries of a name: a code, a setting by its path or the end of it, or several
    settings; empty if there are none."""
    if name.upper() in all_codes:
        return {name.upper(): all_codes[name.upper()]}
    all_settings = load_settings()
    if name == "settings":
        return all_settings
    return {
        path: entry
        for path, entry in all_settings.items()
        if path == name or path.endswith(f".{name}")
    } or {path: entry for path, entry in all_settings.items() if path.startswith(f"{name}.")}


def load_settings() -> dict[str, dict[str, str]]:
    """Returns every setting of a run by its path: its meaning and, of a method's or an objective's,
    the names of those that have it."""
    from veneer.adapters.config import METHODS
    from veneer.cli.config_file import describe_setting, list_setting_paths
    from veneer.files.settings import description_at
    from veneer.objectives.config import OBJECTIVES

    entries: dict[str, dict[str, str]] = {}
    kinds: dict[KeyPath, Any] = {}
    for method in METHODS:
        for path in list_setting_paths(method):
            entry = entries.setdefault(".".join(path), {"meaning": "", "methods": ""})
            if path[0] == "method" and path[1] != "name":
                meaning = description_at(METHODS[method], path[1:])
                kind = METHODS[method].model_fields[path[1]].annotation
                if kinds.setdefault(path, kind) != kind:  # another setting of the same name
                    entry["meaning"] += f" With {method}: {meaning}"
                entry["meaning"] = entry["meaning"] or meaning
                entry["methods"] = f"{entry['methods']}, {method}".removeprefix(", ")
            else:
                entry["meaning"] = describe_setting(path)
            if path[0] == "objective" and path[1] != "name":
                objectives = OBJECTIVES.items()
                entry["methods"] = ", ".join(
                    n for n, kind in objectives if path[1] in kind.model_fields
                )
    order = {path: number for number, path in enumerate(map(".".join, list_setting_paths()))}
    return dict(sorted(entries.items(), key=lambda item: order.get(item[0], order["method.init"])))


def format_setting(path: str, entry: dict[str, str]) -> str:
    """Formats a setting for the screen: the path, and its meaning in a column."""
    from textwrap import wrap

    of = f" ({entry['methods']})" if entry["methods"] else ""
    lines = wrap(entry["meaning"] + of, 100 - 26)
    return "\n".join(
        f"{path if number == 0 else '':<24}  {line}" for number, line in enumerate(lines)
    )


def load_codes() -> dict[str, dict[str, str]]:
    """Returns every code with its FIELDS."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def find_codes(message: str) -> list[str]:
    """Returns the distinct codes that begin a line of an error."""
    return list(dict.fromkeys(re.findall(r"^\s*([A-Z]\d{3}) ", message, re.MULTILINE)))


def point_to_codes(codes_: list[str]) -> str:
    """Returns the line of a message that tells how to explain its codes."""
    return f"More on {'it' if len(codes_) == 1 else 'each'}: veneer explain {' '.join(codes_[:6])}"


def format_code(code: str, entry: dict[str, str]) -> str:
    """Formats a code for the screen: its title, and its fields indented, 80 characters wide."""
    from textwrap import fill

    lines = [f"{code}  {entry['title']}"]
    for field, label in FIELDS.items():
        if label == "for instance":
            lines += [f"  {label:<14}" + ("\n" + " " * 16).join(entry[field].split("\n"))]
        elif label:
            lines.append(
                fill(entry[field], 80, initial_indent=f"  {label:<14}", subsequent_indent=" " * 16)
            )
    return "\n".join(lines)


def format_page(entries: dict[str, dict[str, str]]) -> str:
    """Formats the page docs/errors.md."""
    head = (
        "# Error codes\n\nA message that has a code begins a line with it. `veneer explain D107`"
        " says the same as this page,\nwhich `veneer explain --markdown` wrote.\n\n- `C`: settings,"
        " in a run file, in flags and in Python\n- `D1`: rows as they stand in files; `D2`: rows as"
        " the model would see them\n- `T`: training\n"
    )
    sections = [
        f"\n## {code}\n\n**{entry['title']}.**"
        f" {entry['cause']}\n\n{entry['way']}\n\n```text\n{entry['example']}\n```\n"
        for code, entry in entries.items()
    ]
    return head + "".join(sections)
