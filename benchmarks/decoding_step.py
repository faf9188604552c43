"""What a decoding step costs: through the engine, by the base alone and by adapters, beside
transformers' own loop.

    python benchmarks/decoding_step.py
        smollm2-135m: bf16, NF4, blocks of the file
    python benchmarks/decoding_step.py --formats bf16 --rows 1 --turns 3
    python benchmarks/decoding_step.py --formats bf16 --turns 2 --batching
        beside its continuous batching
    python benchmarks/decoding_step.py --formats bf16 --rows 16 --turns 1 --peft   beside PEFT
    python benchmarks/decoding_step.py --formats gguf --llama FILE.gguf
        beside llama.cpp over the same file

Prints a list of `measurements`, as docs/results/*.json hold them. Prompts of 64 tokens, 128 new
ones, greedy, nothing stops; a step is timed from the second new token on. Adapters are held and
laid out before, as a library's are. Ways alternate within a turn; milliseconds and tokens/s are
medians with least and most. `torch calls` are counted once, on a step of its own. transformers'
loop runs the same weights, dense, in modules of its own.
"""

import argparse
import copy
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

import veneer
from veneer.adapters.config import LoRA
from veneer.base import Base
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.schedule.adapters import FixedAdapters, lay_out
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.sequence import Request
from veneer.library.residents.eviction import hold_as

PROMPT, NEW, FEW = 64, 128, 8
FORMATS: dict[str, Any] = {"bf16": None, "nf4": "nf4", "gguf": "gguf"}


class Calls(TorchDispatchMode):
    """Counts what torch is asked for."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def prompts(rows: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(100, 40000, (rows, PROMPT), generator=draw).tolist()


def filled_engine(base: Base, identities: list[Identity], rows: int) -> Engine:
    """With all prompts read and the first token drawn."""
    applied = {each: base.routing.applied(each) for each in identities}
    places = rows * (PROMPT + NEW + 16) * bytes_per_token(base)
    engine = Engine(
        base,
        budget_bytes=places,
        adapters=FixedAdapters({k: v for k, v in applied.items() if k}),
        lookup="off",  # a guessed token would be a second row of a step
    )
    answers = []
    for row, prompt in enumerate(prompts(rows)):
        own = identities[row % len(identities)]
        answers += engine.add(Request(prompt=tuple(prompt), max_new_tokens=NEW, adapter=own))
    while not all(answer.new for answer in answers):
        engine.step(0.0)
    return engine


def by_engine(base: Base, identities: list[Identity], rows: int) -> dict[str, float]:
    start = time.perf_counter()
    engine = filled_engine(base, identities, rows)
    steps = []
    while not engine.scheduler.idle:
        began = time.perf_counter()
        engine.step(0.0)
        steps.append(time.perf_counter() - began)
    whole = time.perf_counter() - start
    return {"ms a step": 1e3 * statistics.median(steps), "tokens/s": rows * NEW / whole}


def calls_of_a_step(base: Base, identities: list[Identity], rows: int) -> int:
    engine = filled_engine(base, identities, rows)
    with Calls() as counted:
        engine.step(0.0)
    return counted.count


def by_transformers(model: Any, rows: int) -> dict[str, float]:
    ids = torch.tensor(prompts(rows))
    settings = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    whole = time.perf_counter() - start
    return {"ms a step": 1e3 * whole / NEW, "tokens/s": rows * NEW / whole}


def by_batching(model: Any, rows: int) -> dict[str, float]:
    """transformers' own continuous batching, with room for all rows at once."""
    settings = GenerationConfig(
        max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1
    )
    room = ContinuousBatchingConfig(
        page_size=PROMPT + NEW,
        num_blocks=2 * rows,
        max_batch_tokens=rows * PROMPT,
        use_async_batching=False,
    )
    start = time.perf_counter()
    answers = model.generate_batch(
        prompts(rows),
        settings,
        continuous_batching_config=room,
        record_timestamps=True,
        warmup=False,
    )
    whole = time.perf_counter() - start
    came = next(iter(answers.values())).timestamps
    steps = [after - before for before, after in pairwise(came)]
    return {"ms a step": 1e3 * statistics.median(steps), "tokens/s": rows * NEW / whole}


