"""What a forward costs whose rows have adapters of their own, beside one adapter on all rows, and
beside none.

    python benchmarks/mixed_forward.py                       smollm2-135m, 16 adapters of rank 16
    python benchmarks/mixed_forward.py --adapters 4 --turns 5

Prints JSON, milliseconds (median and spread of --turns alternating turns): an answer's step of 16
rows, one token each; reading 512 tokens, 16 rows of 32; and the training step (forward and
backward) over the same.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import veneer
from tests.support.models.routed import acting_on, batch_loss
from veneer.adapters.config import LoRA
from veneer.adapters.placement.acting import Acting, TokenKeys, in_turn
from veneer.base import Base
from veneer.data.batching import make_groups
from veneer.data.examples import Example, RowRef
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import Request

TOKENS = 32


def mixes(base: Base, count: int, rows: int) -> dict[str, list[Acting]]:
    """What acts on `rows` rows of every group."""
    applied = [base.routing.applied(((f"a{n}", 1.0),)) for n in range(count)]
    return {
        "none": Acting(),
        "one": Acting.everywhere(applied[0]),
        "mixed": in_turn([(rows, each) for each in applied]),
    }


def asking(base: Base, prompts: list[list[int]], acting: Acting, new: int) -> Engine:
    """An engine with a request for each prompt, for whom these act."""
    of_prompt = [part.adapters for part in acting.parts] * (len(prompts) // len(acting.parts))
    names = [((str(number), 1.0),) if each else () for number, each in enumerate(of_prompt)]
    if acting.whole is not None:
        names = [names[0]] * len(prompts)
    engine = Engine(
        base,
        budget_bytes=len(prompts) * (TOKENS + new + 32) * bytes_per_token(base),
        adapters=FixedAdapters(
            {name: each for name, each in zip(names, of_prompt, strict=True) if name}
        ),
        limits=Limits(step_tokens=2048),
    )
    for name, prompt in zip(names, prompts, strict=True):
        engine.add(Request(prompt=tuple(prompt), max_new_tokens=new, adapter=name))
    return engine


def read(base: Base, prompts: list[list[int]], acting: Acting) -> None:
    asking(base, prompts, acting, 1).step(0.0)


def examples(count: int) -> list[list[Example]]:
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        trained = np.zeros(TOKENS + 1, dtype=bool)
        trained[TOKENS // 2 :] = True
        ids = draw.integers(100, 40000, TOKENS + 1).astype(np.int32)
        found.append([Example(ids, trained, RowRef("rows", number), number)])
    return found


def timed(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    plain = statistics.median(times["none"])
    return {
        name: {
            "ms": round(statistics.median(each), 2),
            "least": round(min(each), 2),
            "most": round(max(each), 2),
            "times none": round(statistics.median(each) / plain, 3),
        }
        for name, each in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--turns", type=int, default=15)
    asked = parser.parse_args()
    base = veneer.load(asked.base)
    paths, count = base.paths, asked.adapters
    parameters = []
    for number in range(count):
        made = base.attach(LoRA(rank=asked.rank), name=f"a{number}", seed=number)
        for parameter in made.parameters().values():
            parameter.data.normal_(std=0.01)
            parameters.append(parameter.requires_grad_(True))
    data = examples(count)
    prompts = [one.ids[:TOKENS].tolist() for (one,) in data]
    batch = make_groups(data, packed=paths.packed, share_prompt=False, device=base.device)

    answering: dict[str, Callable[[], object]] = {}
    reading: dict[str, Callable[[], object]] = {}
    training: dict[str, Callable[[], object]] = {}

    def train(acting: Acting) -> None:
        with base.routing.held(acting.drawing(TokenKeys(batch.dropout_rows, 0))):
            loss = batch_loss(base, batch, total=100.0)
            if loss.requires_grad:
                loss.backward()
        for parameter in parameters:
            parameter.grad = None

    for name, acting in mixes(base, count, TOKENS).items():
        of_groups = [part.adapters for part in acting.parts] * (count // len(acting.parts))
        engine = asking(base, prompts, acting, asked.turns + 8)
        engine.step(0.0)
        answering[name] = partial(engine.step, 0.0)
        reading[name] = partial(read, base, prompts, acting)
        training[name] = partial(train, acting_on(batch, of_groups))
    print(
        json.dumps(
            {
                "adapters": count,
                "rank": asked.rank,
                "dtype": str(base.dtype),
                "threads": torch.get_num_threads(),
                "an answer's step, one token a row": timed(answering, asked.turns),
                f"reading, {TOKENS} tokens a row": timed(reading, asked.turns),
                f"training step, {TOKENS} tokens a row": timed(training, max(3, asked.turns // 3)),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
