"""A large set of short rows: memory and time of putting its tokens into files, and of a run that
finds them there.

    python benchmarks/large_set.py build 20000 FOLDER
        rows through the template; then once more, found
    python benchmarks/large_set.py write 300000 FOLDER
        as many examples with drawn tokens, without a template
    python benchmarks/large_set.py make 10000000 FOLDER
        the same files, column by column: not measured
    python benchmarks/large_set.py read FOLDER
        from opening them to the first batch, and 2,000 batches on

With --out FILE.json what was measured is added to a list there. Seconds are those of the processor
(of this process; those of the chat template's stand beside them), so that other work on the machine
does not count; `seconds` are on the clock. Resident bytes that are the process's own (anonymous)
are told apart from mapped files, which the system takes back where it needs room.
"""

import argparse
import json
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from veneer.data.batching import RowSpans, make_batch, plan_epoch
from veneer.data.checks.tally import Tally
from veneer.data.examples import Example, Row, RowRef, row_key
from veneer.data.files.on_disk import COLUMNS, INDEX, ExampleWriter, StoredExamples
from veneer.data.longest import largest_micro_batches

WORDS = (
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
)
BATCHES = 2000


def resident() -> dict[str, int]:
    """Bytes of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    found = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in lines
        if line.startswith(("VmHWM", "Rss"))
    }
    return {"anonymous": found["RssAnon"], "mapped": found["RssFile"], "peak": found["VmHWM"]}


def build(count: int, folder: Path, base: str) -> Iterator[dict[str, Any]]:
    from veneer.bases.tokenizer import load_tokenizer
    from veneer.data.config import DataConfig
    from veneer.data.encoder import RowRules
    from veneer.data.large import training_data
    from veneer.data.template import rendering
    from veneer.models.capacity import configured_capacity

    draw, rows = random.Random(0), folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked, said = (" ".join(draw.choices(WORDS, k=size)) for size in (5, 4))
            file.write(json.dumps({"prompt": f"{asked} {number}", "completion": said}) + "\n")
    tokenizer, config = load_tokenizer(base)
    fields = DataConfig.of({"train": str(rows), "tokens": "files"})
    for way in ("build", "found"):
        before, start, begun = resident(), time.process_time(), time.perf_counter()
        beside = resource.getrusage(resource.RUSAGE_CHILDREN)
        data = training_data(fields, RowRules(2048, configured_capacity(config)), tokenizer)
        own, seconds = time.process_time() - start, time.perf_counter() - begun
        rendering._worker().close()  # its seconds are told when it has ended
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        rendered = after.ru_utime + after.ru_stime - beside.ru_utime - beside.ru_stime
        yield {
            "way": way,
            "rows": count,
            "tokens": data.report.tokens,
            "file_bytes": rows.stat().st_size,
            "cpu_seconds": round(own, 2),
            "template_cpu_seconds": round(rendered, 2),
            "seconds": round(seconds, 2),
            "rows_a_cpu_second": round(count / (own + rendered)),
            "before": before,
            "after": resident(),
        }


def write(count: int, folder: Path) -> dict[str, Any]:
    generator = np.random.Generator(np.random.Philox(key=[0, 0]))
    writer, tally = ExampleWriter(folder), Tally(frozenset({2}))
    before, start = resident(), time.process_time()
    for first in range(0, count, 4096):
        number = min(4096, count - first)
        sizes = generator.integers(20, 60, number)
        tokens = generator.integers(3, 49152, (number, 60)).astype(np.int32)
        for at in range(number):
            ids, trained = tokens[at, : sizes[at]].copy(), np.zeros(sizes[at], dtype=np.bool_)
            trained[-10:] = True
            row = Row(
                RowRef("rows.jsonl", first + at + 1),
                [{"role": "user", "content": str(first + at)}] * 2,
            )
            example = Example(ids, trained, row.ref, row_key(row))
            tally.add(row, [example])
            writer.add([example])
    writer.close()
    counted = {
        "repeated": int(tally.repeated().sum()),
        "tokens": int(np.array(tally.lengths).sum()),
    }
    return {
        "way": "write",
        "examples": count,
        **counted,
        "cpu_seconds": round(time.process_time() - start, 1),
        "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "before": before,
        "after": resident(),
    }


def make(count: int, folder: Path) -> None:
    """What `write` leaves, of as many rows as reading is to be measured with."""
    generator = np.random.Generator(np.random.Philox(key=[0, 1]))
    sizes = generator.integers(20, 60, count)
    start = np.concatenate([[0], np.cumsum(sizes)])
    columns = {
        "start": start,
        "used": sizes - 1,
        "trained": sizes // 4,
        "key": np.arange(count),
        "row": np.full(count, -1),
    }
    columns |= {"file": np.zeros(count), "line": np.arange(count) + 1}
    for name, kind in COLUMNS.items():
        columns[name].astype(kind).tofile(folder / f"{name}.{kind[1:]}")
    with (folder / "tokens.i4").open("wb") as file:
        for first in range(0, int(start[-1]), 2**24):
            ids = generator.integers(3, 49152, min(2**24, int(start[-1]) - first), dtype=np.int32)
            ids[3::4] |= np.int32(-(2**31))
            ids.tofile(file)
    index = {"examples": count, "tokens": int(start[-1]), "single": True, "files": ["rows.jsonl"]}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    before, start = resident(), time.process_time()
    examples = StoredExamples(folder)
    rows = RowSpans.of(examples)
    plan = plan_epoch(rows.lengths, batch=8, seed=0, epoch=0, order="bucketed")
    plans = [(plan, len(plan))]
    largest = largest_micro_batches(
        examples, rows, plans, micro_batch=8, packed=True, share_prompt=True
    )
    for chosen in (largest[0], rows.examples(plan[0])):
        some = [examples[i] for i in chosen]
        make_batch(some, packed=True, share_prompt=True, device=torch.device("cpu"))
    first, at_first = time.process_time() - start, resident()
    start = time.process_time()
    for number in range(BATCHES):
        _ = [examples[i] for i in rows.examples(plan[number])]
    each = (time.process_time() - start) / (8 * BATCHES)
    return {
        "way": "read",
        "examples": len(examples),
        "cpu_seconds_to_first_batch": round(first, 2),
        "cpu_microseconds_an_example": round(each * 1e6, 1),
        "before": before,
        "at_first_batch": at_first,
        f"after_{BATCHES}_batches": resident(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("way", choices=("build", "write", "make", "read"))
    parser.add_argument("what", nargs="+")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = Path(args.what[-1])
    folder.mkdir(parents=True, exist_ok=True)
    if args.way == "make":
        make(int(args.what[0]), folder)
        return
    if args.way == "build":
        found = list(build(int(args.what[0]), folder, args.base))
    else:
        found = [write(int(args.what[0]), folder) if args.way == "write" else read(folder)]
    print(json.dumps(found, indent=2))
    if args.out:
        known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
        args.out.write_text(json.dumps([*known, *found], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
