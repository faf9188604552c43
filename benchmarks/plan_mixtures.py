"""Planned against measured peak memory on twenty mixtures of rows that share prompts and rows that
share none.

    python -m benchmarks.plan_mixtures                    all twenty
    python -m benchmarks.plan_mixtures --only qwen        those whose name holds this word
    python -m benchmarks.plan_mixtures --keep found.json  also write every case's figures

Each run is `veneer.train` for two epochs in a process of its own, so the peak is that of the batch
that takes the most, whichever it is. The first mixture is four rows behind a system turn of 1,100
tokens and four of 750; the others are drawn. Memory does not depend on the machine's load. Prints
one line a run, then median and worst error.
"""

import argparse
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plan_accuracy import BASES, measure_all

DRAWN_BASES = ("llama", "qwen", "llama", "smollm2-135m", "gemma", "qwen", "llama")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Mixture:
    """parts: (rows, tokens of the system turn that they share or 0, tokens of each row's own
    text)."""

    base: str
    batch: int
    micro_batch: int | None
    order: str
    checkpointing: bool
    parts: tuple[tuple[int, int, int], ...]

    @property
    def name(self) -> str:
        rows = " + ".join(f"{rows}x({shared}+{own})" for rows, shared, own in self.parts)
        micro = "" if self.micro_batch is None else f" by {self.micro_batch}"
        kept = " kept" if self.checkpointing else ""
        return f"{self.base} {self.batch}{micro} {self.order}{kept}: {rows}"


def mixtures() -> list[Mixture]:
    draw = random.Random(34)
    found = [Mixture("smollm2-135m", 4, None, "bucketed", False, ((4, 1100, 30), (4, 0, 750)))]
    for number in range(19):
        batch = draw.choice([4, 6, 8])
        parts = [(draw.randint(4, 9), draw.choice([300, 500, 700]), draw.randint(30, 250))]
        parts += [(draw.randint(4, 9), 0, draw.randint(120, 600))]
        if draw.random() < 0.5:
            parts.append((draw.randint(2, 6), draw.choice([0, 200]), draw.randint(50, 400)))
        micro, order = draw.choice([None, None, 3]), draw.choice(["bucketed", "shuffled", "file"])
        base = DRAWN_BASES[number % len(DRAWN_BASES)]
        found.append(Mixture(base, batch, micro, order, number % 6 == 5, tuple(parts)))
    return found


def rows_of(mixture: Mixture, seed: int) -> list[dict[str, Any]]:
    """Rows in random order. A random base has a token for each letter, SmolLM2 about one for each
    short word."""
    draw = random.Random(seed)

    def text(tokens: int) -> str:
        if BASES[mixture.base] is None:
            return " ".join(
                draw.choice(["the", "cat", "sat", "on", "a", "red", "mat", "and"])
                for _ in range(tokens)
            )
        return "".join(draw.choice(LETTERS) for _ in range(tokens))

    rows = []
    for count, shared, own in mixture.parts:
        system = [{"role": "system", "content": text(shared)}] if shared else []
        for _ in range(count):
            answer = draw.randint(5, max(own // 4, 6))
            asked = {"role": "user", "content": text(max(own - answer + draw.randint(-9, 9), 5))}
            rows.append(
                {"messages": [*system, asked, {"role": "assistant", "content": text(answer)}]}
            )
    draw.shuffle(rows)
    return rows


def measure(folder: Path, number: int) -> dict[str, Any]:
    """Runs in a process of its own: makes the base if it is random, trains, returns the summary's
    figures."""
    import torch
    from transformers import AutoModelForCausalLM

    import veneer
    from tests.support.tiny import tiny_tokenizer
    from veneer.bases.loading.blueprint import config_from

    mixture, source = mixtures()[number], mixtures()[number].base
    fields = BASES[mixture.base]
    if fields is not None:
        source = str(folder / mixture.base)
        if not Path(source).exists():
            model = AutoModelForCausalLM.from_config(
                config_from({**fields, "dtype": "bfloat16"}), dtype=torch.bfloat16
            )
            model.save_pretrained(source)
            tiny_tokenizer().save_pretrained(source)
            return {}  # the next process measures: this one has held the model
    with tempfile.TemporaryDirectory() as out:
        summary = veneer.train(
            source,
            {"train": rows_of(mixture, number), "validation_share": 0.0},
            out=f"{out}/run",
            batch=mixture.batch,
            micro_batch=mixture.micro_batch,
            order=mixture.order,
            checkpointing=mixture.checkpointing,
            epochs=2,
            dtype="bfloat16",
            quiet=True,
        )
    return {
        key: summary[key]
        for key in ("planned_memory_bytes", "peak_memory_bytes", "idle_memory_bytes")
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", default="", metavar="WORD")
    p.add_argument("--keep", type=Path, metavar="FILE")
    p.add_argument("--scratch", type=Path, help="keep the random bases here, for the next time")
    p.add_argument("--measure", nargs=2, metavar="X", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), int(args.measure[1]))))
        return
    chosen = {
        one.name: str(number) for number, one in enumerate(mixtures()) if args.only in one.name
    }
    measure_all(["-m", "benchmarks.plan_mixtures", "--measure"], chosen, args.scratch, args.keep)


if __name__ == "__main__":
    main()
