"""From what is asked to pieces of answers: requests to the engine; its tokens as text, chances,
calls of tools."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from veneer.decoding.sampling.grammar import Grammar
from veneer.decoding.sampling.sampling import TokenChance, seed_of
from veneer.decoding.schedule.blocks import Identity
from veneer.decoding.schedule.sequence import FinishReason, Request
from veneer.decoding.text import TextStream, stop_check, text_of
from veneer.decoding.tool_calls.calls import CallReader, CallStyle
from veneer.serve.engine.loop import EngineLoop, Inbox, Ticket, TokenUpdate
from veneer.serve.engine.token_text import TokenTexts
from veneer.serve.protocols.answers import AnswerDelta, AnswerEnd, TokenLogprob, ToolCall, Usage
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.refusals import Refusal, refusal_of


def requests_of(
    asked: GenerationRequest,
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
    """One for each prompt. lengths: new tokens that each may have. stops: the base's own stop
    tokens. VeneerError."""
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


class DeltaSink(Protocol):
    """Takes pieces, while it is open."""

    @property
    def open(self) -> bool: ...

    def take(self, piece: AnswerDelta) -> None: ...


class Generation:
    """The answers to all prompts of a request: as they come, where it is streamed. Leaving its
    block ends what has not ended.

    texts: of the base's tokenizer. grammar: what they follow. style: how calls are written, where
    they are looked for.
    """

    def __init__(
        self,
        loop: EngineLoop,
        requests: Sequence[Request],
        asked: GenerationRequest,
        texts: TokenTexts,
        grammar: Grammar | None = None,
    ) -> None:
        self._loop, self._requests, self._asked, self._texts = loop, requests, asked, texts
        self._grammar = grammar
        self._inbox = Inbox(every_step=asked.stream)
        self._tickets: list[Ticket] = []
        self._spelled: list[list[_AnswerDecoder]] = []
        self.style: CallStyle | None = None

    async def __aenter__(self) -> Generation:
        """All of them wait to be answered, or none. Refusal."""
        try:
            for number, request in enumerate(self._requests):
                self._tickets.append(self._loop.submit(request, self._inbox, number))
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

    @property
    def usage(self) -> Usage:
        prompt = sum(len(request.prompt) for request in self._requests)
        return Usage(
            prompt,
            sum(each.cached for each in self._tickets),
            sum(each.new for each in self._tickets),
        )

    async def pieces(self) -> AsyncIterator[list[AnswerDelta]]:
        """Those that come together, until every answer has ended. Refusal: one cannot be answered;
        the others end with it."""
        self._spelled = [
            [
                _AnswerDecoder(self._texts, request, self._asked, self.style, self._grammar)
                for _ in range(request.choices)
            ]
            for request in self._requests
        ]
        left = sum(map(len, self._spelled))
        while left:
            found = []
            for update in await self._inbox.taken():
                if update.error is not None:
                    raise refusal_of(update.error)
                left -= update.ended
                found.append(self._piece(update))
            yield found

    def hand_to(self, sink: DeltaSink) -> None:
        """From the second piece on, those of an answer that is alone go there in the turn that
        tells of them, for as long as it is open. `pieces` has the others, the last among them."""
        if (
            len(self._tickets) > 1 or self._asked.choices > 1
        ):  # of which a step's pieces are sent together
            return

        def taking(update: TokenUpdate) -> bool:
            if update.ended or not sink.open:
                return False
            sink.take(self._piece(update))
            return True

        self._inbox.taking = taking

    def _piece(self, update: TokenUpdate) -> AnswerDelta:
        index = update.request * self._asked.choices + update.choice
        return self._spelled[update.request][update.choice].piece(index, update)


class _AnswerDecoder:
    """One answer's tokens as text."""

    def __init__(
        self,
        texts: TokenTexts,
        request: Request,
        asked: GenerationRequest,
        style: CallStyle | None,
        grammar: Grammar | None,
    ) -> None:
        self._texts, self._request, self._asked, self._grammar = texts, request, asked, grammar
        self._stream = TextStream(texts.tokenizer, asked.stops)
        self._calls = None if style is None else CallReader(style, asked.tools)
        self._marks = {} if style is None else {token: mark for mark, token in style.special}
        self._ids: list[int] = []
        self._whole = ""  # with marks, where there are any

    def piece(self, index: int, update: TokenUpdate) -> AnswerDelta:
        tokens, chances = update.tokens, update.chances
        stopped = None
        if update.reason is FinishReason.STOP and tokens and tokens[-1] in self._request.stops:
            *tokens, stopped = tokens  # it is no part of the answer
            chances = chances[: len(tokens)]
        text = "".join(map(self._text, tokens)) if self._marks else self._stream.push_all(tokens)
        self._ids += tokens
        calls: list[ToolCall] = []
        end = None
        if update.reason is not None:
            text += self._stream.end()
        if self._marks:
            self._whole += text
        if update.reason is not None:
            end = self._end(update.reason, stopped)
        if self._calls is not None:
            text, found = self._calls.push(text)
            if end is not None:
                rest, more = self._calls.end()
                text, found = text + rest, found + more
            calls = [ToolCall(name, arguments) for name, arguments in found]
        return AnswerDelta(index, text, tuple(map(self._chance, chances)), tuple(calls), end)

    def _text(self, token: int) -> str:
        """Where calls are looked for, their marks are text too."""
        mark = self._marks.get(token)
        return (
            self._stream.push(token)
            if mark is None or self._stream.stopped
            else self._stream.end() + mark
        )

    def _end(self, reason: FinishReason, stop_token: int | None) -> AnswerEnd:
        if reason is FinishReason.DEADLINE and not self._ids:
            raise Refusal(408, "The time for this request is over, and nothing is answered yet.")
        if reason is FinishReason.CANCELLED:
            raise Refusal(503, "This request was ended.")
        if reason in (FinishReason.LENGTH, FinishReason.DEADLINE):
            return AnswerEnd(
                "length" if reason is FinishReason.LENGTH else "deadline",
                None if reason is FinishReason.LENGTH else "deadline",
            )
        self._check_shape()
        if self._stream.stopped:
            text = text_of(self._texts.tokenizer, self._ids)
            ends = {stop: text.find(stop) + len(stop) for stop in self._asked.stops if stop in text}
            return AnswerEnd(
                "stop", min(ends, key=lambda stop: (ends[stop], -len(stop)), default=None)
            )
        return AnswerEnd("stop", stop_token if stop_token in self._asked.stop_tokens else None)

    def _check_shape(self) -> None:
        """An answer that was not cut is what was asked for. What a grammar cannot hold, a check
        finds: Refusal."""
        if self._grammar is None or self._stream.stopped:
            return
        text = self._whole if self._marks else text_of(self._texts.tokenizer, self._ids)
        if faults := self._grammar.faults(text):
            assert self._asked.shape is not None
            param = self._asked.shape.param
            raise Refusal(
                422,
                f"{param}: the model's answer is not of it: {faults[0][:300]}",
                param,
                "answer_refused",
            )

    def _chance(self, chance: TokenChance) -> TokenLogprob:
        others = tuple(self._texts.chance(token, log) for token, log in chance.alternatives)
        return self._texts.chance(chance.token, chance.logprob, others)
