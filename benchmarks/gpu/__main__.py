"""Everything that a GPU can show, in 25 minutes: `make gpu`, or python benchmarks/gpu [--trial]
[--out DIR].

Each item is run in a process of its own and its result written when it comes, so this may be cut
off anywhere: the next call goes on with what is not there yet, and with what failed. Results of
another commit or GPU are measured anew. gpu.json in the same folder holds all of them, as
docs/results/ has them.

    --trial     tiny sizes on the CPU: whether the script runs, no figures
    --minutes   after which nothing new begins (25)
    --only      items whose name begins so, for instance 3 or 5.2
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from parts import Item, items
from place import Place, place

from veneer.files.atomic import atomic_file

HERE = Path(__file__).parent
NO_CUDA = """no CUDA device is here, or this torch was built without it
(torch {torch}, CUDA {cuda}).
On a machine with an NVIDIA GPU install torch for CUDA, then run it again.
Whether the script itself runs:
    {command} --trial"""


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--trial", action="store_true")
    p.add_argument("--out", type=Path, default=Path("build/gpu"))
    p.add_argument("--minutes", type=float, default=25)
    p.add_argument("--only", default="")
    p.add_argument("--item", help=argparse.SUPPRESS)  # one of them, in this process
    args = p.parse_args()
    if not args.trial and not torch.cuda.is_available():
        told = {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "command": f"{sys.executable} {HERE}",
        }
        print(NO_CUDA.format(**told), file=sys.stderr)
        return 2
    at = place(trial=args.trial)
    all_items = items(at)
    if args.item:
        own = next(item for item in all_items if item.name == args.item)
        print(json.dumps(own.run(at)))
        return 0
    out: Path = args.out / "trial" if args.trial else args.out
    here = {"commit": commit(), "machine": machine(), "trial": args.trial}
    end, failed = time.monotonic() + 60 * args.minutes, 0
    for item in all_items:
        if not item.name.startswith(args.only):
            continue
        file = out / f"{item.name.partition(' ')[0]}.json"
        if (known := read(file)) is not None and known["here"] == here and "error" not in known:
            print(f"{item.name}: there already")
            continue
        left = end - time.monotonic()
        if left < 5:
            print(f"{item.name}: no time left; the next call goes on here")
            return 1
        found = {
            "here": here,
            "item": item.name,
            **(tried(item, at) if args.trial else measured(item, min(item.most_seconds, left))),
        }
        with atomic_file(file, replace=True) as partial:
            partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
        failed += "error" in found
        print(f"{item.name}: {found.get('error') or json.dumps(found['values'])[:400]}", flush=True)
        gather(out, here, all_items)
    print(
        f"{out / 'gpu.json'} holds them all"
        + (f"; {failed} failed, and are tried again next time" if failed else "")
    )
    return 1 if failed else 0


def measured(item: Item, seconds: float) -> dict[str, Any]:
    """values, or error: what its process wrote last."""
    if item.missing:
        return {"values": {"left out": item.missing}, "seconds": 0.0}
    start = time.monotonic()
    try:
        command = [sys.executable, str(HERE), "--item", item.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"ended after {seconds:.0f} s", "seconds": seconds}
    took = round(time.monotonic() - start, 1)
    if done.returncode:
        said = " / ".join(done.stderr.strip().splitlines()[-3:])
        return {"error": said or f"exit {done.returncode}", "seconds": took}
    return {"values": json.loads(done.stdout.strip().splitlines()[-1]), "seconds": took}


def tried(item: Item, at: Place) -> dict[str, Any]:
    """The same in this process, without a limit."""
    if item.missing:
        return {"values": {"left out": item.missing}}
    try:
        return {"values": json.loads(json.dumps(item.run(at)))}
    except Exception as fault:
        return {"error": f"{type(fault).__name__}: {fault}"}


def read(file: Path) -> dict[str, Any] | None:
    """None for what is not there or was cut off."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"here", "item"} <= found.keys() else None


def gather(out: Path, here: dict[str, Any], all_items: list[Item]) -> None:
    """gpu.json: every result of this commit on this machine."""
    found = [read(out / f"{item.name.partition(' ')[0]}.json") for item in all_items]
    told = [
        {
            "what": each["item"].partition(" ")[2],
            "machine": here["machine"],
            "commit": here["commit"],
            "command": f"python benchmarks/gpu --only {each['item'].partition(' ')[0]}",
            "values": each["values"],
        }
        for each in found
        if each is not None and each["here"] == here and "values" in each
    ]
    with atomic_file(out / "gpu.json", replace=True) as partial:
        partial.write_text(json.dumps({"measurements": told}, indent=1), encoding="utf-8")


def commit() -> str:
    asked = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{gpu}; {platform.machine()}; torch {torch.__version__}; Python"
        f" {platform.python_version()}"
    )


if __name__ == "__main__":
    sys.exit(main())