def by_peft(model: Any, rows: int, adapters: int, rank: int) -> dict[str, float]:
    """PEFT's `adapter_names`, each row with an adapter of its own: what the last tokens of few
    take."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    tuned: Any = get_peft_model(copy.deepcopy(model), config, adapter_name="a0")
    for number in range(1, adapters):
        tuned.add_adapter(f"a{number}", config)
    tuned.set_adapter("a0")
    tuned.eval()
    ids, names = torch.tensor(prompts(rows)), [f"a{row % adapters}" for row in range(rows)]

    def seconds(new: int) -> float:
        settings = GenerationConfig(
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        start = time.perf_counter()
        with torch.no_grad():
            mask = torch.ones_like(ids)
            tuned.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, adapter_names=names
            )
        return time.perf_counter() - start

    seconds(2)
    few, more = seconds(FEW), seconds(2 * FEW)
    return {"ms a step": 1e3 * (more - few) / FEW, "tokens/s": rows * 2 * FEW / more}


class LlamaCpp:
    """llama.cpp over a .gguf file in a process of its own (llama_step.py)."""

    def __init__(self, file: str, rows: int) -> None:
        threads = str(torch.get_num_threads())
        command = [
            sys.executable,
            str(Path(__file__).with_name("llama_step.py")),
            file,
            "--rows",
            str(rows),
        ]
        command += ["--threads", threads, "--read", str(PROMPT), "--new", str(NEW)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self) -> dict[str, float]:
        self.process.stdin.write("run\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(
                f"llama.cpp ended with {self.process.wait()}:"
                f" {shlex.join(map(str, self.process.args))}"
            )
        found: dict[str, float] = json.loads(line)
        return found


def dense_copy(base: Base) -> Any:
    """transformers' own modules with the base's weights, before anything stands beside them."""
    config = copy.deepcopy(base.config)  # which says how the base attends
    model: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", dtype=base.dtype
    )
    model.load_state_dict(base.model.state_dict())
    model.tie_weights()
    return model.eval()


def alternating(ways: dict[str, Callable[[], dict[str, float]]], turns: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, run in ways.items():
            measured = run()
            if turn:
                found[name].append(measured)
    return {
        name: {what: spread([each[what] for each in all_]) for what in all_[0]}
        for name, all_ in found.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "least": round(min(values), 2),
        "most": round(max(values), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--llama", metavar="FILE.gguf", help="llama.cpp too, over this file")
    parser.add_argument(
        "--batching", action="store_true", help="transformers' continuous batching too"
    )
    parser.add_argument(
        "--peft", action="store_true", help="PEFT's adapter_names too, once, over bf16"
    )
    asked = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    measurements = []
    plain: Any = None
    for name in asked.formats.split(","):
        base = veneer.load(asked.base, quantize=FORMATS[name])
        _ = base.paths
        if plain is None:
            plain = dense_copy(base if FORMATS[name] is None else veneer.load(asked.base))
        identities: list[Identity] = []
        for number in range(asked.adapters):
            made = base.attach(LoRA(rank=asked.rank), name=f"a{number}", seed=number)
            for parameter in made.parameters().values():
                parameter.data.normal_(std=0.01)
                parameter.requires_grad_(False)
            hold_as(made, base.dtype)
            lay_out(made, base.dtype, base.device, most_bytes=2**30)
            identities.append(((f"a{number}", 1.0),))
        for rows in map(int, asked.rows.split(",")):
            ways: dict[str, Callable[[], dict[str, float]]] = {
                "base": partial(by_engine, base, [()], rows),
                f"{min(rows, asked.adapters)} adapters": partial(
                    by_engine, base, identities[:rows], rows
                ),
                "transformers.generate": partial(by_transformers, plain, rows),
            }
            if asked.batching:
                ways["transformers' continuous batching"] = partial(by_batching, plain, rows)
            if asked.llama is not None:
                ways["llama.cpp"] = LlamaCpp(asked.llama, rows)
            values: dict[str, Any] = alternating(ways, asked.turns)
            if asked.peft:
                values["PEFT adapter_names"] = by_peft(
                    plain, rows, min(rows, asked.adapters), asked.rank
                )
            values["base"]["torch calls a step"] = calls_of_a_step(base, [()], rows)
            values[f"{min(rows, asked.adapters)} adapters"]["torch calls a step"] = calls_of_a_step(
                base, identities[:rows], rows
            )
            measurements.append(
                {
                    "what": (
                        f"a decoding step of {rows} rows: {asked.base}, {name}, LoRA of rank"
                        f" {asked.rank} on all linear layers, {PROMPT} tokens read and {NEW} new"
                        " ones"
                    ),
                    "machine": (
                        f"{platform.processor() or platform.machine()}; torch {torch.__version__}"
                    ),
                    "commit": commit.stdout.strip(),
                    "command": f"python benchmarks/decoding_step.py --formats {name} --rows {rows}",
                    "values": {
                        "threads": torch.get_num_threads(),
                        "dtype": str(base.dtype),
                        **values,
                    },
                }
            )
    print(json.dumps({"measurements": measurements}, indent=1))


if __name__ == "__main__":
    main()
