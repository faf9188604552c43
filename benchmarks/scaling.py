"""How the cost of a LoRA step grows: with the length of the rows, and with the number of adapted
modules.

    python benchmarks/scaling.py --base smollm2-135m

Rows are plain text of exactly L tokens, all trained on, 2,048 tokens a step (at least one row).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from veneer.bases.tokenizer import load_tokenizer

HERE = Path(__file__).parent
TARGETS = (
    "q_proj",
    "q_proj,v_proj",
    "q_proj,k_proj,v_proj,o_proj",
    "gate_proj,up_proj,down_proj",
    "all-linear",
)


def write_rows(path: Path, base: str, length: int, count: int) -> None:
    """Text rows whose ids, the end-of-text token included, are `length` tokens."""
    tokenizer, _ = load_tokenizer(base)
    word = tokenizer.decode(tokenizer(" river", add_special_tokens=False)["input_ids"][:1])
    texts = []
    for number in range(count):
        text = f"{number % 10}" + word * (length - 2)
        texts.append(json.dumps({"text": text}))
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def measure(base: str, rows: Path, *extra: str) -> dict[str, float]:
    command = [
        sys.executable,
        str(HERE / "train_veneer.py"),
        "--base",
        base,
        "--rows",
        str(rows),
        *extra,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    line: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return line


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True)
    p.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024, 2048, 4096])
    p.add_argument("--steps", type=int, default=3)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        print("tokens a row  rows a step  tokens/s  MiB above idle")
        for length in args.lengths:
            batch = max(1, 2048 // length)
            write_rows(rows, args.base, length, batch * (args.steps + 1))
            extra = [
                "--steps",
                str(args.steps),
                "--batch",
                str(batch),
                "--train-on",
                "all",
                "--no-sharing",
            ]
            found = measure(args.base, rows, *extra)
            above = found["peak_rss_mib"] - found["idle_rss_mib"]
            print(
                f"{length:>12}  {batch:>11}  {found['tokens_per_s']:>8.0f}  {above:>14.0f}",
                flush=True,
            )
        write_rows(rows, args.base, 256, 8 * (args.steps + 1))
        print("adapted modules: tokens/s, share of all-linear's step time")
        times = {}
        for targets in TARGETS:
            extra = [
                "--steps",
                str(args.steps),
                "--train-on",
                "all",
                "--no-sharing",
                "--targets",
                targets,
            ]
            found = measure(args.base, rows, *extra)
            times[targets] = found["seconds"]
            print(f"{targets}: {found['tokens_per_s']:.0f} tokens/s", flush=True)
        for targets, seconds in times.items():
            print(f"{targets}: {seconds / times['all-linear']:.2f}")


if __name__ == "__main__":
    main()
