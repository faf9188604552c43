"""What the routes share: one base, its names, the thread that computes, and how a request becomes answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from veneer.bases.stop_tokens import stop_token_ids
from veneer.decoding.engine import Engine
from veneer.decoding.sampling import Constraint
from veneer.decoding.sequence import Request
from veneer.errors import VeneerError
from veneer.library.library import Entry
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.serve.answering import Answering, requests_of
from veneer.serve.asked import Asked, Shape
from veneer.serve.loop import EngineLoop
from veneer.serve.metrics import Metrics, state_of
from veneer.serve.names import Model, Names
from veneer.serve.prompts import Prompts
from veneer.serve.refusals import Refusal, refusal_of
from veneer.serve.token_text import TokenTexts

Constraints = Callable[[], Constraint]


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """body_bytes     of a request
    seconds        from its arrival to its end
    drain_seconds  for requests that are open when the server is to end
    """

    body_bytes: int = 4 * 2**20
    seconds: float = 600.0
    drain_seconds: float = 30.0


class Service:
    """shapes: makes of a Shape what allows each token; None: no shapes are answered."""

    def __init__(
        self,
        base: FrozenBase,
        engine: Engine,
        names: Names,
        *,
        limits: ServeLimits | None = None,
        shapes: Callable[[Shape], Constraints] | None = None,
        routes: Sequence[str] = (),
    ) -> None:
        capacity = capacity_of(base)
        self.names, self.limits = names, limits or ServeLimits()
        self.prompts = Prompts(base.tokenizer, positions=capacity.positions, ids=capacity.tokens)
        self.texts = TokenTexts(base.tokenizer)
        self.loop = EngineLoop(engine)
        self.metrics = Metrics(names.base_name, routes)
        self._stops = stop_token_ids(base.tokenizer, base.model.generation_config)
        self._weights = base.fingerprint().weights_hash[:8]
        self._room = engine.scheduler.blocks.capacity
        self._shapes = shapes
        self._labels: dict[str, str] = {}

    def fingerprint(self, model: Model) -> str:
        return f"vn-{self._weights}-{model.content}"

    async def model(self, name: str, weighted: tuple[tuple[str, float], ...] = ()) -> Model:
        """Refusal: 404, or why its adapter cannot act."""
        try:
            found = await asyncio.to_thread(self.names.model, name, weighted)
        except VeneerError as fault:
            raise refusal_of(fault, param="model") from None
        self._label(found)
        return found

    def _label(self, found: Model) -> None:
        """What metrics call its contents."""
        for content, _ in found.identity:
            if found.entry is not None:
                self._labels[content] = found.entry.name

    async def begin(self, asked: Asked, caller: str) -> tuple[Model, Answering]:
        """The answers, which wait once their block is entered. Refusal: before anything waits."""
        model = await self.model(asked.model, asked.adapters)
        prompts = await self.prompts.encoded(asked.prompts)
        lengths = [self.prompts.most_new(ids, asked.max_new_tokens, self._room) for ids in prompts]
        constraints = await self._constraints(asked)
        try:
            requests = requests_of(
                asked,
                prompts,
                lengths,
                adapter=model.identity,
                stops=self._stops,
                tokenizer=self.texts.tokenizer,
                constraints=constraints,
                salt=f"{caller}|{asked.salt}",
                now=self.loop.clock(),
                seconds=self.limits.seconds,
            )
        except VeneerError as fault:
            raise refusal_of(fault) from None
        if asked.min_new_tokens and asked.stops:
            raise Refusal(
                400, "min_tokens: is not for requests with stop strings: a string may lie across.", "min_tokens"
            )
        self.metrics.prompt(sum(map(len, prompts)))
        answering = Answering(self.loop, requests, asked, self.texts)
        answering.style = self.prompts.style if asked.parses_calls else None
        return model, answering

    async def _constraints(self, asked: Asked) -> Constraints | None:
        if asked.shape is None:
            return None
        if self._shapes is None:
            raise Refusal(
                400, f"{asked.shape.param}: is not supported: answers are not held to a shape.", asked.shape.param
            )
        try:
            return await asyncio.to_thread(self._shapes, asked.shape)
        except VeneerError as fault:
            raise refusal_of(fault, param=asked.shape.param) from None

    async def load(self, name: str, entry: Entry) -> None:
        """The adapter is in memory and fits, or Refusal: a token is drawn with it."""
        try:
            model = await asyncio.to_thread(self.names.of_entry, name, entry)
        except VeneerError as fault:
            raise refusal_of(fault, param="lora_path") from None
        self._label(model)
        now = self.loop.clock()
        request = Request(
            prompt=(0,), max_new_tokens=1, adapter=model.identity, arrival=now, deadline=now + self.limits.seconds
        )
        answering = Answering(self.loop, [request], Asked(model="", prompts=()), self.texts)
        async with answering:
            async for _ in answering.pieces():
                pass

    async def metrics_text(self) -> str:
        state = await self.loop.ask(state_of)
        return self.metrics.text(state, self._labels, {"engine_steps": self.loop.steps})

    async def close(self) -> None:
        await self.loop.close(self.limits.drain_seconds)
        self.prompts.close()
