"""From what is asked to pieces of answers: requests to the engine; its tokens as text, chances, calls of tools."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from veneer.decoding.blocks import Identity
from veneer.decoding.calls import CallReader, CallStyle
from veneer.decoding.grammar import Grammar
from veneer.decoding.sampling import TokenChance, seed_of
from veneer.decoding.sequence import Reason, Request
from veneer.decoding.text import TextStream, stop_check, text_of
from veneer.serve.answers import Call, Chance, End, Piece, Usage
from veneer.serve.asked import Asked
from veneer.serve.loop import EngineLoop, Ticket, Update
from veneer.serve.refusals import Refusal, refusal_of
from veneer.serve.token_text import TokenTexts


def requests_of(
    asked: Asked,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    adapter: Identity,
    stops: Sequence[int],
    tokenizer: Any,
    constraints: Grammar | None,
    salt: str,
    now: float,
    seconds: float,
) -> list[Request]:
    """One for each prompt. lengths: new tokens that each may have. stops: the base's own stop tokens. VeneerError."""
    seed = secrets.randbits(32) if asked.seed is None else asked.seed
    return [
        Request(
            prompt=tuple(ids),
            adapter=adapter,
            max_new_tokens=length,
            min_new_tokens=asked.min_new_tokens,
            stops=frozenset((*asked.stop_tokens, *(() if asked.ignore_eos else stops))),
            choices=asked.choices,
            sampling=asked.sampling,
            constraints=constraints,
            checks=stop_check(tokenizer, asked.stops) if asked.stops else None,
            seed=seed_of(seed, number),
            arrival=now,
            deadline=now + seconds,
            salt=salt,
        )
        for number, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


class Answering:
    """The answers to all prompts of a request, as they come. Leaving its block ends what has not ended.

    texts: of the base's tokenizer. grammar: what they follow. style: how calls are written, where they are looked for.
    """

    def __init__(
        self,
        loop: EngineLoop,
        requests: Sequence[Request],
        asked: Asked,
        texts: TokenTexts,
        grammar: Grammar | None = None,
    ) -> None:
        self._loop, self._requests, self._asked, self._texts = loop, requests, asked, texts
        self._grammar = grammar
        self._tickets: list[Ticket] = []
        self.style: CallStyle | None = None
        self.new = 0
        self._cached: dict[int, int] = {}

    async def __aenter__(self) -> Answering:
        """All of them wait to be answered, or none. Refusal."""
        try:
            for request in self._requests:
                self._tickets.append(self._loop.submit(request))
            for ticket in self._tickets:
                await ticket.accepted
        except BaseException as fault:
            await self.__aexit__()
            if isinstance(fault, Exception):
                raise refusal_of(fault) from fault
            raise
        return self

    async def __aexit__(self, *about: object) -> None:
        for ticket in self._tickets:
            ticket.cancel()
            if ticket.accepted.done():
                ticket.accepted.exception()  # seen, so that nobody warns of it

    @property
    def usage(self) -> Usage:
        prompt = sum(len(request.prompt) for request in self._requests)
        return Usage(prompt, sum(self._cached.values()), self.new)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until every answer has ended. Refusal: one cannot be answered; the others end with it."""
        spelled = [
            [_Spelled(self._texts, request, self._asked, self.style, self._grammar) for _ in range(request.choices)]
            for request in self._requests
        ]
        merged: asyncio.Queue[tuple[int, Update | None]] = asyncio.Queue()

        async def follow(number: int, ticket: Ticket) -> None:
            async for update in ticket.updates():
                merged.put_nowait((number, update))
            merged.put_nowait((number, None))

        tasks = [asyncio.create_task(follow(n, ticket)) for n, ticket in enumerate(self._tickets)]
        try:
            left = len(tasks)
            while left:
                number, update = await merged.get()
                if update is None:
                    left -= 1
                    continue
                if update.error is not None:
                    raise refusal_of(update.error)
                self.new += len(update.tokens)
                self._cached.setdefault(number, update.cached)
                index = number * self._asked.choices + update.choice
                yield spelled[number][update.choice].piece(index, update)
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task


class _Spelled:
    """One answer's tokens as text."""

    def __init__(
        self, texts: TokenTexts, request: Request, asked: Asked, style: CallStyle | None, grammar: Grammar | None
    ) -> None:
        self._texts, self._request, self._asked, self._grammar = texts, request, asked, grammar
        self._stream = TextStream(texts.tokenizer, asked.stops)
        self._calls = None if style is None else CallReader(style, asked.tools)
        self._marks = {} if style is None else {token: mark for mark, token in style.special}
        self._ids: list[int] = []
        self._whole = ""  # with marks

    def piece(self, index: int, update: Update) -> Piece:
        tokens, chances = list(update.tokens), list(update.chances)
        stopped = None
        if update.reason is Reason.STOP and tokens and tokens[-1] in self._request.stops:
            stopped = tokens.pop()  # which is no part of the answer
            chances = chances[: len(tokens)]
        text = "".join(map(self._text, tokens))
        self._ids += tokens
        calls: list[Call] = []
        end = None
        if update.reason is not None:
            text += self._stream.end()
        self._whole += text
        if update.reason is not None:
            end = self._end(update.reason, stopped)
        if self._calls is not None:
            text, found = self._calls.push(text)
            if end is not None:
                rest, more = self._calls.end()
                text, found = text + rest, found + more
            calls = [Call(name, arguments) for name, arguments in found]
        return Piece(index, text, tuple(map(self._chance, chances)), tuple(calls), end)

    def _text(self, token: int) -> str:
        """Where calls are looked for, their marks are text too."""
        mark = self._marks.get(token)
        return self._stream.push(token) if mark is None or self._stream.stopped else self._stream.end() + mark

    def _end(self, reason: Reason, stop_token: int | None) -> End:
        if reason is Reason.DEADLINE and not self._ids:
            raise Refusal(408, "The time for this request is over, and nothing is answered yet.")
        if reason is Reason.CANCELLED:
            raise Refusal(503, "This request was ended.")
        if reason in (Reason.LENGTH, Reason.DEADLINE):
            return End(
                "length" if reason is Reason.LENGTH else "deadline", None if reason is Reason.LENGTH else "deadline"
            )
        self._check_shape()
        if self._stream.stopped:
            text = text_of(self._texts.tokenizer, self._ids)
            ends = {stop: text.find(stop) + len(stop) for stop in self._asked.stops if stop in text}
            return End("stop", min(ends, key=lambda stop: (ends[stop], -len(stop)), default=None))
        return End("stop", stop_token if stop_token in self._asked.stop_tokens else None)

    def _check_shape(self) -> None:
        """An answer that was not cut is what was asked for. What a grammar cannot hold, a check finds: Refusal."""
        if self._grammar is None or self._stream.stopped:
            return
        text = self._whole if self._marks else text_of(self._texts.tokenizer, self._ids)
        if faults := self._grammar.faults(text):
            assert self._asked.shape is not None
            param = self._asked.shape.param
            raise Refusal(422, f"{param}: the model's answer is not of it: {faults[0][:300]}", param, "answer_refused")

    def _chance(self, chance: TokenChance) -> Chance:
        others = tuple(self._texts.chance(token, log) for token, log in chance.alternatives)
        return self._texts.chance(chance.token, chance.logprob, others)
