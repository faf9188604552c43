"""What the routes share: one base, its names, the thread that computes, and how a request becomes
answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from veneer.adapters.preamble import NONE, Preamble
from veneer.bases.stop_tokens import stop_token_ids
from veneer.decoding.engine import Engine
from veneer.decoding.sampling.grammar import Grammar, Grammars
from veneer.errors import UnknownNameError, VeneerError, told_as
from veneer.library.residents.resident import Tier
from veneer.library.residents.residents import Residents
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.serve.engine.answering import Generation, requests_of
from veneer.serve.engine.loop import EngineLoop
from veneer.serve.engine.metrics import Metrics, state_of
from veneer.serve.engine.names import ModelNames, ServedModel
from veneer.serve.engine.prompts import Prompts
from veneer.serve.engine.token_text import TokenTexts
from veneer.serve.limits import BODY_BYTES
from veneer.serve.protocols.grammars import ShapeGrammars
from veneer.serve.protocols.request import GenerationRequest, Prompt
from veneer.serve.refusals import Refusal, refusal_of, refusing, unknown_adapter
from veneer.serve.runs import Runs

T = TypeVar("T")
MOST_LABELS = 1024
"""Adapters whose names metrics remember."""


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """body_bytes     of a request
    seconds        from its arrival to its end
    drain_seconds  for requests that are open when the server is to end
    load_seconds   for an adapter that is to be loaded or pinned
    """

    body_bytes: int = BODY_BYTES
    seconds: float = 600.0
    drain_seconds: float = 30.0
    load_seconds: float = 30.0


class Service:
    def __init__(
        self,
        base: FrozenBase,
        engine: Engine,
        names: ModelNames,
        residents: Residents,
        *,
        limits: ServeLimits | None = None,
        routes: Sequence[str] = (),
        asked_as: Callable[[Preamble], Preamble] = lambda trained: trained,
        runs: Runs | None = None,
    ) -> None:
        """asked_as: how an adapter's conversations are asked, from how it was trained."""
        capacity = capacity_of(base)
        self.runs = runs or Runs(None)
        self.names, self.residents, self.limits = names, residents, limits or ServeLimits()
        self.prompts = Prompts(
            base.tokenizer, positions=engine.scheduler.positions, ids=capacity.tokens
        )
        self._asked_as = asked_as
        self.prompts.template.telling(
            asked_as(NONE).variables
        )  # that it reads them shows before anybody asks
        self.texts = TokenTexts(base.tokenizer)
        self.loop = EngineLoop(engine)
        self.metrics = Metrics(names.base_name, routes)
        self._stops = stop_token_ids(base.tokenizer, base.model.generation_config)
        self._base_digest = base.fingerprint().digest[:8]
        self._most_places = engine.scheduler.most_places
        self.cache_tokens, self.cache_bytes = (
            engine.scheduler.blocks.capacity,
            engine.scheduler.blocks.budget_bytes,
        )
        stops, rows = self._stops, capacity.tokens or len(base.tokenizer)
        grammars = partial(Grammars, self.prompts.tokenizer, rows=rows, stops=stops)
        self._shapes = ShapeGrammars(grammars, self.prompts.style)
        folders = {residents.library.folder: "the library", self.runs.folder: "the folder of runs"}
        folders |= {Path(each): names.base_name for each in (base.source, base.name_or_path)}
        absolute = [
            (str(folder), name)
            for folder, name in folders.items()
            if folder and folder.is_absolute()
        ]
        self._folders = sorted(
            absolute, key=lambda pair: len(pair[0])
        )  # the innermost block acts first: the longest
        self._labels: dict[str, str] = {}
        self._files = ThreadPoolExecutor(4, thread_name_prefix="veneer-files")
        self._loads = ThreadPoolExecutor(
            4, thread_name_prefix="veneer-loads"
        )  # which wait for room
        self._looks = ThreadPoolExecutor(1, thread_name_prefix="veneer-looks")

    def fingerprint(self, model: ServedModel) -> str:
        return f"vn-{self._base_digest}-{model.content}"

    async def apart(self, function: Callable[[], T]) -> T:
        """Runs what reads files beside the event loop. No error says where the server's files
        lie."""
        return await asyncio.get_running_loop().run_in_executor(
            self._files, partial(self._without_folder, function)
        )

    async def look(self, function: Callable[[], T]) -> T:
        """Runs what reads whole adapters, one at a time, so that no request waits behind it."""
        return await asyncio.get_running_loop().run_in_executor(
            self._looks, partial(self._without_folder, function)
        )

    def _without_folder(self, function: Callable[[], T]) -> T:
        with self._without_folders():
            return function()

    @contextmanager
    def _without_folders(self) -> Iterator[None]:
        """Errors of the block name the library, the base and the folder of runs, and do not say
        where they lie.

        Stand it within `refusing`, which cuts an error into the sentence that a client reads.
        """
        with ExitStack() as blocks:
            for folder, name in self._folders:
                blocks.enter_context(told_as(folder, name))
            yield

    async def model(self, name: str, weighted: tuple[tuple[str, float], ...] = ()) -> ServedModel:
        """Refusal: 404, or why its adapter cannot act."""
        with refusing("model"):
            found = await self.apart(lambda: self.names.model(name, weighted))
        self._label(found)
        return found

    def _label(self, found: ServedModel) -> None:
        """What metrics call its contents."""
        for name, content in found.adapters:
            self._labels.pop(content, None)
            self._labels[content] = name
        while len(self._labels) > MOST_LABELS:
            del self._labels[next(iter(self._labels))]

    async def ids(self, prompts: Sequence[Prompt], model: ServedModel) -> list[list[int]]:
        """Of each prompt, asked as the model was trained. Refusal."""
        with refusing("model"):
            preamble = await self.apart(lambda: self.residents.preamble(model.identity))
        return await self.prompts.encoded(prompts, self._asked_as(preamble))

    async def begin(self, asked: GenerationRequest, caller: str) -> tuple[ServedModel, Generation]:
        """The answers, which wait once their block is entered. Refusal: before anything waits."""
        base = asked.model == self.names.base_name and not asked.adapters  # of which no file tells
        model, preamble, front = (
            self._known(asked) if base else await self.apart(lambda: self._known(asked))
        )
        self._label(model)
        prompts = await self.prompts.encoded(asked.prompts, self._asked_as(preamble))
        texts = (
            await self.apart(lambda: self.texts.having(preamble.tokens))
            if preamble.tokens
            else self.texts
        )
        places = self._most_places(front)
        lengths = [
            self.prompts.most_new(ids, asked.max_new_tokens, places, front) for ids in prompts
        ]
        grammar = await self._grammar(asked)
        with refusing():
            requests = requests_of(
                asked,
                prompts,
                lengths,
                adapter=model.identity,
                stops=self._stops,
                tokenizer=texts.tokenizer,
                constraints=grammar,
                salt=f"{caller}|{asked.salt}",
                now=self.loop.clock(),
                seconds=self.limits.seconds,
            )
        if asked.min_new_tokens and asked.stops:
            raise Refusal(
                400,
                "min_tokens: is not for requests with stop strings: a string may lie across.",
                "min_tokens",
            )
        self.metrics.prompt(sum(map(len, prompts)))
        answering = Generation(self.loop, requests, asked, texts, grammar)
        answering.style = self.prompts.style if asked.parses_calls else None
        return model, answering

    def _known(self, asked: GenerationRequest) -> tuple[ServedModel, Preamble, int]:
        """The model, how its conversations begin, places of its prefix: all that files say of it,
        read at one go.

        Refusal: 404, or why its adapter cannot act.
        """
        with refusing("model"), self._without_folders():
            model = self.names.model(asked.model, asked.adapters)
            preamble = self.residents.preamble(model.identity)
        with refusing("adapters"), self._without_folders():
            return model, preamble, self.residents.front_places(model.identity)

    async def _grammar(self, asked: GenerationRequest) -> Grammar | None:
        """What the answers follow. Refusal: it cannot be followed."""
        if (shape := asked.shape) is None:
            return None
        with refusing(shape.param):
            return await self.apart(lambda: self._shapes(shape))

    async def load(self, reference: str) -> None:
        """The adapter is in memory and fits, or Refusal."""
        await self._told(
            lambda: self.residents.load(reference, seconds=self.limits.load_seconds), "lora_path"
        )

    async def pin(self, name: str, *, pinned: bool) -> None:
        """Into memory to stay, or not to. Refusal."""
        reference = await self.apart(lambda: self.names.reference(name))
        change = (
            partial(self.residents.pin, seconds=self.limits.load_seconds)
            if pinned
            else self.residents.unpin
        )
        await self._told(lambda: change(reference), "name")

    async def _told(self, function: Callable[[], object], param: str) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(
                self._loads, partial(self._without_folder, function)
            )
        except UnknownNameError as fault:
            raise unknown_adapter(fault, param) from None
        except VeneerError as fault:
            raise refusal_of(fault, param=param) from None

    async def metrics_text(self) -> str:
        state = await self.loop.ask(state_of)
        return self.metrics.text(state, self._labels, self._in_memory(), self._gauges())

    def _in_memory(self) -> Counter[str]:
        """Bytes by name, the last used first; versions of one name together."""
        found: Counter[str] = Counter()
        for each in self.residents.shown():
            if each.tier is Tier.READY:
                found[self._labels.get(each.content, each.reference.partition("@")[0])] += (
                    each.bytes
                )
        return found

    def _gauges(self) -> dict[str, float]:
        tiers = Counter(each.tier for each in self.residents.shown())
        counts = {
            f"adapters_{tier.value}": tiers[tier]
            for tier in (Tier.READY, Tier.LOADING, Tier.FAILED)
        }
        used, budget = self.residents.used_bytes(), self.residents.budget_bytes
        return {
            "engine_steps": self.loop.steps,
            "adapter_bytes": used,
            "adapter_budget_bytes": budget,
            **counts,
        }

    async def close(self) -> None:
        """What is open ends at once: the server has waited for it (run.py)."""
        await self.loop.close(0.0)
        self.prompts.close()
        for threads in (self._files, self._loads, self._looks):
            threads.shutdown(wait=False, cancel_futures=True)
