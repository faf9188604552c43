"""Does it learn? Held-out loss and JSON field F1 of the base, of LoRA and of full fine-tuning, over seeds.

python benchmarks/quality.py --base smollm2-135m --train e2e.jsonl --test e2e_test.jsonl --seeds 3 --steps 64
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from veneer import api
from veneer.adapters.config import METHODS
from veneer.train.config import DataConfig, RunConfig
from veneer.train.screen import QuietScreen

METRICS = ("json_validity", "field_f1")


def measure(base: api.Base, test: str, max_new_tokens: int) -> dict[str, Any]:
    found = api.evaluate(base, test, metrics=METRICS, max_new_tokens=max_new_tokens, batch=32)
    return {k: found[k] for k in ("loss", *METRICS)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--train", required=True)
    p.add_argument("--test", required=True)
    p.add_argument("--methods", nargs="+", default=["lora", "full"], choices=sorted(METHODS))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--steps", type=int, default=64)
    p.add_argument("--max-new-tokens", type=int, default=96)
    args = p.parse_args()
    lines = [{"method": "base", "seed": None, **measure(api.load(args.base), args.test, args.max_new_tokens)}]
    print(json.dumps(lines[0]), flush=True)
    for seed in range(args.seeds):
        for method in args.methods:
            with tempfile.TemporaryDirectory() as scratch:
                out = f"{scratch}/run"
                data = DataConfig(train=args.train, validation_share=0.0)
                config = RunConfig(
                    base=args.base, data=data, out=out, method=METHODS[method](), steps=args.steps, seed=seed
                )
                summary = api.train_run(config, resume=False, screen=QuietScreen())
                if method == "full":
                    tuned = api.load(f"{out}/model")
                else:
                    tuned = api.load(args.base)
                    tuned.use(tuned.load_adapter(Path(out) / "adapter", name="tuned"))
                line = {
                    "method": method, "seed": seed, **measure(tuned, args.test, args.max_new_tokens),
                    "seconds": round(summary["total_seconds"], 1), "file_bytes": summary["adapter_bytes"],
                    "peak_mib": round(summary["peak_memory_bytes"] / 2**20),
                }  # fmt: skip
            lines.append(line)
            print(json.dumps(line), flush=True)
    for method in args.methods:
        own = [line for line in lines if line["method"] == method]
        told = [f"{k} {statistics.mean(l[k] for l in own):.3f} ({min(l[k] for l in own):.3f}-{max(l[k] for l in own):.3f})" for k in ("loss", *METRICS)]  # fmt: skip
        print(f"{method}: {'  '.join(told)}")


if __name__ == "__main__":
    main()
