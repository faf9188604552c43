"""Switching between loaded adapters, beside PEFT's set_adapter; first use from disk; loads and
unloads.

    python benchmarks/swap.py
        smollm2-135m, as the documentation reports it
    python benchmarks/swap.py --base FOLDER --most 4         anything smaller

Prints JSON: switch (microseconds, median) by number of loaded adapters, Veneer's and PEFT's on one
model in alternating turns; switch by depth of the model; first_use (milliseconds, minimum and
median, file in the page cache); memory of the process before and after --cycles loads and unloads;
ls of --names adapters.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import veneer
from veneer.adapters.config import LoRA
from veneer.base import Base
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library


def median_us(call, turns: int) -> float:
    times = []
    for turn in range(turns):
        start = time.perf_counter()
        call(turn)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e6, 2)


def resident_bytes() -> int:
    """Of this process, from /proc; 0 where there is none."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def make_library(folder: Path, base: Base, rank: int) -> Library:
    library = Library(folder / "library")
    for number in range(2):
        made = base.attach(LoRA(rank=rank), name="made", seed=number)
        for parameter in made.parameters().values():
            parameter.data.normal_(std=0.01)
        write_adapter(
            folder / f"{number}", made, manifest_for(base, method="lora"), model=base.model
        )
        base.detach("made")
        library.add(folder / f"{number}", name=f"a{number}")
    return library


def by_number(base: Base, library: Library, most: int) -> list[dict[str, float]]:
    """One version under many names: they are loaded as many adapters."""
    entry, rows, count = library.get("a0"), [], 1
    while count <= most:
        for number in range(len(base.attachments), count):
            library.point(f"n{number}", entry.version.object, entry.version.facts)
            base.use(f"n{number}")
        rows.append(
            {
                "loaded": count,
                "veneer_us": median_us(lambda turn, n=count: base.use(f"n{turn % n}"), 400),
            }
        )
        count *= 2
    base.use(None)
    return rows


def peft_by_number(source: str, folder: Path, most: int) -> list[dict[str, float]]:
    if most == 0:
        return []
    try:
        from peft import PeftModel
    except ImportError:
        return []
    model = PeftModel.from_pretrained(veneer.load(source).model, str(folder), adapter_name="n0")
    rows, count, loaded = [], 1, 1
    while count <= most:
        for number in range(loaded, count):
            model.load_adapter(str(folder), adapter_name=f"n{number}")
        loaded = count
        turns = 20 if count <= 16 else 6
        rows.append(
            {
                "loaded": count,
                "peft_us": median_us(
                    lambda turn, n=count: model.set_adapter(f"n{turn % n}"), turns
                ),
            }
        )
        count *= 2
    return rows


def by_depth(depths: list[int]) -> list[dict[str, float]]:
    from transformers import AutoModelForCausalLM, LlamaConfig

    rows = []
    for depth in depths:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=depth,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        tokenizer = None
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        base = Base(model=model, tokenizer=tokenizer, source="x", name_or_path="x")  # type: ignore[arg-type]
        for name in ("a", "b"):
            base.attach(LoRA(rank=2), name=name)
        rows.append(
            {
                "layers": depth,
                "veneer_us": median_us(lambda turn, base=base: base.use("ab"[turn % 2]), 400),
            }
        )
    return rows


def first_use(source: str, library: Library, turns: int) -> dict[str, float]:
    """A fresh base each time, whose modules carry no wrappers yet; and one that has other adapters
    already."""
    base = veneer.load(source, library=library)
    _ = base.paths
    size = library.get("a0").version.facts.bytes
    fresh, second = [], []
    for _ in range(turns):
        for name, times in (("a0", fresh), ("a1", second)):
            start = time.perf_counter()
            base.use(name)
            times.append((time.perf_counter() - start) * 1e3)
        base.use(None)
        base.detach("a0")
        base.detach("a1")
    return {
        "file_bytes": size,
        "fresh_min_ms": round(min(fresh), 2),
        "fresh_median_ms": round(statistics.median(fresh), 2),
        "beside_another_min_ms": round(min(second), 2),
        "beside_another_median_ms": round(statistics.median(second), 2),
    }


def cycles(base: Base, count: int) -> dict[str, int]:
    def turn(number: int) -> None:
        base.use(f"a{number % 2}")
        base.use(None)
        base.detach(f"a{number % 2}")

    for number in range(20):
        turn(number)
    gc.collect()
    before = resident_bytes()
    for number in range(count):
        turn(number)
    gc.collect()
    return {"cycles": count, "before_bytes": before, "after_bytes": resident_bytes()}


def listing(library: Library, folder: Path, names: int) -> dict[str, float]:
    many = Library(folder / "many")
    record = (library.names / "a0.json").read_text()
    many._make()
    for number in range(names):
        (many.names / f"adapter-{number:06d}.json").write_text(record)
    time.sleep(3)  # records younger than two seconds are read again
    command = [
        sys.executable,
        "-m",
        "veneer.cli.main",
        "adapters",
        "ls",
        "--library",
        str(many.folder),
    ]
    times = []
    for _ in range(6):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return {
        "names": names,
        "first_seconds": round(times[0], 3),
        "seconds": round(statistics.median(times[1:]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument(
        "--rank",
        type=int,
        default=8,
        help="8 on all linear layers of smollm2-135m is a file of 10 MB",
    )
    parser.add_argument("--most", type=int, default=256, help="adapters loaded at once")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--turns", type=int, default=15, help="of first use")
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--names", type=int, default=10_000)
    parser.add_argument(
        "--peft-most",
        type=int,
        default=64,
        help="the same in PEFT, which takes minutes for more; 0: not at all",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = veneer.load(args.base)
        _ = base.paths
        base.library = library = make_library(folder, base, args.rank)
        result = {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "base": args.base,
            "rank": args.rank,
            "first_use": first_use(args.base, library, args.turns),
            "memory": cycles(base, args.cycles),
            "by_number": by_number(base, library, args.most),
            "by_depth": by_depth(args.depths),
            "ls": listing(library, folder, args.names),
        }
        del base
        gc.collect()
        result["peft_by_number"] = peft_by_number(args.base, library.path("a0"), args.peft_most)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
