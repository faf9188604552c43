"""Computes the score heads of requests, on the engine's thread between its steps.

Waiting requests take turns, text by text. Each forward has texts of all of them, as many as a step
of the engine has tokens, whatever their adapters are; the base's products are computed once for
all. Nothing is generated, and no keys and values are kept.
Shapes: N texts of a request, C outputs of its head.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from veneer.adapters.placement.acting import Applied
from veneer.data.batching import used_length
from veneer.data.examples import Example
from veneer.errors import QueueFullError, is_out_of_memory
from veneer.models.frozen_base import FrozenBase
from veneer.models.score_heads import score_texts
from veneer.models.scores import ScoreRequest
from veneer.serve.engine.loop import EngineLoop
from veneer.serve.refusals import Refusal

Outputs = NDArray[np.float64]


@dataclass(eq=False)
class _HeadRequest:
    """The texts of one request. begun: number of texts that are computed or being computed.
    computed: outputs by text. result: (N, C)."""

    adapters: Applied
    examples: Sequence[Example]
    result: asyncio.Future[Outputs]
    begun: int = 0
    computed: dict[int, Outputs] = field(default_factory=dict)

    def add(self, numbers: Sequence[int], outputs: Outputs) -> None:
        self.computed |= dict(zip(numbers, outputs, strict=True))
        if len(self.computed) == len(self.examples) and not self.result.done():
            rows = [self.computed[number] for number in range(len(self.examples))]
            self.result.set_result(np.stack(rows))

    def fail(self, fault: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(fault)


class Classifier:
    """The queue of requests for score heads, used on the event loop.

    step_tokens: tokens of a forward, unless a single text has more. max_waiting: requests that wait
    """

    def __init__(
        self, base: FrozenBase, loop: EngineLoop, *, step_tokens: int, max_waiting: int
    ) -> None:
        self.forwards = 0
        self._base, self._loop = base, loop
        self._step_tokens, self._max_waiting = step_tokens, max_waiting
        self._queue: deque[_HeadRequest] = deque()
        self._task: asyncio.Task[None] | None = None

    async def outputs(self, adapters: Applied, examples: Sequence[Example]) -> Outputs:
        """Returns the outputs of the adapters' head for each text, (N, C). The caller holds the
        adapters. QueueFullError: too many requests wait."""
        if len(self._queue) >= self._max_waiting:
            raise QueueFullError(len(self._queue), self._max_waiting)
        result: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        self._queue.append(_HeadRequest(adapters, examples, result))
        if self._task is None:
            self._task = asyncio.create_task(self._compute_queue())
        try:
            return await result
        finally:
            result.cancel()  # the client may have gone: its other texts are not computed

    async def _compute_queue(self) -> None:
        try:
            while texts := self._next_texts():
                await self._compute(texts)
        finally:
            self._task = None

    def _next_texts(self) -> dict[_HeadRequest, list[int]]:
        """Returns the texts of the next forward, as numbers by request; empty if none waits."""
        texts: dict[_HeadRequest, list[int]] = {}
        tokens = 0
        while self._queue:
            request = self._queue[0]
            if not request.result.done():
                length = used_length(request.examples[request.begun])
                if texts and tokens + length > self._step_tokens:
                    break
                tokens += length
                texts.setdefault(request, []).append(request.begun)
                request.begun += 1
                if request.begun < len(request.examples):
                    self._queue.append(request)
            self._queue.popleft()
        return texts

    async def _compute(self, texts: dict[_HeadRequest, list[int]]) -> None:
        """Computes one forward. If it fails, each request's texts are computed alone, and a request
        that fails again ends."""
        score_requests = [
            ScoreRequest(request.adapters, [request.examples[number] for number in numbers])
            for request, numbers in texts.items()
        ]
        try:
            outputs = await self._loop.run_between_steps(lambda _: self._score(score_requests))
        except Exception as fault:
            if len(texts) > 1:
                for request, numbers in texts.items():
                    await self._compute({request: numbers})
                return
            (failed,) = texts
            full = Refusal(503, "The server is out of memory.", code="out_of_memory")
            failed.fail(full if is_out_of_memory(fault) else fault)
            return
        for (request, numbers), values in zip(texts.items(), outputs, strict=True):
            request.add(numbers, values)

    def _score(self, requests: Sequence[ScoreRequest]) -> list[Outputs]:
        """Runs on the engine's thread."""
        base = self._base
        self.forwards += 1
        most_rows = max(len(request.examples) for request in requests)
        return score_texts(base, requests, batch_rows=most_rows)
