"""QLoRA beside our own bf16 LoRA, full fine-tuning and TRL with bitsandbytes: speed, memory,
decoding.

    python benchmarks/qlora_speed.py --base FOLDER --rows e2e_json.jsonl [--peer-python PY \\
        --peer-scripts DIR]

Alternating rounds, medians. Two bases: FOLDER, and a random Llama of hidden 2048 with its
tokenizer. The default batch is about 1,000 tokens a step on short rows. Decoding: greedy tokens a
second of one prompt, bf16 against 4 bits.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_llama import write_random_llama
from train_speed import run

from veneer import api
from veneer.bases.identity.weight_table import weight_table
from veneer.decoding.generate import generate

HERE = Path(__file__).parent


def train(args: argparse.Namespace, base: str, *, peer: bool) -> None:
    common = [
        "--base",
        base,
        "--rows",
        str(args.rows),
        "--batch",
        str(args.batch),
        "--steps",
        str(args.steps),
    ]
    own = [sys.executable, str(HERE / "train_veneer.py"), *common]
    commands = {
        "qlora": [*own, "--quantize", "nf4"],
        "lora bf16": own,
        "full": [*own, "--method", "full", "--lr", "1e-5"],
    }
    if peer and args.peer_python:
        commands["trl qlora"] = [
            args.peer_python,
            str(args.peer_scripts / "train_trl.py"),
            *common,
            "--method",
            "qlora",
        ]
    if args.no_full:
        del commands["full"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(args.rounds):
        names = list(commands) if number % 2 == 0 else list(reversed(commands))
        for name in names:
            found[name].append(run(commands[name]))
    middle = {
        n: statistics.median(l["examples_per_s"] for l in lines) for n, lines in found.items()
    }
    for name, lines in found.items():
        speeds = [line["examples_per_s"] for line in lines]
        peak = statistics.median(line["peak_rss_mib"] for line in lines)
        tokens = lines[0]["real_tokens"] / args.steps
        print(
            f"  {name:<10} examples/s {middle[name]:.2f} ({min(speeds):.2f}-{max(speeds):.2f})  "
            f" peak {peak:.0f} MiB   {tokens:.0f} tokens a step   loss {lines[0]['first_loss']} to"
            f" {lines[0]['last_loss']}"
        )
    for name in middle:
        if name != "qlora":
            print(f"  qlora is {middle['qlora'] / middle[name]:.2f} of {name}")


def weights_and_decoding(base: str, tokens: int) -> None:
    speeds = {}
    for held in (None, "nf4"):
        loaded = api.load(base, quantize=held)  # type: ignore[arg-type]
        for group in weight_table(loaded.model):
            if group.what == "linear layers":
                print(
                    f"  linear layers {group.held}: {group.bytes / 1e6:.1f} MB, "
                    f"{group.bytes / group.values:.4f} B a weight"
                )
        prompt = loaded.tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]
        loaded.model.generation_config.eos_token_id = None
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            (answer,) = generate(loaded, [prompt], max_new_tokens=tokens)
            best = min(best, (time.perf_counter() - start) / max(1, len(answer)))
        speeds[held] = 1 / best
        del loaded
    print(
        f"  decoding, tokens/s: bf16 {speeds[None]:.1f}, nf4 {speeds['nf4']:.1f}, ratio "
        f"{speeds['nf4'] / speeds[None]:.2f}"
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--base", required=True, help="a bf16 model folder")
    p.add_argument("--rows", type=Path, required=True)
    p.add_argument("--peer-python")
    p.add_argument("--peer-scripts", type=Path)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--tokens", type=int, default=64, help="decoded")
    p.add_argument("--layers", type=int, default=6, help="of the random model")
    p.add_argument("--hidden", type=int, default=2048, help="of the random model")
    p.add_argument("--no-full", action="store_true", help="leave full fine-tuning out")
    args = p.parse_args()
    print(f"threads {torch.get_num_threads()}; {Path(args.base).name}:")
    train(args, args.base, peer=True)
    weights_and_decoding(args.base, args.tokens)
    scratch = Path(tempfile.mkdtemp())
    try:
        count = write_random_llama(
            scratch / "wide",
            tokenizer_of=Path(args.base),
            hidden=args.hidden,
            feed_forward=args.hidden * 11 // 4,
            layers=args.layers,
            heads=args.hidden // 64,
            kv_heads=max(1, args.hidden // 256),
        )
        print(
            f"random Llama, hidden {args.hidden}, {args.layers} layers, {count / 1e9:.2f} B"
            " parameters:"
        )
        train(args, str(scratch / "wide"), peer=True)
        weights_and_decoding(str(scratch / "wide"), args.tokens)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
