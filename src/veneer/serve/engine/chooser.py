"""Chooses the adapter that answers a request for `model: auto` (nearness.py).

The question is the last user message alone, or the text to continue. The base reads it as a
conversation of its own in the engine's forwards, which give its mean hidden state; if the base
answers and the conversation has no other message, its keys and values are used again. The texts of
an adapter, its note and the training prompts in the library, are read in the same way, once: their
means are kept in memory and in the cache folder.
"""

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import date
from itertools import takewhile
from typing import Any

import numpy as np
import torch

from veneer.adapters.preamble import Preamble
from veneer.decoding.prompt_states import PromptMean
from veneer.decoding.schedule.sequence import FinishReason, Request
from veneer.errors import InputError, VeneerError
from veneer.files.remembered import remember
from veneer.files.system_errors import explained
from veneer.library.entry import Entry
from veneer.library.names import TRIAL
from veneer.library.prompts import beginning, question_of
from veneer.library.residents.residents import Residents
from veneer.models.frozen_base import FrozenBase
from veneer.serve.engine.loop import EngineLoop, Inbox
from veneer.serve.engine.names import ModelNames
from veneer.serve.engine.nearness import GENERAL_QUESTIONS, NearnessSpace, States
from veneer.serve.engine.prompts import Prompts
from veneer.serve.limits import MOST_CANDIDATES, MOST_QUESTION_TOKENS
from veneer.serve.protocols.answers import AdapterChoice
from veneer.serve.protocols.request import ChatPrompt, GenerationRequest, Prompt, TextPrompt
from veneer.serve.refusals import OUT_OF_TIME, Refusal, refusal_of

log = logging.getLogger("veneer.serve")
Texts = tuple[str, ...]
Candidates = list[tuple[str, Texts]]
"""Names and texts of adapters."""
PROBES = ("a", "b")
"""Questions whose renderings differ only in the question."""
MOST_KEPT = 4 * MOST_CANDIDATES
"""Adapters whose texts are kept in memory; the oldest are removed."""


