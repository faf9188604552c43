"""Lists the library as a table (`veneer adapters ls`), without loading torch."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from shutil import get_terminal_size
from typing import TYPE_CHECKING, get_args

from veneer.cli.common import adapters_command, print_json
from veneer.cli.flags import add_switch, add_value
from veneer.library.names import TRIAL
from veneer.wording import between, cut, number, shown, shown_line, size

if TYPE_CHECKING:
    from veneer.library.entry import Entry
    from veneer.library.library import Library

HEAD = ("NAME", "BASE", "METHOD", "SIZE", "METRIC (95% INTERVAL)", "AGE", "TAGS")
_RIGHT = {"SIZE", "AGE"}
_SHRINK = {"NAME": 12, "BASE": 10, "TAGS": 6, "METRIC (95% INTERVAL)": 21}
"""Columns that shrink on a narrow screen, and their smallest widths."""


def add_ls(action: Callable[..., ArgumentParser]) -> None:
    from veneer.library.entry import SortKey

    ls = action("ls", _ls, "list adapters: the newest version of every name")
    names = 'names that match: "support-*"; "trial-*" for those that the studio has not kept'
    add_value(ls, "--name", "GLOB", names, default="*")
    add_value(
        ls, "--base", "GLOB", "adapters of this base: its name or the start of its fingerprint"
    )
    add_value(ls, "--method", "M", "adapters of this method, for instance lora")
    add_value(ls, "--tag", "TAG", "versions with this tag")
    add_switch(ls, "--versions", "also list old versions")
    add_value(
        ls, "--sort", None, "sort key; default: name", default="name", choices=get_args(SortKey)
    )


def _ls(args: Namespace, library: Library) -> int:
    entries = library.entries(
        name=args.name,
        base=args.base,
        method=args.method,
        tag=args.tag,
        every_version=args.versions,
        sort=args.sort,
    )
    if not args.name.startswith(TRIAL):
        entries = [entry for entry in entries if not entry.name.startswith(TRIAL)]
    if args.json:
        print_json([entry.to_dict() for entry in entries])
        return 0
    if not entries:
        filtered = args.name != "*" or args.base or args.method or args.tag
        what = "no adapter matches" if filtered else "no adapters yet"
        print(f"{what} in {shown(library.folder)}")
        if not filtered:
            add = adapters_command(args, "add", "runs/RUN", "--name", "NAME")
            print(f"To add one: {add}")
        return 0
    width = get_terminal_size().columns if sys.stdout.isatty() else None
    print("\n".join(table(HEAD, [_row(entry) for entry in entries], width)))
    return 0


def _row(entry: Entry) -> tuple[str, ...]:
    facts, version = entry.version.facts, entry.version
    base = (facts.base or "?").rpartition("/")[2]
    proof = {"fingerprint": "", "stated": " (stated)", "unverified": " (unverified)"}[
        facts.base_proof
    ]
    metric = next(
        iter(sorted(facts.metrics.items(), key=lambda m: (m[0] != "validation_loss", m[0]))), None
    )
    return tuple(
        map(
            shown_line,
            (
                entry.reference,
                cut(base, 60) + proof,
                facts.method + (f" r{facts.rank}" if facts.rank else ""),
                size(facts.bytes),
                ""
                if metric is None
                else f"{number(metric[1])} {metric[0]}{_interval(facts.intervals.get(metric[0]))}",
                age(version.added),
                ", ".join(version.tags),
            ),
        )
    )


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" ({between(*ends)})"


def age(added: str) -> str:
    """Formats the time since `added` (2026-01-31T12:00:00Z) as 5 min, 3 h or 12 d."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(added)).total_seconds()
    if seconds < 90 * 60:
        return f"{max(round(seconds / 60), 0)} min"
    return f"{round(seconds / 3600)} h" if seconds < 48 * 3600 else f"{round(seconds / 86400)} d"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Formats a table; columns that may shrink do so until it fits the width."""
    columns = [i for i in range(len(head)) if any(row[i] for row in rows)]
    widths = {i: max(len(head[i]), *(len(row[i]) for row in rows)) for i in columns}
    while width is not None and sum(widths.values()) + 2 * (len(columns) - 1) > width:
        wide = [i for i in columns if widths[i] > _SHRINK.get(head[i], 10**9)]
        if not wide:
            break
        widths[max(wide, key=lambda i: widths[i] - _SHRINK[head[i]])] -= 1
    lines = []
    for row in [head, *rows]:
        cells = [cut(row[i], widths[i]) for i in columns]
        lines.append(
            "  ".join(
                cell.rjust(widths[i]) if head[i] in _RIGHT else cell.ljust(widths[i])
                for i, cell in zip(columns, cells, strict=True)
            ).rstrip()
        )
    return lines
