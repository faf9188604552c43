"""What the routes share: one base, its names, the thread that computes, and how a request becomes answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from veneer.bases.stop_tokens import stop_token_ids
from veneer.decoding.engine import Engine
from veneer.decoding.sampling import Constraint
from veneer.errors import UnknownNameError, VeneerError
from veneer.library.resident import Tier
from veneer.library.residents import Residents
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.serve.answering import Answering, requests_of
from veneer.serve.asked import Asked, Shape
from veneer.serve.loop import EngineLoop
from veneer.serve.metrics import Metrics, state_of
from veneer.serve.names import Model, Names
from veneer.serve.prompts import Prompts
from veneer.serve.refusals import Refusal, refusal_of, unknown_adapter
from veneer.serve.token_text import TokenTexts

Constraints = Callable[[], Constraint]
MOST_LABELS = 1024
"""Adapters whose names metrics remember."""


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """body_bytes     of a request
    seconds        from its arrival to its end
    drain_seconds  for requests that are open when the server is to end
    load_seconds   for an adapter that is to be loaded or pinned
    """

    body_bytes: int = 4 * 2**20
    seconds: float = 600.0
    drain_seconds: float = 30.0
    load_seconds: float = 60.0


class Service:
    """shapes: makes of a Shape what allows each token; None: no shapes are answered."""

    def __init__(
        self,
        base: FrozenBase,
        engine: Engine,
        names: Names,
        residents: Residents,
        *,
        limits: ServeLimits | None = None,
        shapes: Callable[[Shape], Constraints] | None = None,
        routes: Sequence[str] = (),
    ) -> None:
        capacity = capacity_of(base)
        self.names, self.residents, self.limits = names, residents, limits or ServeLimits()
        self.prompts = Prompts(base.tokenizer, positions=capacity.positions, ids=capacity.tokens)
        self.texts = TokenTexts(base.tokenizer)
        self.loop = EngineLoop(engine)
        self.metrics = Metrics(names.base_name, routes)
        self._stops = stop_token_ids(base.tokenizer, base.model.generation_config)
        self._weights = base.fingerprint().weights_hash[:8]
        self.cache_tokens, self.cache_bytes = engine.scheduler.blocks.capacity, engine.scheduler.blocks.budget_bytes
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
        for name, content in found.adapters:
            self._labels.pop(content, None)
            self._labels[content] = name
        while len(self._labels) > MOST_LABELS:
            del self._labels[next(iter(self._labels))]

    async def begin(self, asked: Asked, caller: str) -> tuple[Model, Answering]:
        """The answers, which wait once their block is entered. Refusal: before anything waits."""
        model = await self.model(asked.model, asked.adapters)
        prompts = await self.prompts.encoded(asked.prompts)
        lengths = [self.prompts.most_new(ids, asked.max_new_tokens, self.cache_tokens) for ids in prompts]
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

    async def load(self, reference: str) -> None:
        """The adapter is in memory and fits, or Refusal."""
        await self._told(lambda: self.residents.load(reference, seconds=self.limits.load_seconds), "lora_path")

    async def pin(self, name: str, *, pinned: bool) -> None:
        """Into memory to stay, or not to. Refusal."""
        reference = self.names.reference(name)
        change = partial(self.residents.pin, seconds=self.limits.load_seconds) if pinned else self.residents.unpin
        await self._told(lambda: change(reference), "name")

    async def _told(self, function: Callable[[], object], param: str) -> None:
        try:
            await asyncio.to_thread(function)
        except UnknownNameError as fault:
            raise unknown_adapter(fault, param) from None
        except VeneerError as fault:
            raise refusal_of(fault, param=param) from None

    async def metrics_text(self) -> str:
        state = await self.loop.ask(state_of)
        return self.metrics.text(state, self._labels, self._gauges())

    def _gauges(self) -> dict[str, float]:
        tiers = Counter(each.tier for each in self.residents.shown())
        counts = {f"adapters_{tier.value}": tiers[tier] for tier in (Tier.READY, Tier.LOADING, Tier.FAILED)}
        used, budget = self.residents.used_bytes(), self.residents.budget_bytes
        return {"engine_steps": self.loop.steps, "adapter_bytes": used, "adapter_budget_bytes": budget, **counts}

    async def close(self) -> None:
        await self.loop.close(self.limits.drain_seconds)
        self.prompts.close()
