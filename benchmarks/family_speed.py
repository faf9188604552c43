"""Steps of each family at one shape: time beside Llama's, and bytes kept for backward.

    python benchmarks/family_speed.py --out family_speed.json
    python benchmarks/family_speed.py --answers 1 16     decoding with 1 row, and with 16
    python benchmarks/family_speed.py --answers 16 --generate    beside transformers.generate

Random bases in bf16 of SmolLM2-135M's shape (--layers of them), each in the form of its family:
norms, gates, rotation. A mixture has as many active parameters as Llama. --nf4 packs all linear
layers (QLoRA). In a hybrid some layers pass a state from token to token. LoRA of rank 16 on all
linear layers, 8 rows that share a prompt; decoding steps are of the adapter, after prompts of 64
tokens. transformers.generate answers without an adapter.
The families take steps in turn in one process, so that what else the machine does falls on all
alike; the fastest step of each counts. On a machine that others use, --clock cpu with one thread
(OMP_NUM_THREADS=1) counts the time that the process itself computed. `path` says how layers are
computed: one node each, or parts; in decoding recorded steps, or why not.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import veneer
from tests.support.models.routed import batch_loss
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.data.batching import make_batch
from veneer.data.examples import Example, RowRef
from veneer.decoding.engine import Engine
from veneer.decoding.generate import generate
from veneer.decoding.proof import decodes_packed
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.sequence import Request
from veneer.execution.train_step import FusedLayer, fused, replacements

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
FALCON = {"ffn_hidden_size": 1536, "num_kv_heads": 3}
GRANITE_HYBRID = {"mamba_n_heads": 18, "mamba_d_state": 128, "residual_multiplier": 0.22}
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
    "granite": {"residual_multiplier": 0.22},
    "glm4": {"head_dim": 64},
    "phi3": {},
    "cohere": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "phi": {},
    "gpt_neox": {},
    "gpt2": {"n_inner": 1536},
    "gpt_bigcode": {"n_inner": 1536},
    "opt": {"ffn_dim": 1536, "word_embed_proj_dim": 576},
    "biogpt": {},
    "arcee": {},
    "ernie4_5": {"head_dim": 64},
    "ministral3": {"head_dim": 64},
    "hyperclovax": {},
    "nemotron": {"head_dim": 64},
    "olmo": {},
    "hunyuan_v1_dense": {"head_dim": 64},
    "falcon": FALCON,
    "falcon, groups": {**FALCON, "new_decoder_architecture": True},
    "mixtral": {"intermediate_size": 768, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 64,
        "moe_intermediate_size": 384,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "qwen3_next": {
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "moe_intermediate_size": 384,
        "shared_expert_intermediate_size": 384,
        "num_experts": 16,
        "num_experts_per_tok": 3,
    },
    "granitemoehybrid": {
        **GRANITE_HYBRID,
        "num_local_experts": 0,
        "shared_intermediate_size": 1536,
    },
    "granitemoehybrid, experts": {
        **GRANITE_HYBRID,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 384,
        "shared_intermediate_size": 768,
    },
    "falcon_h1": {"mamba_d_ssm": 576, "mamba_n_heads": 9, "mamba_d_state": 128},
}
"""What the form of a family asks of its config beside the shape. After a
comma: a form of the family."""
ATTENTION_EVERY = {"lfm2": 3, "granitemoehybrid": 10}
"""Layers of a hybrid of which the last has attention; in the others a state passes from token to
token."""


def hybrid_layers(family: str, layers: int) -> dict[str, list[str]]:
    """Returns the layer types of a hybrid whose config has none of its own."""
    if (every := ATTENTION_EVERY.get(kind := family.partition(",")[0])) is None:
        return {}
    state = "conv" if kind == "lfm2" else "linear_attention"
    types = [state if number % every else "full_attention" for number in range(layers)]
    return {"layer_types": types[::-1]}


NEW = 32
"""Tokens of an answer."""
Table = dict[str, dict[str, str | float]]


def examples(count: int, prompt: int, answer: int) -> list[Example]:
    draw = np.random.default_rng(0)
    start, rows = draw.integers(0, SHAPE["vocab_size"], prompt), []
    for number in range(count):
        own = draw.integers(0, SHAPE["vocab_size"], answer)
        ids = np.concatenate([start, own]).astype(np.int32)
        trained = np.arange(len(ids)) > prompt
        rows.append(Example(ids, trained, RowRef("rows.jsonl", number + 1), number))
    return rows


def prompts(rows: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(
        0, SHAPE["vocab_size"] - 1, (rows, 64), generator=draw
    ).tolist()
    return ids


def one_token(vocabulary: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of one token, whose id is the last."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<end>": vocabulary - 1}, "<end>")),
        eos_token="<end>",
        pad_token="<end>",
    )


def loop_speed(rows: int, clock: Callable[[], float], answer: Callable[[int], object]) -> float:
    """Returns the tokens a second of answers, behind the first two tokens of each."""
    seconds = []
    for new in (2, NEW):
        began = clock()
        answer(new)
        seconds.append(clock() - began)
    return rows * (NEW - 2) / (seconds[1] - seconds[0])


class Trained:
    """A base of a family with an adapter, and its steps: of training, on one batch, and of
    decoding."""

    def __init__(self, family: str, layers: int, rows: list[Example], *, nf4: bool) -> None:
        fields = SHAPE | FAMILIES[family] | {"num_hidden_layers": layers}
        fields |= hybrid_layers(family, layers)
        self.config = AutoConfig.for_model(family.partition(",")[0], **fields)
        made = self.plain()
        with TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            one_token(SHAPE["vocab_size"]).save_pretrained(folder)
            packed: Literal["nf4"] | None = "nf4" if nf4 else None
            self.base = veneer.load(folder, dtype="bfloat16", device="cpu", quantize=packed)
        self.model, self.paths, self.routing = self.base.model, self.base.paths, self.base.routing
        head = self.model.get_output_embeddings()
        settings = LoRA(targets="all-linear", rank=16, alpha=32.0)
        attachment = attach(self.model, settings, name="a", routing=self.routing, head=head)
        self.parameters = list(attachment.parameters().values())
        self.routing.active = (("a", 1.0),)
        self.batch = make_batch(
            rows, packed=self.paths.packed, share_prompt=True, device=torch.device("cpu")
        )
        self.stand_ins = replacements(self.model)

    def plain(self) -> PreTrainedModel:
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        return made.eval()

    def loss(self) -> Tensor:
        total = float(self.batch.trained_tokens)
        with fused(self.model, self.stand_ins):
            return batch_loss(self, self.batch, total=total)

    def step(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Seconds of a forward and a backward."""
        began = clock()
        torch.autograd.grad(self.loss(), self.parameters)
        return clock() - began

    def tokens_per_second(self, rows: int, clock: Callable[[], float]) -> float:
        """Measures steps of single tokens behind the first; the median counts."""
        if not decodes_packed(self.base):
            return self.tokens_per_second_in_loop(rows, clock)
        identity = (("a", 1.0),)
        adapters = FixedAdapters({identity: self.routing.applied(identity)})
        self.routing.active = ()
        engine = Engine(self.base, budget_bytes=2**30, adapters=adapters, lookup="off")
        answers = [
            engine.add(Request(prompt=tuple(ids), max_new_tokens=NEW, adapter=identity))[0]
            for ids in prompts(rows)
        ]
        while not all(len(answer.new) > 2 for answer in answers):
            engine.step(0.0)
        step = engine.decode_step
        self.decode_path = step.not_by_parts or ("recorded" if step.is_recorded else "parts")
        speeds, made = [], sum(len(answer.new) for answer in answers)
        while not engine.scheduler.idle:
            began, before = clock(), made
            engine.step(0.0)
            made = sum(len(answer.new) for answer in answers)
            speeds.append((made - before) / (clock() - began))
        self.routing.active = identity
        return statistics.median(speeds)

    def tokens_per_second_in_loop(self, rows: int, clock: Callable[[], float]) -> float:
        """Measures the tokens behind the first two of a model that the engine does not take."""
        self.decode_path = "transformers' loop"
        return loop_speed(
            rows, clock, lambda new: generate(self.base, prompts(rows), max_new_tokens=new)
        )

    def generated_per_second(self, rows: int, clock: Callable[[], float]) -> float:
        """Measures transformers.generate of the base without an adapter."""
        model: Any = self.plain()
        ids = torch.tensor(prompts(rows))
        fixed = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        return loop_speed(
            rows,
            clock,
            lambda new: model.generate(ids, min_new_tokens=new, max_new_tokens=new, **fixed),
        )

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
        halves = any(
            isinstance(own, FusedLayer) and own.facts.feed_forward is None
            for own in self.stand_ins.values()
        )
        kind = "nodes of attention" if halves else "nodes"
        return f"{layers} {kind}" if layers else "parts"


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
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--answers", type=int, nargs="+", default=[], metavar="ROWS")
    parser.add_argument("--generate", action="store_true", help="with --answers")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    rows = examples(8, args.prompt, args.answer)
    bases = {family: Trained(family, args.layers, rows, nf4=args.nf4) for family in args.families}
    if args.answers:
        table = decoding(bases, args.answers, args.repeats, clock)
        if args.generate:
            beside_generate(bases, table, args.answers, clock)
    else:
        table = training(bases, len(rows), args.repeats, clock)
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


