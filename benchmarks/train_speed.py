"""Veneer beside its peers on the same rows, base, batch and threads: alternating rounds, medians,
ratios.

    python benchmarks/train_speed.py --base BASE --rows e2e.jsonl viggo.jsonl --peer-python PY \\
        --peer-scripts DIR

Another processor's instructions: both tools under VENEER_MAX_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2
ATEN_CPU_CAPABILITY=avx2, with --dtype float32.

DIR holds `train_trl.py` (TRL's SFTTrainer with peft), which prints one JSON line with the same keys
as train_veneer.py; PY is the Python of an environment with the peers. The tools round in places of
their own, so the first loss of both is held against that of the same batch over the same weights in
float32. Fails if one is further off than rounding explains: then the tools do not train on the same
thing, and speed means nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SAME_LOSS = 0.012
"""Relative. The bf16 loss of a single batch of 8 deviates from float32's by 0.3% to 0.4% whichever
tool computes it (rounding.py, which also shows that the mean over many batches does not): this is
three of those deviations."""

SAME_LOSS_4BIT = 0.02
"""Relative, of a peer against float32 over the same weights: bitsandbytes' CPU product was found
0.9% off."""

PEERS_DTYPE = {"bfloat16": "bf16", "float32": "fp32"}


def run(command: list[str], **environment: str) -> dict[str, Any]:
    """Runs a command to its end; returns the JSON in the last line that it prints."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    line: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return line


def spread(lines: list[dict[str, Any]], key: str) -> str:
    values = [line[key] for line in lines]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def check_same_training(
    mine: dict[str, float], peer: dict[str, float], exact: float, peers_most: float
) -> None:
    """exact: the first loss in float32; peers_most: how far the peer may be off."""
    off = {"veneer": mine["first_loss"] / exact - 1, "trl": peer["first_loss"] / exact - 1}
    print(f"first loss in float32 {exact}; " + ", ".join(f"{n} {d:+.2%}" for n, d in off.items()))
    same = mine["real_tokens"] == peer["real_tokens"]
    if not (same and abs(off["veneer"]) <= SAME_LOSS and abs(off["trl"]) <= peers_most):
        sys.exit(f"not the same training: {mine} against {peer}, float32 {exact}")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True)
    p.add_argument("--rows", nargs="+", required=True)
    p.add_argument("--peer-python", required=True)
    p.add_argument("--peer-scripts", type=Path, required=True)
    p.add_argument(
        "--qlora", action="store_true", help="both over 4 bits: NF4, double quantisation"
    )
    p.add_argument("--dtype", choices=PEERS_DTYPE, default="bfloat16", help="of the base in both")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=15)
    p.add_argument("--out", type=Path, help="JSONL of every single run")
    args = p.parse_args()
    common = ["--base", args.base, "--batch", "8", "--steps", str(args.steps)]
    for rows in args.rows:
        ours = [sys.executable, str(HERE / "train_veneer.py"), *common, "--rows", rows]
        theirs = [
            args.peer_python,
            str(args.peer_scripts / "train_trl.py"),
            *common,
            "--rows",
            rows,
        ]
        ours, theirs = [*ours, "--dtype", args.dtype], [*theirs, "--dtype", PEERS_DTYPE[args.dtype]]
        if args.qlora:
            ours, theirs = [*ours, "--quantize", "nf4"], [*theirs, "--method", "qlora"]
        found: dict[str, list[dict[str, float]]] = {"veneer": [], "trl": []}
        for number in range(args.rounds):
            pairs = [("veneer", ours), ("trl", theirs)]
            for tool, command in pairs if number % 2 == 0 else reversed(pairs):
                line = run(command)
                found[tool].append(line)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps({"rows": Path(rows).name, **line}) + "\n")
        mine, peer = found["veneer"], found["trl"]
        exact = float(run([*ours, "--dtype", "float32", "--steps", "1"])["first_loss"])
        check_same_training(mine[0], peer[0], exact, SAME_LOSS_4BIT if args.qlora else SAME_LOSS)
        ratio = statistics.median(l["examples_per_s"] for l in mine) / statistics.median(
            l["examples_per_s"] for l in peer
        )
        idle = statistics.median(l["idle_rss_mib"] for l in mine)
        memory = [
            statistics.median(l["peak_rss_mib"] for l in lines) - idle for lines in (mine, peer)
        ]
        print(f"{Path(rows).stem}: {args.rounds} rounds of {args.steps} steps")
        print(
            f"  examples/s   veneer {spread(mine, 'examples_per_s')}   trl"
            f" {spread(peer, 'examples_per_s')}   ratio {ratio:.2f}"
        )
        print(
            f"  MiB above an idle process   veneer {memory[0]:.0f}   trl {memory[1]:.0f}   share "
            f"{memory[0] / memory[1]:.2f}"
        )
        print(f"  share of the matrix-product rate   {spread(mine, 'share_of_matrix_rate')}")
        print(
            f"  loss first, last   veneer {mine[0]['first_loss']}, {mine[0]['last_loss']}   trl "
            f"{peer[0]['first_loss']}, {peer[0]['last_loss']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
