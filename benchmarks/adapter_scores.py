"""Scores the same rows with several adapters: in one call, one adapter after the other, and with
transformers and PEFT one adapter after the other.

    python benchmarks/adapter_scores.py rows.jsonl          smollm2-135m, 16 adapters, 8 rows
    python benchmarks/adapter_scores.py rows.jsonl --adapters 4 --count 32 --turns 5

Prints JSON: seconds and processor seconds (median and spread of --turns alternating turns), and the
largest difference of a score to PEFT's. Processor seconds of one thread (OMP_NUM_THREADS=1) compare
on a busy machine, too. transformers computes the rows in batches of 16, padded, and the
log-probability of every position, as its `loss` does.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import veneer
from veneer.base import Base
from veneer.bases.names.sources import locate

BATCH = 16
"""Rows in a forward of transformers and PEFT."""


def save_adapters(model: Any, count: int, folder: Path) -> list[Path]:
    """Saves adapters of rank 16 on all linear layers, with random factors, as PEFT's files."""
    folders = [folder / f"a{number}" for number in range(count)]
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    adapted = get_peft_model(model, config)
    factors = [values for name, values in adapted.named_parameters() if "lora_B" in name]
    for number, target in enumerate(folders):
        torch.manual_seed(number)
        for values in factors:
            torch.nn.init.normal_(values, std=0.01)
        adapted.save_pretrained(target)
    adapted.unload()
    return folders


@torch.no_grad()
def peft_scores(model: Any, ids: list[list[int]], answers: list[int]) -> Tensor:
    """Returns the summed log-probability of the last answers[i] tokens of every row, (N)."""
    sums = []
    for start in range(0, len(ids), BATCH):
        rows = ids[start : start + BATCH]
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        logits = model(input_ids=padded, attention_mask=mask).logits[:, :-1].float()
        targets = padded[:, 1:, None]
        log_probs = torch.log_softmax(logits, dim=-1).gather(-1, targets)[..., 0]
        for row, count, values in zip(rows, answers[start:], log_probs, strict=False):
            sums.append(values[len(row) - 1 - count : len(row) - 1].sum())
    return torch.stack(sums)


def ways(
    base: Base, peft: Any, names: list[str], pairs: list[tuple[list[int], list[int]]]
) -> dict[str, Callable[[], dict[str, Any]]]:
    ids = [prompt + answer for prompt, answer in pairs]
    answers = [len(answer) for _, answer in pairs]

    def one_by_one() -> dict[str, Any]:
        return {name: base.score(pairs, adapter=name) for name in names}

    def with_peft() -> dict[str, Any]:
        scores = {}
        for name in names:
            peft.set_adapter(name)
            scores[name] = peft_scores(peft, ids, answers)
        return scores

    return {
        "together": lambda: dict(base.score(pairs, adapter=names)),  # type: ignore[arg-type]
        "one by one": one_by_one,
        "transformers and PEFT": with_peft,
    }


def summarised(values_of: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {
        way: {
            "median": round(statistics.median(values), 2),
            "spread": [round(min(values), 2), round(max(values), 2)],
        }
        for way, values in values_of.items()
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("rows", type=Path, help="JSONL of messages")
    p.add_argument("--base", default="smollm2-135m")
    p.add_argument("--adapters", type=int, default=16)
    p.add_argument("--count", type=int, default=8, help="rows to score")
    p.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"])
    p.add_argument("--turns", type=int, default=1)
    args = p.parse_args()
    base = veneer.load(args.base, dtype=args.dtype)
    tokenizer = base.tokenizer
    pairs = []
    for line in args.rows.read_text("utf-8").splitlines()[: args.count]:
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=False
        )
        answer = messages[-1]["content"] + tokenizer.eos_token
        pairs.append(
            tuple(tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer))
        )
    model = AutoModelForCausalLM.from_pretrained(locate(args.base).folder, dtype=base.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        folders = save_adapters(model, args.adapters, Path(scratch))
        names = [base.load_adapter(folder) for folder in folders]
        peft = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
        for folder, name in zip(folders[1:], names[1:], strict=True):
            peft.load_adapter(folder, adapter_name=name)
        peft.eval()
        seconds: dict[str, list[float]] = {}
        processor: dict[str, list[float]] = {}
        scores: dict[str, dict[str, Any]] = {}
        chosen = ways(base, peft, names, pairs)
        for call in ways(base, peft, names[:1], pairs[:2]).values():  # a warm-up
            call()
        for _ in range(args.turns):
            for way, call in chosen.items():
                start, used = time.perf_counter(), time.process_time()
                scores[way] = call()
                processor.setdefault(way, []).append(time.process_time() - used)
                seconds.setdefault(way, []).append(time.perf_counter() - start)
    differences = [
        abs(score.sum - float(theirs))
        for name in names
        for score, theirs in zip(
            scores["together"][name], scores["transformers and PEFT"][name], strict=True
        )
    ]
    print(
        json.dumps(
            {
                "adapters": args.adapters,
                "rows": len(pairs),
                "tokens": sum(len(prompt) + len(answer) for prompt, answer in pairs),
                "dtype": str(base.dtype),
                "largest_difference": max(differences),
                "seconds": summarised(seconds),
                "processor_seconds": summarised(processor),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
