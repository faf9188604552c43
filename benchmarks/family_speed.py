"""A training step of each family at one shape: time beside Llama's, and bytes kept for backward.

    python benchmarks/family_speed.py --out family_speed.json

Random bases in bf16 of SmolLM2-135M's shape (--layers of them), each in the form of its family:
norms, gates, rotation. LoRA of rank 16 on all linear layers, 8 rows that share a prompt. The
families take steps in turn in one process, so that what else the machine does falls on all alike;
the fastest step of each counts. On a machine that others use, --clock cpu with one thread
(OMP_NUM_THREADS=1) counts the time that the process itself computed. `path` says how layers are
computed: one node each, or parts.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import make_batch
from veneer.data.examples import Example, RowRef
from veneer.execution.train_step import fused, replacements
from veneer.models.step import batch_loss, prepare

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 512}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma": {"head_dim": 64},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": {},
    "exaone4": {"sliding_window": 512},
    "smollm3": {},
    "granite": {},
    "glm4": {"head_dim": 64},
    "phi3": {},
    "cohere": {},
}
"""What the form of a family asks of its config beside the shape."""


def examples(count: int, prompt: int, answer: int) -> list[Example]:
    draw = np.random.default_rng(0)
    start, rows = draw.integers(0, SHAPE["vocab_size"], prompt), []
    for number in range(count):
        own = draw.integers(0, SHAPE["vocab_size"], answer)
        ids = np.concatenate([start, own]).astype(np.int32)
        trained = np.arange(len(ids)) > prompt
        rows.append(Example(ids, trained, RowRef("rows.jsonl", number + 1), number))
    return rows


class Trained:
    """A base of a family with an adapter, and its step on one batch."""

    def __init__(self, family: str, layers: int, rows: list[Example]) -> None:
        config = AutoConfig.for_model(family, **SHAPE, **FAMILIES[family], num_hidden_layers=layers)
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model = made.eval().requires_grad_(False)
        self.paths, self.routing = prepare(self.model), Routing()
        head = self.model.get_output_embeddings()
        settings = LoRA(targets="all-linear", rank=16, alpha=32.0)
        attachment = attach(self.model, settings, name="a", routing=self.routing, head=head)
        self.parameters = list(attachment.parameters().values())
        self.routing.active = (("a", 1.0),)
        self.batch = make_batch(
            rows, packed=self.paths.packed, share_prompt=True, device=torch.device("cpu")
        )
        self.stand_ins = replacements(self.model)

    def loss(self) -> Tensor:
        total = float(self.batch.trained_tokens)
        with fused(self.model, self.stand_ins):
            return batch_loss(self.model, self.paths, self.routing, self.batch, total=total)

    def step(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Seconds of a forward and a backward."""
        began = clock()
        torch.autograd.grad(self.loss(), self.parameters)
        return clock() - began

    def kept_bytes(self) -> int:
        """Bytes of all tensors that a forward keeps for backward, parameters aside."""
        own = {tensor.untyped_storage().data_ptr() for tensor in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.step()
        return sum(kept.values())

    def path(self) -> str:
        """How the layers are computed: one node each, or parts."""
        nodes, waiting = set[Any](), [self.loss().grad_fn]
        while waiting:
            if (node := waiting.pop()) is not None and node not in nodes:
                nodes.add(node)
                waiting += [above for above, _ in node.next_functions]
        layers = sum(node.name() == "_BlockBackward" for node in nodes)
        return f"{layers} nodes" if layers else "parts"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--prompt", type=int, default=45)
    parser.add_argument("--answer", type=int, default=70)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    rows = examples(8, args.prompt, args.answer)
    trained = {family: Trained(family, args.layers, rows) for family in args.families}
    kept = {family: own.kept_bytes() for family, own in trained.items()}
    seconds: dict[str, list[float]] = {family: [] for family in trained}
    for _ in range(args.repeats):
        for family, own in trained.items():
            seconds[family].append(own.step(clock))
    first = args.families[0]
    table = {
        family: {
            "path": trained[family].path(),
            "examples/s": len(rows) / min(times),
            f"beside {first}": min(seconds[first]) / min(times),
            "kept MiB": kept[family] / 2**20,
            f"kept beside {first}": kept[family] / kept[first],
        }
        for family, times in seconds.items()
    }
    for family, row in table.items():
        print(family, *(f"{k} {v:.2f}" if isinstance(v, float) else v for k, v in row.items()))
    if args.out is not None:
        about = {
            "machine": platform.processor() or platform.machine(),
            "clock": args.clock,
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        args.out.write_text(json.dumps({"about": about, "families": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
