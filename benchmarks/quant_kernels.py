"""The 4-bit kernels beside bitsandbytes' on the same shapes, alternating: quantise, decode, one-row
product.

    python benchmarks/quant_kernels.py --peer-python PY --peer-scripts DIR [--double-quant]

DIR holds dequant_bnb.py, which prints one JSON line an operation; PY is a Python with bitsandbytes.
bitsandbytes is given its best: its decode is its faster one of fresh and reused, its product that
of its repacked evaluation layer, the same weight every time, as ours. `cold` is the product over
copies of the weight that no cache holds, as when a whole model decodes; its share is of the
bandwidth at which one torch sum reads memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from veneer.kernels.bindings import library as native
from veneer.kernels.packed import nf4 as kernels
from veneer.quant import nf4

COLD_BYTES = 256 << 20


def seconds(call: Callable[[], object], sample: float = 0.03) -> float:
    """Per call, of as many calls as fill a sample."""
    call()
    start = time.perf_counter()
    call()
    loops = max(1, int(sample / max(time.perf_counter() - start, 1e-7)))
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def read_bandwidth() -> float:
    """Bytes a second at which memory is read, the best of 8 sums over 512 MiB."""
    x = torch.ones(128 << 20)
    return x.numel() * 4 / min(seconds(x.sum, 0.0) for _ in range(8))


def operations(out: int, width: int, *, double: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    dense = (torch.randn(out, width) * 0.02).bfloat16()
    packed = nf4.quantize(dense, double=double)
    buffer, x = torch.empty_like(dense), torch.randn(1, width).bfloat16()
    copies = [nf4.quantize(dense, double=double) for _ in range(max(1, COLD_BYTES // packed.bytes))]
    turn = iter(())

    def cold() -> object:
        nonlocal turn
        if (weight := next(turn, None)) is None:
            turn = iter(copies)
            weight = next(turn)
        return kernels.product(weight.blocks, x, out)

    yield "quantize", lambda: nf4.quantize(dense, double=double)
    yield "decode, reused", lambda: kernels.dequantize(packed.blocks, buffer)
    yield "decode, fresh", lambda: nf4.dequantize(packed)
    yield "product, 1 row", lambda: kernels.product(packed.blocks, x, out)
    yield "product, cold", cold
    yield "dense product", lambda: torch.nn.functional.linear(x, dense)


def peer_times(args: argparse.Namespace, shape: str) -> dict[str, float]:
    """Milliseconds of bitsandbytes."""
    command = [args.peer_python, "dequant_bnb.py", "--shapes", shape, "--m", "1", "--repeats", "3"]
    command += ["--threads", str(torch.get_num_threads())] + (
        ["--double-quant"] if args.double_quant else []
    )
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=args.peer_scripts
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    found: dict[str, float] = {}
    for line in map(json.loads, done.stdout.strip().splitlines()):
        if line["ms"] is not None and line["tool"] == "bitsandbytes":
            name = f"{line['op']}{', reused' if line['reused_output'] else ''}"
            found[name] = line["ms"]
    return found


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shapes", default="576x1536,2048x2048,4096x4096,4096x11008", help="out x in")
    p.add_argument("--peer-python")
    p.add_argument("--peer-scripts", type=Path)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--double-quant", action="store_true", help="scales in 8 bits, on both sides")
    p.add_argument("--out", type=Path, help="JSONL of every median")
    args = p.parse_args()
    bandwidth = read_bandwidth()
    print(
        f"threads {torch.get_num_threads()}, instructions {native.level()}, memory read"
        f" {bandwidth / 1e9:.1f} GB/s"
    )
    for shape in args.shapes.split(","):
        out, width = map(int, shape.split("x"))
        ours: dict[str, list[float]] = {}
        theirs: dict[str, list[float]] = {}
        todo = list(operations(out, width, double=args.double_quant))
        for _ in range(args.rounds):
            for name, call in todo:
                ours.setdefault(name, []).append(1e3 * seconds(call))
            if args.peer_python:
                for name, ms in peer_times(args, shape).items():
                    theirs.setdefault(name, []).append(ms)
        mine = {name: statistics.median(ms) for name, ms in ours.items()}
        peer = {name: statistics.median(ms) for name, ms in theirs.items()}
        held = (
            nf4.quantize(torch.randn(64, width).bfloat16(), double=args.double_quant).bytes
            * out
            / 64
        )
        share = held / (mine["product, cold"] / 1e3) / bandwidth
        print(f"{shape}: ms (median of {args.rounds})")
        for name, ms in mine.items():
            print(f"  {name:<16}{ms:9.3f}   {out * width / ms / 1e6:7.2f} G weights/s")
        print(
            f"  cold product: {held / mine['product, cold'] / 1e6:.1f} GB/s, {share:.2f} of the"
            " memory bandwidth"
        )
        if peer:
            fresh = min(peer[name] for name in ("dequantize", "dequantize, reused") if name in peer)
            print(f"  bitsandbytes    {peer}")
            print(
                f"  quantize x{peer['quantize'] / mine['quantize']:.1f}   decode"
                f" x{fresh / mine['decode, reused']:.2f} (its best; fresh"
                f" x{peer['dequantize'] / mine['decode, reused']:.2f})"
            )
            if "linear4bit_eval" in peer:
                print(
                    f"  product x{peer['linear4bit_eval'] / mine['product, 1 row']:.2f} of its"
                    " repacked layer"
                )
        if args.out:
            line = {
                "shape": shape,
                "ms": mine,
                "bitsandbytes_ms": peer,
                "bandwidth": bandwidth,
                "share": share,
            }
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
