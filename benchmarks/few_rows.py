"""Products of a few rows with dense weights: torch's, and the kernel's that reads each weight once,
in turns.

    OMP_NUM_THREADS=2 python benchmarks/few_rows.py
        the 211 products of smollm2-135m
    OMP_NUM_THREADS=2 python benchmarks/few_rows.py --dtype float32 --rows 1,16 --out few_rows.json

Random weights, each its own memory, so that a pass over all of them reads from memory and not from
a cache. Milliseconds of a whole pass (least and median of --turns), and of each shape; GB/s of
weights read; beside them the same pass with --adapters updates of rank --rank, one a row, as the
kernel adds them and as batched products do. Prints JSON; --out writes it as one of the
`measurements` of docs/results.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from veneer.kernels.bindings import library as native
from veneer.kernels.dense import few_rows

SHAPES = {
    "q, o (576, 576)": (576, 576, 60),
    "k, v (192, 576)": (192, 576, 60),
    "gate, up (1536, 576)": (1536, 576, 60),
    "down (576, 1536)": (576, 1536, 30),
    "head (49152, 576)": (49152, 576, 1),
}
"""Of smollm2-135m: out, in, how many."""


Ways = dict[str, Callable[[], object]]


class Timer:
    """Of ways that are taken in turns."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def __call__(self, ways: Ways) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(self.turns + 2):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                if turn >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
        return times


def told(times: dict[str, list[float]], read: int) -> dict[str, object]:
    """read: bytes of weights in a pass."""
    found: dict[str, object] = {}
    for name, each in times.items():
        found[name] = {
            "least ms": round(min(each), 3),
            "median ms": round(statistics.median(each), 3),
            "GB/s": round(read / min(each) / 1e6, 1),
        }
    names = list(times)
    found["times as fast"] = round(min(times[names[0]]) / min(times[names[1]]), 2)
    return found


def passes(weights: list[Tensor], rows: int, dtype: torch.dtype) -> Ways:
    x = {width: torch.randn(rows, width).to(dtype) for width in {w.shape[1] for w in weights}}
    return {
        "torch": lambda: [F.linear(x[w.shape[1]], w) for w in weights],
        "kernel": lambda: [few_rows.product(x[w.shape[1]], w, None) for w in weights],
    }


def adapted(
    weights: list[Tensor], count: int, rank: int, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], int]:
    """An answer's step of `count` rows, each with factors of its own; bytes of these."""
    x = {width: torch.randn(count, width).to(dtype) for width in {w.shape[1] for w in weights}}
    stacked, updates = [], []
    for w in weights:
        A, B = (
            torch.randn(count, rank, w.shape[1]).to(dtype),
            torch.randn(count, w.shape[0], rank).to(dtype),
        )
        stacked.append((A, B))
        laid = few_rows.laid_out([*zip(A, B, strict=True)], dtype)
        updates.append(
            few_rows.Updates([(slice(n, n + 1), factors, 0.5) for n, factors in enumerate(laid)])
        )

    def batched() -> None:
        for w, (A, B) in zip(weights, stacked, strict=True):
            own = x[w.shape[1]]
            y = few_rows.product(own, w, None).view(count, 1, -1)
            y.baddbmm_(torch.bmm(own.view(count, 1, -1), A.mT), B.mT)

    def kernel() -> None:
        for w, given in zip(weights, updates, strict=True):
            few_rows.updated(x[w.shape[1]], [(w, None, given)])

    def base() -> None:
        for w in weights:
            few_rows.product(x[w.shape[1]], w, None)

    read = sum(A.nbytes + B.nbytes for A, B in stacked)
    return {"batched products": batched, "kernel": kernel, "base alone": base}, read


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,4,16,64")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if native.level() < 2:
        sys.exit("no compiled kernels for this processor")
    dtype, timed = getattr(torch, asked.dtype), Timer(asked.turns)
    by_shape = {
        name: [(torch.randn(out, width) * 0.02).to(dtype) for _ in range(count)]
        for name, (out, width, count) in SHAPES.items()
    }
    everything = [w for each in by_shape.values() for w in each]
    read = sum(w.nbytes for w in everything)
    values: dict[str, object] = {
        "dtype": asked.dtype,
        "threads": torch.get_num_threads(),
        "level": native.level(),
    }
    for rows in map(int, asked.rows.split(",")):
        found: dict[str, object] = {"all": told(timed(passes(everything, rows, dtype)), read)}
        for name, weights in by_shape.items():
            found[name] = told(timed(passes(weights, rows, dtype)), sum(w.nbytes for w in weights))
        values[f"rows: {rows}"] = found
    linears = [w for name, each in by_shape.items() for w in each if "head" not in name]
    ways, factors = adapted(linears, asked.adapters, asked.rank, dtype)
    times = timed(ways)
    values[
        f"{asked.adapters} adapters of rank {asked.rank}, one a row, all layers but the head"
    ] = {
        **told(times, factors + sum(w.nbytes for w in linears)),
        "MB of factors": round(factors / 1e6, 1),
        "share of base alone": round(min(times["base alone"]) / min(times["kernel"]), 3),
    }
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python"
        f" {platform.python_version()}"
    )
    measurement = {
        "what": (
            "products of a few rows with the weights of smollm2-135m: torch's and the kernel's, in"
            " turns"
        ),
        "machine": f"{os.cpu_count()} cores of {processor()}; {versions}",
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "values": values,
    }
    print(json.dumps(measurement, indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps({"measurements": [measurement]}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