def training(
    bases: dict[str, Trained], rows: int, repeats: int, clock: Callable[[], float]
) -> Table:
    """Measures training steps of all families in turn."""
    kept = {family: own.kept_bytes() for family, own in bases.items()}
    seconds: dict[str, list[float]] = {family: [] for family in bases}
    for _ in range(repeats):
        for family, own in bases.items():
            seconds[family].append(own.step(clock))
    first = next(iter(bases))
    return {
        family: {
            "path": bases[family].path(),
            "examples/s": rows / min(times),
            f"beside {first}": min(seconds[first]) / min(times),
            "kept MiB": kept[family] / 2**20,
            f"kept beside {first}": kept[family] / kept[first],
        }
        for family, times in seconds.items()
    }


def decoding(
    bases: dict[str, Trained], numbers: list[int], repeats: int, clock: Callable[[], float]
) -> Table:
    """Measures decoding steps of all families in turn, with each number of rows."""
    table: Table = {family: {} for family in bases}
    for rows in numbers:
        speeds: dict[str, list[float]] = {family: [] for family in bases}
        for _ in range(repeats):
            for family, own in bases.items():
                speeds[family].append(own.tokens_per_second(rows, clock))
        first = max(next(iter(speeds.values())))
        for family, of_family in speeds.items():
            table[family]["path"] = bases[family].decode_path
            table[family][f"tokens/s of {rows}"] = max(of_family)
            table[family][f"beside the first, {rows}"] = max(of_family) / first
    return table


def beside_generate(
    bases: dict[str, Trained], table: Table, numbers: list[int], clock: Callable[[], float]
) -> None:
    """Adds to the table what transformers.generate reaches, the faster of two runs."""
    for rows in numbers:
        for family, own in bases.items():
            speed = max(own.generated_per_second(rows, clock) for _ in range(2))
            table[family][f"generate of {rows}"] = speed
            ours = table[family][f"tokens/s of {rows}"]
            assert isinstance(ours, float)
            table[family][f"beside generate, {rows}"] = ours / speed


if __name__ == "__main__":
    main()
