"""One base and a library of up to a thousand adapters, asked for by a power law: what is answered,
how soon, in what memory.

    python benchmarks/many_adapters.py
        smollm2-135m; 1, 16, 128 and 1,000 adapters
    python benchmarks/many_adapters.py --numbers 1,16 --requests 64

Prints `measurements`, as docs/results/*.json hold them. LoRA of rank 8 on q and v; prompts of 64
tokens, 32 new ones; 16 requests are in flight, a new one comes as one ends; the adapter of rank k
is asked for 1/k as often as the first. --uneven: 8 to 56 new tokens, so that answers end one by one
and each step may have other rows of other adapters. Cold: nothing is in memory at first. Warm: the
same requests once more. `first token`: from the request's coming.
"""

import argparse
import gc
import json
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from swap import resident_bytes

import veneer
from veneer.adapters.config import LoRA
from veneer.base import Base
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.sequence import Request
from veneer.decoding.schedule.sequence import Sequence as Answer
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library
from veneer.library.residents.residents import Residents

PROMPT, NEW, FLIGHT, RANK = 64, 32, 16, 8
UNEVEN = 8, 56


def make_library(folder: Path, base: Base, number: int) -> Library:
    library = Library(folder / "library")
    made = base.attach(LoRA(rank=RANK, targets=["q_proj", "v_proj"]), name="made", seed=0)
    manifest = manifest_for(base, method="lora")
    for each in range(number):
        draw = torch.Generator().manual_seed(each)
        for parameter in made.parameters().values():
            parameter.data.normal_(std=0.01, generator=draw)
        write_adapter(folder / "written", made, manifest, model=base.model, replace=True)
        library.add(folder / "written", name=f"a{each}")
    base.detach("made")
    return library


def asked_for(number: int, requests: int) -> list[int]:
    weights = [1 / (1 + each) for each in range(number)]
    return random.Random(0).choices(range(number), weights, k=requests)


def in_flight(engine: Engine, requests: list[Request], flight: int) -> tuple[float, list[float]]:
    """Seconds of all, and how long each waited for its first token, in the order in which these
    came."""
    waiting, came, first = list(reversed(requests)), {}, {}
    flying: list[Answer] = []
    start = time.perf_counter()
    while waiting or flying:
        while waiting and len(flying) < flight:
            (answer,) = engine.add(waiting.pop())
            came[answer.number], flying = time.perf_counter(), [*flying, answer]
        engine.step(0.0)
        now = time.perf_counter()
        for answer in flying:
            if answer.new:
                first.setdefault(answer.number, now - came[answer.number])
            if answer.error is not None:
                raise answer.error
        flying = [answer for answer in flying if answer.reason is None]
        if flying and not engine.scheduler.running:
            time.sleep(0.001)  # adapters are on their way
    return time.perf_counter() - start, list(first.values())


def answered(engine: Engine, requests: list[Request]) -> dict[str, float]:
    seconds, waits = in_flight(engine, requests, FLIGHT)
    waits.sort()
    return {
        "tokens/s": round(sum(request.max_new_tokens for request in requests) / seconds, 1),
        "first token, median ms": round(1e3 * statistics.median(waits), 1),
        "first token, 95 of 100 within ms": round(1e3 * waits[int(0.95 * (len(waits) - 1))], 1),
    }


def requests_for(identities: list[Any], uneven: bool = False) -> list[Request]:
    draw = torch.Generator().manual_seed(1)
    prompts = torch.randint(100, 40000, (len(identities), PROMPT), generator=draw).tolist()
    lengths = random.Random(3)
    return [
        Request(
            prompt=tuple(prompt),
            max_new_tokens=lengths.randint(*UNEVEN) if uneven else NEW,
            adapter=identity,
        )
        for prompt, identity in zip(prompts, identities, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--numbers", default="1,16,128,1000")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--budget-mb", type=int, default=64)
    parser.add_argument("--uneven", action="store_true")
    asked = parser.parse_args()
    base = veneer.load(asked.base)
    _ = base.paths
    room = 2 * FLIGHT * (PROMPT + NEW + 16) * bytes_per_token(base)
    new = "{} to {}".format(*UNEVEN) if asked.uneven else f"{NEW}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        numbers = [int(each) for each in asked.numbers.split(",")]
        library = make_library(Path(folder), base, max(numbers))
        bare = Engine(base, budget_bytes=room, adapters=FixedAdapters({}))
        answered(bare, requests_for([()] * FLIGHT))
        found["the base alone, no library"] = answered(
            bare, requests_for([()] * asked.requests, asked.uneven)
        )
        for number in numbers:
            residents = Residents(base, library, budget_bytes=asked.budget_mb * 2**20)
            engine = Engine(base, budget_bytes=room, adapters=residents.tiers)
            names = asked_for(number, asked.requests)
            identities = [residents.resolve(f"a{each}") for each in names]
            own: dict[str, Any] = {"adapters asked for": len(set(names))}
            for way in ("cold", "warm"):
                own[way] = answered(engine, requests_for(identities, asked.uneven))
            own["adapters in memory, MB"] = round(residents.tiers.used_bytes() / 2**20, 1)
            own["process, MB"] = round(resident_bytes() / 2**20)
            if number == max(numbers):
                found["the base alone, beside these"] = answered(
                    engine, requests_for([()] * asked.requests, asked.uneven)
                )
            found[f"{number} adapters"] = own
            for attached in list(base.attachments):
                base.detach(attached)
            del engine, residents
            gc.collect()
    print(
        json.dumps(
            {
                "measurements": [
                    {
                        "what": (
                            f"answers of adapters by a power law: {asked.base}, LoRA of rank {RANK}"
                            f" on q and v, {FLIGHT} requests in flight, {PROMPT} tokens read and"
                            f" {new} new ones, {asked.budget_mb} MB for adapters"
                        ),
                        "machine": (
                            f"{platform.processor() or platform.machine()}; torch"
                            f" {torch.__version__}"
                        ),
                        "commit": commit.stdout.strip(),
                        "command": shlex.join(["python", *sys.argv]),
                        "values": {
                            "threads": torch.get_num_threads(),
                            "dtype": str(base.dtype),
                            **found,
                        },
                    }
                ]
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
