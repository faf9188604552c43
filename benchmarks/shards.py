"""What each process of a run holds: the base whole or in shards, LoRA and full fine-tuning, on 1
and 2 processes.

    python benchmarks/shards.py --scratch FOLDER --out FILE.json

The base is a Llama of 231 M random weights (random_llama.py), made once in FOLDER; rows are so
short that activations take little. Memory is what the system counts as resident: the most of it
from the first step on, by process. Other work on the machine changes nothing.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden": 1024, "feed_forward": 2816, "layers": 16, "heads": 16, "kv_heads": 4}
RUNS: dict[str, dict[str, Any]] = {
    "full, float32": {"method": {"name": "full"}, "dtype": "float32"},
    "lora, float32": {"method": {"name": "lora"}, "dtype": "float32"},
    "full, bfloat16": {"method": {"name": "full"}, "dtype": "bfloat16"},
    "lora, bfloat16": {"method": {"name": "lora"}, "dtype": "bfloat16"},
}
PLACES: dict[str, tuple[int, bool]] = {
    "2, shards": (2, True),
    "2, whole": (2, False),
    "1 process": (1, False),
}


def one(config: dict[str, Any]) -> dict[str, float]:
    """Bytes that this process holds: before the base, the most while it trains and until all is
    written; its loss."""
    from veneer import api
    from veneer.training.config import RunConfig
    from veneer.training.loop import Loop
    from veneer.training.output.records import peak_memory_bytes, reset_peak_memory
    from veneer.training.output.screen import QuietScreen
    from veneer.training.trainee import Trainee

    held: list[int] = []
    inner = Loop.run

    def run(loop: Loop) -> list[Trainee]:
        # What loading took, and the optimizer's moments, is there and counts; its peak does not.
        reset_peak_memory()
        ended = inner(loop)
        held.append(peak_memory_bytes())
        return ended

    Loop.run = run  # type: ignore[method-assign]
    mine = RunConfig.model_validate(config) if os.environ["RANK"] == "0" else None
    summary = api.train_run(mine, resume=False, screen=QuietScreen())
    ended = peak_memory_bytes()
    return {
        "idle": summary["idle_memory_bytes"],
        "training": held[0],
        "ended": ended,
        "loss": summary["last_loss"],
    }


def measured(scratch: Path, only: str) -> list[dict[str, Any]]:
    from benchmarks.processes import together
    from benchmarks.random_llama import write_random_llama
    from veneer.bases.names.sources import locate

    base = scratch / "llama"
    if not base.exists():
        write_random_llama(base, tokenizer_of=locate("smollm2-135m").folder, **SHAPE)
    rows = scratch / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"text": f"row {number} says one two three four"}) + "\n"
            for number in range(8)
        )
    )
    found = []
    for name, own in RUNS.items():
        for place, (processes, shard) in PLACES.items():
            if only not in name:
                continue
            with tempfile.TemporaryDirectory(dir=scratch) as out:
                config = {
                    "base": str(base),
                    "data": {"train": str(rows), "validation_share": 0.0},
                    "shard": shard,
                }
                config |= {"out": f"{out}/run", "batch": 4, "micro_batch": 1, "steps": 2, **own}
                said = together(config, processes, "shards")
            row = {
                "run": name,
                "processes": place,
                "idle_mb": [round(each["idle"] / 1e6) for each in said],
            }
            row |= {"with_result_mb": [round(each["ended"] / 1e6) for each in said]}
            row |= {
                "training_mb": [round(each["training"] / 1e6) for each in said],
                "loss": said[0]["loss"],
            }
            found.append(row)
            print(row, flush=True)
    return found


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="takes a base of 0.5 GB and checkpoints of 3 GB",
    )
    p.add_argument("--only", default="", metavar="WORD", help="runs whose name holds it")
    p.add_argument("--out", type=Path, metavar="FILE.json")
    p.add_argument("--one", metavar="JSON", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(one(json.loads(args.one))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.scratch or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        values = measured(folder, args.only)
    if args.out:
        args.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
