"""Trains on pairs with TRL's DPOTrainer and peft; prints one JSON line.

It needs no Veneer: `benchmarks/pairs_speed.py` starts it with the Python that has the peers.

    python benchmarks/pairs_trl.py --base FOLDER --start ADAPTER --pairs pairs.jsonl --batch 8 \\
        --steps 12

It trains the adapter in the folder ADAPTER on, at a constant rate, without dropout, rows in file
order. TRL takes the adapter as it is at the start as the reference.
The first step is a warm-up: not timed. `peak_rss_mib` is the peak of the whole process.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class StepClock(TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, *_: object, logs: dict[str, float], **__: object) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--base", required=True)
    p.add_argument("--start", required=True)
    p.add_argument("--pairs", required=True)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--lr", type=float, default=2e-5)
    p.add_argument("--dtype", default="bfloat16")
    args = p.parse_args()
    with Path(args.pairs).open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: args.batch * (args.steps + 1)]
    clock = StepClock()
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.DPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=args.batch,
            max_steps=args.steps + 1,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            seed=0,
            logging_steps=1,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        base = AutoModelForCausalLM.from_pretrained(args.base, dtype=getattr(torch, args.dtype))
        trainer = trl.DPOTrainer(
            PeftModel.from_pretrained(base, args.start, is_trainable=True),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.base),
            callbacks=[clock],
        )
        out, sys.stdout = sys.stdout, sys.stderr  # TRL prints its records
        trainer.train()
        sys.stdout = out
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    seconds = clock.ends[-1] - clock.ends[0]
    print(
        json.dumps(
            {
                "tool": "trl",
                "pairs_per_s": round(args.batch * args.steps / seconds, 3),
                "losses": [round(loss, 4) for loss in clock.losses[: args.steps + 1]],
                "peak_rss_mib": round(peak, 1),
                "versions": {"trl": trl.__version__, "torch": torch.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
