"""Trains on pairs with TRL's DPOTrainer and peft; prints one JSON line.

It needs no Veneer: `benchmarks/pairs_speed.py` starts it with the Python that has the peers.

    python benchmarks/pairs_trl.py --base FOLDER --pairs pairs.jsonl --batch 8 --steps 12

LoRA of rank 16 on all linear layers, bf16 weights, constant rate, no dropout, rows in file order.
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
from peft import LoraConfig
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
    p.add_argument("--pairs", required=True)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--steps", type=int, default=12)
    p.add_argument("--lr", type=float, default=2e-5)
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
        trainer = trl.DPOTrainer(
            AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.base),
            callbacks=[clock],
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
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
                "first_loss": round(clock.losses[0], 4),
                "last_loss": round(clock.losses[args.steps], 4),
                "peak_rss_mib": round(peak, 1),
                "versions": {"trl": trl.__version__, "torch": torch.__version__},
            }
        )
    )


if __name__ == "__main__":
    main()
