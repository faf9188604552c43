"""What it costs to choose a label by likelihood, beside other ways to get one.

    python benchmarks/label_scores.py rows.jsonl labels.txt          smollm2-135m, 16 rows
    python benchmarks/label_scores.py rows.jsonl labels.txt --counts 4,77 --turns 5

Prints JSON for the first labels of the file, as many as --counts says: rows per second (median and
spread of --turns alternating turns), and rows per processor second, which on one thread
(OMP_NUM_THREADS=1) compare on a busy machine, too:

    tree      all labels of a row behind one prompt (veneer.choose)
    alone     every label as a row of its own, with its own copy of the prompt
    decoded   the answer generated greedily, up to as many tokens as the longest label has
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import veneer
from veneer.base import Base
from veneer.data.batching import make_batch
from veneer.data.examples import Example, Row, RowRef
from veneer.data.template.template import ChatTemplate
from veneer.evaluation.label_scores import label_examples
from veneer.models.step import token_losses

ROWS_AT_ONCE = 128
"""Rows of labels that are computed together in `alone`."""


def alone(base: Base, examples: list[Example]) -> None:
    for start in range(0, len(examples), ROWS_AT_ONCE):
        batch = make_batch(
            examples[start : start + ROWS_AT_ONCE],
            packed=base.paths.packed,
            share_prompt=False,
            device=base.device,
        )
        token_losses(base, batch)


def ways(base: Base, prompts: list[str], labels: list[str]) -> dict[str, Callable[[], object]]:
    template = ChatTemplate(base.tokenizer)
    rows = [
        Row(
            RowRef("rows", number),
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": labels[0]}],
        )
        for number, prompt in enumerate(prompts)
    ]
    examples = [example for row in rows for example in label_examples(template, row, labels)]
    most = max(int(example.trained.sum()) for example in examples)
    return {
        "tree": lambda: veneer.choose(base, prompts, labels),
        "alone": lambda: alone(base, examples),
        "decoded": lambda: base.generate(prompts, max_new_tokens=most),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapter")
    parser.add_argument("--count", type=int, default=16, help="rows")
    parser.add_argument("--counts", default="4,77", help="numbers of labels")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    base = veneer.load(args.base)
    if args.adapter:
        base.use(base.load_adapter(args.adapter))
    lines = args.rows.read_text().splitlines()[: args.count]
    prompts = [json.loads(line)["prompt"] for line in lines]
    labels = args.labels.read_text().split("\n")
    results = {}
    for count in map(int, args.counts.split(",")):
        chosen = ways(base, prompts, [label for label in labels if label][:count])
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        processor: dict[str, list[float]] = {name: [] for name in chosen}
        for turn in range(args.turns + 1):
            for name, run in chosen.items():
                start, used = time.perf_counter(), time.process_time()
                run()
                if turn:  # the first turn warms up
                    seconds[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - used)
        results[f"{count} labels"] = {
            name: {
                "rows per second": round(len(prompts) / statistics.median(taken), 3),
                "spread": round(max(taken) / min(taken), 3),
                "rows per processor second": round(
                    len(prompts) / statistics.median(processor[name]), 3
                ),
            }
            for name, taken in seconds.items()
        }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
