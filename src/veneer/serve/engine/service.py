"""The service behind all routes: one base, its model names, the engine's thread, and how a request
becomes answers."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from veneer.adapters.labels import HeadKind
from veneer.adapters.placement.acting import score_head_of
from veneer.adapters.preamble import NONE, Preamble
from veneer.bases.stop_tokens import stop_token_ids
from veneer.data.batching import used_length
from veneer.decoding.engine import Engine
from veneer.decoding.sampling.grammar import Grammar, Grammars
from veneer.errors import RefusedError, UnknownNameError, VeneerError, hide_path
from veneer.jobs.suspension import trainer_suspended
from veneer.library.residents.resident import Tier
from veneer.library.residents.residents import Residents
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.serve.engine.chooser import Chooser
from veneer.serve.engine.classifier import Classifier
from veneer.serve.engine.fine_tuning import FineTuning
from veneer.serve.engine.generation import Generation, engine_requests, refuse_many_answers
from veneer.serve.engine.grammars import ShapeGrammars
from veneer.serve.engine.loop import EngineLoop
from veneer.serve.engine.metrics import Metrics, engine_state, joined
from veneer.serve.engine.names import AUTO, ModelNames, ServedModel
from veneer.serve.engine.prompts import Prompts
from veneer.serve.engine.token_text import TokenTexts
from veneer.serve.limits import BODY_BYTES
from veneer.serve.protocols.answers import AdapterChoice
from veneer.serve.protocols.classification import TextScores
from veneer.serve.protocols.request import GenerationRequest, Prompt
from veneer.serve.refusals import Refusal, out_of_time, refusal_of, refusing, unknown_adapter
from veneer.serve.runs import Runs

T = TypeVar("T")
TEXTS_AT_ONCE = 8
"""Texts of an adapter that are read at the same time, for model auto."""
MOST_LABELS = 1024
"""Most adapters whose names the metrics remember."""


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """Limits of requests.

    body_bytes     largest body
    seconds        from a request's arrival to its end
    drain_seconds  time for open requests once the server is told to end
    load_seconds   time for an adapter to be loaded or pinned
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
        fine_tuning: FineTuning | None = None,
        auto: bool = False,
    ) -> None:
        """asked_as: changes the preamble that an adapter was trained with into the one to use.
        fine_tuning: None if this server does not train. auto: requests may leave the choice of an
        adapter to the server."""
        capacity = capacity_of(base)
        self.runs, self.fine_tuning = runs or Runs(None), fine_tuning
        self.names, self.residents, self.limits = names, residents, limits or ServeLimits()
        self.prompts = Prompts(
            base.tokenizer, positions=engine.scheduler.positions, ids=capacity.tokens
        )
        self._asked_as = asked_as
        # A template that does not read its variables fails here, before any request.
        self.prompts.template.telling(asked_as(NONE).variables)
        self.texts = TokenTexts(base.tokenizer)
        self.loop = EngineLoop(engine)
        bounds = engine.scheduler.limits
        self.classifier = Classifier(
            base, self.loop, step_tokens=bounds.step_tokens, max_waiting=bounds.max_waiting
        )
        self.metrics = Metrics(names.base_name, routes)
        self._stops = stop_token_ids(base.tokenizer, base.model.generation_config)
        self._base_digest = base.fingerprint().digest[:8]
        self._max_positions = engine.scheduler.max_positions
        blocks = engine.scheduler.blocks
        self.cache_tokens, self.cache_bytes = blocks.capacity, blocks.budget_bytes
        stops, rows = self._stops, capacity.tokens or len(base.tokenizer)
        grammars = partial(Grammars, self.prompts.tokenizer, rows=rows, stops=stops)
        self._shapes = ShapeGrammars(grammars, self.prompts.style)
        folders = {residents.library.folder: "the library", self.runs.folder: "the folder of runs"}
        if fine_tuning is not None:
            folders[fine_tuning.store.folder] = "the folder of jobs"
        folders |= {Path(path): names.base_name for path in (base.source, base.name_or_path)}
        absolute = [
            (str(folder), name)
            for folder, name in folders.items()
            if folder and folder.is_absolute()
        ]
        # The innermost block of _hide_folders acts first: that of the longest path.
        self._folders = sorted(absolute, key=lambda pair: len(pair[0]))
        self._labels: dict[str, str] = {}
        self._files = ThreadPoolExecutor(4, thread_name_prefix="veneer-files")
        self._loads = ThreadPoolExecutor(4, thread_name_prefix="veneer-loads")  # may wait for room
        self._reports = ThreadPoolExecutor(1, thread_name_prefix="veneer-reports")
        self._jobs = ThreadPoolExecutor(4, thread_name_prefix="veneer-jobs")
        self.chooser = None
        if auto:
            names.reserve_auto()
            self.chooser = Chooser(
                base,
                names,
                residents,
                self.prompts,
                self.loop,
                preamble=asked_as(NONE),
                at_once=min(TEXTS_AT_ONCE, bounds.max_waiting),
                read_files=self.read_files,
            )

    def fingerprint(self, model: ServedModel) -> str:
        return f"vn-{self._base_digest}-{model.content}"

    async def read_files(self, function: Callable[[], T]) -> T:
        """Runs a function that reads files, beside the event loop. No error names a folder of the
        server."""
        return await self._run(self._files, function)

    async def report(self, function: Callable[[], T]) -> T:
        """Runs a function that reads whole adapters, one at a time, so that no request waits for
        it."""
        return await self._run(self._reports, function)

    async def use_jobs(self, function: Callable[[], T]) -> T:
        """Runs a function that reads or writes jobs and uploaded files. It may take minutes, so it
        has threads of its own."""
        return await self._run(self._jobs, function)

    def trainer_suspended(self) -> AbstractContextManager[None]:
        """Suspends the trainer of a job within the block, if this server trains."""
        if self.fine_tuning is None:
            return nullcontext()
        return trainer_suspended(self.fine_tuning.store.folder)

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        def run() -> T:
            with self._hide_folders():
                return function()

        return await asyncio.get_running_loop().run_in_executor(threads, run)

    @contextmanager
    def _hide_folders(self) -> Iterator[None]:
        """Replaces folders in the errors of the block by names: the library, the base, the folder
        of runs.

        Use it within `refusing`, which turns an error into the sentence that a client reads.
        """
        with ExitStack() as blocks:
            for folder, name in self._folders:
                blocks.enter_context(hide_path(folder, name))
            yield

    async def model(self, name: str, weighted: tuple[tuple[str, float], ...] = ()) -> ServedModel:
        """Finds the model of a request. Refusal: 404, or why its adapter cannot be used."""
        with refusing("model"):
            model = await self.read_files(lambda: self.names.model(name, weighted))
        self._label(model)
        return model

    def _label(self, model: ServedModel) -> None:
        """Remembers the names of the model's adapters for the metrics."""
        for name, content in model.adapters:
            self._labels.pop(content, None)
            self._labels[content] = name
        while len(self._labels) > MOST_LABELS:
            del self._labels[next(iter(self._labels))]

    async def ids(self, prompts: Sequence[Prompt], model: ServedModel) -> list[list[int]]:
        """Encodes prompts with the preamble that the model was trained with. Refusal."""
        with refusing("model"):
            preamble = await self.read_files(lambda: self.residents.preamble(model.identity))
        return await self.prompts.encoded(prompts, self._asked_as(preamble))

    async def choose(
        self, request: GenerationRequest, key_digest: str
    ) -> tuple[GenerationRequest, AdapterChoice | None]:
        """Replaces `model: auto` in a request by the model that is chosen for it; returns None with
        any other request. Refusal."""
        if self.chooser is None or request.model != AUTO:
            return request, None
        salt, seconds = _salt(key_digest, request), self.limits.seconds
        with out_of_time():
            async with asyncio.timeout(seconds):
                choice = await self.chooser.choose(request, salt=salt, seconds=seconds)
        return replace(request, model=choice.adapter or self.names.base_name), choice

    async def begin(
        self, request: GenerationRequest, key_digest: str
    ) -> tuple[ServedModel, Generation]:
        """Prepares the generation, which is queued once its block is entered. Refusal."""
        refuse_many_answers(request, self.loop.most_waiting)
        if request.model == self.names.base_name and not request.adapters:
            served = self._read_model(request)  # reads no file
        else:
            served = await self.read_files(lambda: self._read_model(request))
        model, preamble, prefix, invocation = served
        self._label(model)
        places = self._max_positions(prefix, prompt_only=request.prompt_only)
        prompts = await self.prompts.encoded(
            request.prompts, self._asked_as(preamble), places=places, prefix_length=prefix
        )
        texts = self.texts
        if preamble.tokens:
            texts = await self.read_files(lambda: self.texts.with_tokens(preamble.tokens))
        lengths = [
            self.prompts.most_new(ids, request.max_new_tokens, places, prefix) for ids in prompts
        ]
        grammar = await self._grammar(request)
        with refusing():
            requests = engine_requests(
                request,
                prompts,
                lengths,
                adapter=model.identity,
                invocation=invocation,
                stops=self._stops,
                tokenizer=texts.tokenizer,
                constraints=grammar,
                salt=_salt(key_digest, request),
                now=self.loop.clock(),
                seconds=self.limits.seconds,
            )
        if request.min_new_tokens and request.stops:
            raise Refusal(
                400,
                "min_tokens: cannot be used with stop strings, which may begin before that token.",
                "min_tokens",
            )
        self.metrics.count_prompt(sum(map(len, prompts)))
        generation = Generation(self.loop, requests, request, texts, grammar)
        generation.style = self.prompts.style if request.tools else None
        return model, generation

    def _read_model(
        self, request: GenerationRequest
    ) -> tuple[ServedModel, Preamble, int, tuple[int, ...]]:
        """Reads the model, its preamble, the length of its prefix and the token ids from which on
        its adapter acts from files.

        Refusal: 404, or why its adapter cannot be used.
        """
        with refusing("model"), self._hide_folders():
            model = self.names.model(request.model, request.adapters)
            preamble = self.residents.preamble(model.identity)
        with refusing("adapters"), self._hide_folders():
            try:
                prefix = self.residents.prefix_length(model.identity)
            except RefusedError as fault:  # the adapter is sound: the request is for another one
                raise replace(refusal_of(fault, param="model"), status=400) from None
            return model, preamble, prefix, self.residents.invocation(model.identity)

    async def score_texts(
        self, name: str, texts: Sequence[str], param: str, *, kind: HeadKind | None = None
    ) -> TextScores:
        """Computes the score head of an adapter for texts.

        param: the field of the texts. kind: of the head that is needed; None: any. Refusal: 400 for
        an adapter without such a head and for texts that are too long, 408 out of time.
        """
        with out_of_time(), self.trainer_suspended():
            async with asyncio.timeout(self.limits.seconds):
                return await self._score_texts(name, texts, param, kind)

    async def _score_texts(
        self, name: str, texts: Sequence[str], param: str, kind: HeadKind | None
    ) -> TextScores:
        model = await self.model(name)
        identity, tiers = model.identity, self.residents.tiers

        def read() -> tuple[Preamble, int]:
            preamble = self.residents.preamble(identity)
            return preamble, self.residents.head_prefix_length(identity)

        with refusing("model"):
            preamble, prefix = await self.read_files(read)
        examples = await self.prompts.examples(texts, preamble, prefix, param)
        seconds = self.limits.load_seconds
        with refusing("model"):
            while not tiers.hold_ready(identity):
                await self._run(self._loads, lambda: tiers.wait(identity, seconds))
            try:
                applied = tiers.applied(identity)
                head = score_head_of(applied)
                assert head is not None, "the adapter's files have a head"
                if kind not in (None, head.settings.kind):
                    raise Refusal(
                        400,
                        f"model: the head of {name[:80]!r} is of kind {head.settings.kind}, and"
                        f" this path needs kind {kind}. Use /v1/classify.",
                        "model",
                    )
                outputs = await self.classifier.outputs(applied, examples)
            finally:
                tiers.release(identity)
        tokens = sum(map(used_length, examples))
        self.metrics.count_prompt(tokens)
        return TextScores(head.settings, outputs, tokens)

    async def _grammar(self, request: GenerationRequest) -> Grammar | None:
        """Compiles the shape of the answers. Refusal: it cannot be followed."""
        if (shape := request.shape) is None:
            return None
        with refusing(shape.param):
            return await self.read_files(lambda: self._shapes(shape))

    async def load(self, reference: str) -> None:
        """Loads an adapter into memory. Refusal: it does not fit."""
        await self._load(
            lambda: self.residents.load(reference, seconds=self.limits.load_seconds), "lora_path"
        )

    async def pin(self, name: str, *, pinned: bool) -> None:
        """Keeps an adapter in memory, or lets it go. Refusal."""
        reference = await self.read_files(lambda: self.names.reference(name))
        change = (
            partial(self.residents.pin, seconds=self.limits.load_seconds)
            if pinned
            else self.residents.unpin
        )
        await self._load(lambda: change(reference), "name")

    async def _load(self, function: Callable[[], object], param: str) -> None:
        try:
            await self._run(self._loads, function)
        except UnknownNameError as fault:
            raise unknown_adapter(fault, param) from None
        except VeneerError as fault:
            raise refusal_of(fault, param=param) from None

    async def metrics_text(self) -> str:
        state = await self.loop.run_between_steps(engine_state)
        return joined(self.metrics.lines(state, self._labels, self._in_memory(), self._gauges()))

    def _in_memory(self) -> Counter[str]:
        """Returns the bytes of adapters by name, the last used first; versions are summed."""
        sizes: Counter[str] = Counter()
        for adapter in self.residents.tiers.shown():
            if adapter.tier is Tier.READY:
                own_name = self.names.listed_name(adapter.reference.partition("@")[0])
                name = self._labels.get(adapter.content, own_name)
                sizes[name] += adapter.bytes
        return sizes

    def _gauges(self) -> dict[str, float]:
        tiers = Counter(adapter.tier for adapter in self.residents.tiers.shown())
        counts = {
            f"adapters_{tier.value}": tiers[tier]
            for tier in (Tier.READY, Tier.LOADING, Tier.FAILED)
        }
        used, budget = self.residents.tiers.used_bytes(), self.residents.tiers.budget_bytes
        return {
            "engine_steps": self.loop.steps,
            "adapter_bytes": used,
            "adapter_budget_bytes": budget,
            **counts,
        }

    async def close(self) -> None:
        """Ends open requests at once; the server has waited for them already (run.py)."""
        await self.loop.close(0.0)
        self.prompts.close()
        for threads in (self._files, self._loads, self._reports, self._jobs):
            threads.shutdown(wait=False, cancel_futures=True)


def _salt(key_digest: str, request: GenerationRequest) -> str:
    """Returns the salt of cached prompts: API keys share none, whatever their names."""
    return f"{key_digest}|{request.salt}"
