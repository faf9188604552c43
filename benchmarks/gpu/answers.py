"""Answers of a random model by the project's own engine: a step as a graph, and launched call by
call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from steps import METHOD, TINY, random_model
from transformers import PreTrainedModel

from veneer.adapters.attach import attach
from veneer.bases.identity.fingerprint import fingerprint
from veneer.decoding import forward
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import Request, Sequence
from veneer.execution.cuda_graphs import WORTH
from veneer.models.frozen_base import FrozenBase


class Answers:
    """adapters: LoRAs, in turn, beside the base."""

    def __init__(self, model: PreTrainedModel, *, adapters: int = 0) -> None:
        known = fingerprint(
            random_model(TINY, torch.float32, torch.device("cpu"))
        )  # its own takes minutes to hash
        nothing: Any = None
        self.base = FrozenBase(model, nothing, "random", "random", identity=known)
        assert self.base.paths.packed, self.base.paths
        head = model.get_output_embeddings()
        for number in range(adapters):
            made = attach(
                model, METHOD, name=str(number), routing=self.base.routing, head=head, seed=number
            )
            for value in made.parameters().values():
                value.data.normal_(0, 0.01)
        names = [((str(number), 1.0),) for number in range(adapters)]
        self.applied: dict[Any, Any] = {name: self.base.routing.applied(name) for name in names}

    def compared(
        self, *, rows: int, prompt: int, steps: int, wait: Callable[[], None]
    ) -> dict[str, Any]:
        """Of steps that give each of `rows` answers a token, behind prompts of so many tokens."""
        graphs = self._timed(rows, prompt, steps, wait)
        with patch.object(forward, "recorder_here", lambda: None):
            launched = self._timed(rows, prompt, steps, wait)
        pairs = [a == b for a, b in zip(graphs.pop("tokens"), launched.pop("tokens"), strict=True)]
        return {
            "graphs": graphs,
            "launched": launched,
            "answers_alike": sum(pairs),
            "answers": rows,
        }

    def _timed(
        self, rows: int, prompt: int, steps: int, wait: Callable[[], None]
    ) -> dict[str, Any]:
        room = rows * (prompt + steps + 64) + 64
        limits = Limits(rows=rows, step_tokens=2048, chunk_tokens=512)
        adapters = FixedAdapters(self.applied)
        engine = Engine(
            self.base,
            budget_bytes=room * bytes_per_token(self.base),
            adapters=adapters,
            limits=limits,
        )
        vocabulary, names = self.base.model.config.vocab_size, [(), *self.applied]
        draw = torch.Generator().manual_seed(0)
        answers: list[Sequence] = []
        for number in range(rows):
            ids = torch.randint(2, vocabulary, (prompt,), generator=draw).tolist()
            asked = Request(
                prompt=tuple(ids), max_new_tokens=steps + 32, adapter=names[number % len(names)]
            )
            answers += engine.add(asked)
        while not all(answer.new for answer in answers):
            engine.step(0.0)
        for _ in range(WORTH + 2):
            engine.step(0.0)
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            engine.step(0.0)
        wait()
        seconds = time.perf_counter() - start
        own = engine.lanes.exact.forward.graphs
        return {
            "tokens": [answer.new[:steps] for answer in answers],
            "tokens_per_second": rows * steps / seconds,
            "milliseconds_a_step": 1000 * seconds / steps,
            "graphs": None if own is None else len(own.kept),
            "refused": [] if own is None else sorted(set(own.refused.values())),
        }
