"""A large set of short rows: memory and time of building its token files, and of a run that finds them.

    python benchmarks/large_set.py rows 1000000 /tmp/rows.jsonl
    python benchmarks/large_set.py build|open|memory /tmp/rows.jsonl [--out results.json]

build: the files are made; open: they are there, up to the first batches; memory: the same rows in memory. Each in a
process of its own. Resident bytes that are the process's own (anonymous) are told apart from mapped files, which the
system takes back where it needs room.
"""

import argparse
import json
import random
import time
from pathlib import Path

WORDS = [
    "order",
    "refund",
    "ticket",
    "printer",
    "invoice",
    "delay",
    "parcel",
    "account",
    "seat",
    "train",
    "window",
    "blue",
    "paper",
    "light",
    "river",
    "stone",
]


def write_rows(count: int, path: Path) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked = " ".join(draw.choices(WORDS, k=5))
            row = {"prompt": f"{asked} {number}", "completion": " ".join(draw.choices(WORDS, k=4))}
            file.write(json.dumps(row) + "\n")


def own_bytes() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmHWM", "Rss"))}
    return {"anonymous": found["RssAnon"], "mapped": found["RssFile"], "peak": found["VmHWM"]}


def measure(way: str, path: Path, base: str) -> dict[str, object]:
    import torch

    from veneer.bases.tokenizer import load_tokenizer
    from veneer.data.batching import Rows, make_batch, planned_epoch
    from veneer.data.config import DataConfig
    from veneer.data.large import training_data
    from veneer.models.capacity import configured_capacity

    tokenizer, config = load_tokenizer(base)
    before, start = own_bytes(), time.perf_counter()
    tokens = "memory" if way == "memory" else "files"
    data = training_data(
        DataConfig.of({"train": str(path), "validation_share": 0.001, "tokens": tokens}),
        length=2048,
        capacity=configured_capacity(config),
        tokenizer=tokenizer,
        say=lambda line: print(line, flush=True),
    )
    ready = time.perf_counter() - start
    rows = Rows.of(data.train)
    plan = planned_epoch(rows.lengths, batch=8, seed=0, epoch=0, order="bucketed")
    plan.costliest(rows.lengths)
    make_batch(
        [data.train[i] for i in rows.examples(plan[0])], packed=True, share_prompt=True, device=torch.device("cpu")
    )
    first = time.perf_counter() - start
    began = time.perf_counter()
    for number in range(1, min(2000, len(plan))):
        [data.train[i] for i in rows.examples(plan[number])]
    each = (time.perf_counter() - began) / (8 * min(1999, len(plan) - 1))
    return {
        "way": way,
        "rows": data.report.rows + data.report.validation_rows,
        "tokens": data.report.tokens,
        "file_bytes": path.stat().st_size,
        "fingerprint": data.fingerprint,
        "seconds_to_examples": round(ready, 2),
        "seconds_to_first_batch": round(first, 2),
        "microseconds_an_example": round(each * 1e6, 1),
        "bytes_before": before,
        "bytes_after": own_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("rows", "build", "open", "memory"))
    parser.add_argument("what", nargs="+")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.way == "rows":
        write_rows(int(args.what[0]), Path(args.what[1]))
        return
    found = measure(args.way, Path(args.what[0]), args.base)
    print(json.dumps(found, indent=2))
    if args.out:
        known = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text(json.dumps([*known, found], indent=2) + "\n")


if __name__ == "__main__":
    main()