ReadFiles = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function that reads files, beside the event loop."""
_FAILURES = {
    FinishReason.CANCELLED: (503, "This request was ended."),
    FinishReason.DEADLINE: (408, OUT_OF_TIME),
}
"""Status and message by the reason for which a prompt was not read."""


class Chooser:
    """Chooses an adapter for each request; used on the event loop only.

    preamble: of the base's conversations. at_once: texts of an adapter that are read at the same
    time.
    """

    def __init__(
        self,
        base: FrozenBase,
        names: ModelNames,
        residents: Residents,
        prompts: Prompts,
        loop: EngineLoop,
        *,
        preamble: Preamble,
        at_once: int,
        read_files: ReadFiles,
    ) -> None:
        self._at_once = at_once
        self._names, self._residents, self._prompts = names, residents, prompts
        self._loop, self._preamble, self._read_files = loop, preamble, read_files
        self._base_key = {
            "base": base.fingerprint().to_dict(),
            "dtype": str(base.dtype),
            "device": base.device.type,
            "threads": torch.get_num_threads(),
            "tokenizer": base.tokenizer_hash(),
            "template": base.template_hash(),
            "preamble": [preamble.system, dict(preamble.variables)],
        }
        self._lock = asyncio.Lock()
        self._texts: dict[tuple[str, str, int], Texts] = {}  # by object, note, time of its prompts
        self._states: dict[tuple[str, Texts], States | None] = {}  # by day and texts
        self._edges: tuple[str, int, int] | None = None  # with the day
        self._space: tuple[str, Candidates, NearnessSpace] | None = None  # with the day

    async def choose(
        self, request: GenerationRequest, *, salt: str, seconds: float
    ) -> AdapterChoice:
        """Chooses an adapter for a request. Refusal: 400, it has several prompts or no question;
        or the base cannot read it."""
        question = await self._question(request)
        space = await self._compared()
        if space is None:
            return AdapterChoice(None, None)
        (mean,) = await self._means([self._prompt(question)], salt=salt, seconds=seconds)
        candidates, nearness = space
        nearest = nearness.nearest(mean)
        name = candidates[nearest.number][0] if nearest.margin >= 0 else None
        return AdapterChoice(name, nearest.margin)

    async def _question(self, request: GenerationRequest) -> str:
        """Returns the text by which an adapter is chosen. Refusal: 400."""
        if request.adapters:
            raise Refusal(400, "adapters: cannot be used with model auto.", "adapters")
        if len(request.prompts) != 1:
            message = "model: auto chooses for one prompt. Send each prompt by itself."
            raise Refusal(400, message, "model")
        (prompt,) = request.prompts
        if isinstance(prompt, ChatPrompt):
            question = question_of(prompt.messages)
        elif prompt.ids is not None:
            question = beginning(await self._prompts.text(prompt.ids[:MOST_QUESTION_TOKENS]))
        else:
            question = beginning(prompt.text or "")
        if not question:
            message = "model: auto chooses by a user's message, and there is none."
            raise Refusal(400, message, "model")
        return question

    async def prepare(self) -> None:
        """Reads the texts of all adapters ahead of the first request. Errors are logged."""
        try:
            await self._compared()
        except (Refusal, VeneerError) as fault:
            log.warning("model auto is not ready yet: %s", refusal_of(fault).message)

    async def _compared(self) -> tuple[Candidates, NearnessSpace] | None:
        """Returns the adapters that can be chosen, and the space that compares a question with
        them; None if there are none."""
        described = await self._read_files(self._read_described)
        if not described:
            return None
        async with self._lock:
            day = self._day
            keys = [(day, texts) for texts in (GENERAL_QUESTIONS, *(pair[1] for pair in described))]
            for key in keys:
                if key not in self._states:
                    self._states[key] = await self._find_states(*key)
            self._states = {key: self._states[key] for key in keys}  # drops removed adapters
            general, *means = (self._states[key] for key in keys)
            readable = [pair for pair in zip(described, means, strict=True) if pair[1] is not None]
            if general is None or not readable:
                return None
            candidates = [pair for pair, _ in readable]
            if self._space is None or self._space[:2] != (day, candidates):
                space = NearnessSpace(
                    [states for _, states in readable if states is not None], general
                )
                self._space = day, candidates, space
            return self._space[1:]

    @property
    def _day(self) -> str:
        """Returns the day if the template writes it, because renderings then depend on it."""
        return date.today().isoformat() if self._prompts.template.writes_date else ""

    # texts of adapters, beside the event loop

    def _read_described(self) -> Candidates:
        """Returns names and texts of the newest MOST_CANDIDATES adapters that have any."""
        entries = {
            entry.version.object: (name, entry)
            for name, entry in self._names.entries()
            if not name.startswith(TRIAL)
        }
        newest = sorted(entries.values(), key=lambda pair: pair[1].version.added, reverse=True)
        described = [
            (name, self._texts_of(name, entry)) for name, entry in newest[:MOST_CANDIDATES]
        ]
        return sorted((name, texts) for name, texts in described if texts)

    def _texts_of(self, name: str, entry: Entry) -> Texts:
        library, version = self._residents.library, entry.version
        file = library.prompts_file(version.object)
        texts: Texts = ()
        try:
            with explained(name, reading=True):
                time = file.stat().st_mtime_ns if file.is_file() else 0
                key = version.object, version.note, time
                if (known := self._texts.get(key)) is not None:
                    return known
                if self._residents.writes_answers(entry):
                    texts = (*library.prompts(entry), beginning(version.note))
        except InputError as fault:  # of the disk, so the next request reads the files again
            log.warning("%s is not chosen now: %s", name, refusal_of(fault).message)
            return ()
        except VeneerError as fault:
            log.warning("%s is not chosen by model auto: %s", name, refusal_of(fault).message)
        self._texts[key] = texts = tuple(text for text in texts if text)
        while len(self._texts) > MOST_KEPT:
            self._texts.pop(next(iter(self._texts)), None)  # other threads remove some too
        return texts

    # states

    async def _find_states(self, day: str, texts: Texts) -> States | None:
        """Returns the means of the texts, (K, D), from the cache folder or the engine; None if the
        base cannot read one."""
        key = {**self._base_key, "day": day, "texts": texts}
        if (stored := await self._read_files(lambda: _recall(key))) is not None:
            return _decoded(stored, len(texts))
        means: list[States] = []
        try:
            for start in range(0, len(texts), self._at_once):
                prompts = [self._prompt(text) for text in texts[start : start + self._at_once]]
                means += await self._means(prompts, salt="auto")
        except Refusal as refusal:
            if refusal.status != 400:
                raise
            log.warning("model auto leaves an adapter out: %s", refusal.message)
            return None
        states = np.stack(means)
        encoded = base64.b64encode(states.tobytes()).decode()
        await self._read_files(lambda: remember("choice", key, str, lambda: encoded))
        return states

    def _prompt(self, text: str) -> Prompt:
        if not self._prompts.template.source:
            return TextPrompt(text=text)
        return ChatPrompt([{"role": "user", "content": text}])

    async def _means(
        self, prompts: Sequence[Prompt], *, salt: str, seconds: float | None = None
    ) -> list[States]:
        """Returns the mean state of the question in each prompt, (D). Refusal."""
        encoded = await self._encoded(prompts)
        means = [PromptMean(start, stop) for _, start, stop in encoded]
        now, inbox = self._loop.clock(), Inbox(every_step=False)
        requests = [
            Request(
                prompt=tuple(ids),
                max_new_tokens=1,
                arrival=now,
                deadline=None if seconds is None else now + seconds,
                salt=salt,
                prompt_only=True,
                prompt_states=mean.take,
            )
            for (ids, _, _), mean in zip(encoded, means, strict=True)
        ]
        await self._run(requests, inbox)
        return [np.array(mean.value, dtype=np.float32) for mean in means]

    async def _run(self, requests: Sequence[Request], inbox: Inbox) -> None:
        """Waits until the engine has read all prompts. Refusal."""
        tickets = []
        try:
            for number, request in enumerate(requests):
                tickets.append(self._loop.submit(request, inbox, number))
            for ticket in tickets:
                await ticket.accepted
            unread = len(tickets)
            while unread:
                for update in await inbox.next_updates():
                    if update.error is not None:
                        raise update.error
                    if update.reason in _FAILURES:
                        raise Refusal(*_FAILURES[update.reason])
                    unread -= update.ended
        except (VeneerError, Refusal) as fault:
            raise refusal_of(fault, param="model") from None
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def _encoded(self, prompts: Sequence[Prompt]) -> list[tuple[list[int], int, int]]:
        """Returns ids of each prompt, and where the question begins and ends in them."""
        encoded = await self._prompts.encoded(prompts, self._preamble)
        spans = []
        for prompt, ids in zip(prompts, encoded, strict=True):
            before, behind = (
                await self._template_edges() if isinstance(prompt, ChatPrompt) else (0, 0)
            )
            start, stop = before, len(ids) - behind
            if start >= stop:  # the template writes this question in another way
                start, stop = 0, len(ids)
            start = min(start, MOST_QUESTION_TOKENS - 1)
            spans.append((ids[:MOST_QUESTION_TOKENS], start, min(stop, MOST_QUESTION_TOKENS)))
        return spans

    async def _template_edges(self) -> tuple[int, int]:
        """Returns how many tokens the template writes before and behind a question."""
        if self._edges is None or self._edges[0] != self._day:
            probes = list(map(self._prompt, PROBES))
            first, second = await self._prompts.encoded(probes, self._preamble)
            self._edges = self._day, _common(first, second), _common(first[::-1], second[::-1])
        return self._edges[1:]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the length of the common beginning."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class _NotStored(Exception):
    """The cache folder does not have a result."""


def _recall(key: Mapping[str, Any]) -> str | None:
    """Returns the stored states; None if there are none."""

    def missing() -> str:
        raise _NotStored

    try:
        return remember("choice", key, str, missing)
    except _NotStored:
        return None


def _decoded(stored: str, count: int) -> States:
    return np.frombuffer(base64.b64decode(stored), dtype=np.float32).reshape(count, -1)
