"""Runs the loops of this folder for hours, in turn, until all are complete or Ctrl-C stops them.

    python -m tests.soak                            every loop, a slice of each at a time
    python -m tests.soak --hours 3 --loops mixes engine
    python -m tests.soak --table                    the counts so far, as a table

A slice is one call of pytest. After it, the number of its rounds and how it ended are written to a
file (build/soak.json), so a later call goes on with the next numbers. A slice that Ctrl-C stops
does not count. Rounds are counted per commit and processor; a failed slice says where its output is
and which numbers it ran.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.soak.loops import LOOPS, Loop

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "build" / "soak.json"
PASSED, FAILED, NO_TESTS = 0, 1, 5
"""Exit codes of pytest."""


@dataclass(frozen=True)
class Slice:
    """One call of pytest over rounds `first` to `first + rounds - 1` of a loop."""

    loop: str
    first: int
    rounds: int
    passed: bool
    seconds: float
    commit: str
    output: str
    """The file that holds pytest's output, for a failed slice; else empty."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs what the words of the command line ask for; returns 1 if a slice failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--hours", type=float, default=float("inf"), help="stop after this time (default: never)"
    )
    parser.add_argument(
        "--loops",
        nargs="+",
        choices=LOOPS,
        default=list(LOOPS),
        metavar="LOOP",
        help="only these loops",
    )
    parser.add_argument(
        "--table", action="store_true", help="print the counts so far and run nothing"
    )
    given = parser.parse_args(words)
    slices = read(RECORD)
    if not given.table:
        try:
            soak(given.loops, slices, until=time.monotonic() + 3600 * given.hours)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here")
    print(table(slices))
    return int(any(not done.passed for done in slices))


def soak(names: Sequence[str], slices: list[Slice], *, until: float) -> None:
    """Runs a slice of each loop in turn, appends it to `slices` and writes it down; ends when no
    loop has any left."""
    waiting = list(names)
    while waiting and time.monotonic() < until:
        name = waiting.pop(0)
        first = sum(done.rounds for done in slices if done.loop == name)
        if first >= LOOPS[name].target or (done := run(name, LOOPS[name], first)) is None:
            continue
        slices.append(done)
        write(RECORD, slices)
        waiting.append(name)


def run(name: str, loop: Loop, first: int) -> Slice | None:
    """Runs one slice. Returns None if the loop has no tests from this round on, or what it needs is
    not installed."""
    rounds = min(loop.slice, loop.target - first)
    output = RECORD.parent / f"soak-{name}-{first}.txt"
    output.parent.mkdir(exist_ok=True)
    tests = [f"tests/{test}" for test in loop.test.split()]
    environment = os.environ | {
        f"VENEER_SOAK_{name.upper()}": str(rounds),
        "VENEER_SOAK_FIRST": str(first),
    }
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", *tests]
    print(f"{name}: {rounds:,} rounds from {first:,}", flush=True)
    began = time.monotonic()
    with output.open("w") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    text = output.read_text(errors="replace")
    if done.returncode == NO_TESTS or (done.returncode == PASSED and " passed" not in text):
        output.unlink()
        return None
    passed = done.returncode == PASSED
    if passed:
        output.unlink()
    else:
        print(f"{name}: FAILED, see {output}", flush=True)
    return Slice(
        loop=name,
        first=first,
        rounds=rounds,
        passed=passed,
        seconds=round(time.monotonic() - began, 1),
        commit=commit(),
        output="" if passed else str(output),
    )


def commit() -> str:
    """Returns the short id of the checkout's commit."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()


def table(slices: Sequence[Slice]) -> str:
    """Returns rounds, minutes and failed slices per loop, as a Markdown table."""
    lines = ["| loop | rounds | of | minutes | failed slices |", "|---|---|---|---|---|"]
    for name, loop in LOOPS.items():
        own = [done for done in slices if done.loop == name]
        failed = ", ".join(
            f"{done.first} to {done.first + done.rounds - 1}" for done in own if not done.passed
        )
        minutes = sum(done.seconds for done in own) / 60
        count = sum(done.rounds for done in own)
        lines.append(
            f"| {name} | {count:,} | {loop.target:,} | {minutes:.0f} | {failed or 'none'} |"
            if own
            else ""
        )
    return "\n".join(line for line in lines if line)


def read(path: Path) -> list[Slice]:
    """Reads the slices that earlier calls wrote; none if there is no such file."""
    return [Slice(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def write(path: Path, slices: Sequence[Slice]) -> None:
    """Writes all slices, by a file beside it that takes its place."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([asdict(done) for done in slices], indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
