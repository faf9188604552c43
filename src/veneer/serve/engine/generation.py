"""Runs one request: its prompts go to the engine, and its tokens come back as text, logprobs and
calls of tools."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from veneer.adapters.activation import activation_start
from veneer.decoding.sampling.grammar import Grammar
from veneer.decoding.sampling.sampling import TokenChance, seed_of
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.sequence import FinishReason, Request
from veneer.decoding.text import TextStream, stop_check, text_of
from veneer.decoding.tool_calls.calls import CallReader, CallStyle
from veneer.serve.engine.loop import EngineLoop, Inbox, Ticket, TokenUpdate
from veneer.serve.engine.token_text import TokenTexts
from veneer.serve.limits import LARGE_LOGPROBS, MOST_PROMPT_LOGPROBS
from veneer.serve.protocols.answers import AnswerDelta, AnswerEnd, TokenLogprob, ToolCall, Usage
from veneer.serve.protocols.request import GenerationRequest, TextPrompt
from veneer.serve.refusals import Refusal, refusal_of


def engine_requests(
    request: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    adapter: Identity,
    invocation: Sequence[int],
    stops: Sequence[int],
    tokenizer: Any,
    constraints: Grammar | None,
    salt: str,
    now: float,
    seconds: float,
) -> list[Request]:
    """Makes an engine's request for each prompt. VeneerError.

    lengths: most new tokens for each prompt. invocation: token ids from which on the adapter acts.
    stops: the base's own stop tokens.
    """
    if request.repeats_prompt:
        _refuse_many_logprobs(request, prompts)
    seed = secrets.randbits(32) if request.seed is None else request.seed
    return [
        Request(
            prompt=tuple(ids),
            adapter=adapter,
            activation=activation_start(ids, invocation),
            max_new_tokens=length,
            min_new_tokens=request.min_new_tokens,
            stops=frozenset((*request.stop_tokens, *(() if request.ignore_eos else stops))),
            choices=request.choices,
            sampling=request.sampling,
            constraints=constraints,
            checks=stop_check(tokenizer, request.stops) if request.stops else None,
            seed=seed_of(seed, number),
            arrival=now,
            deadline=now + seconds,
            salt=salt,
            prompt_logprobs=request.repeats_prompt and request.sampling.logprobs is not None,
            prompt_only=request.prompt_only,
        )
        for number, (ids, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def refuse_many_answers(request: GenerationRequest, most: int) -> None:
    """Raises Refusal if the answers to all prompts are more than may wait: an idle server would
    have no room for them either."""
    count = len(request.prompts) * request.choices
    if count > most:
        param = "n" if request.choices > 1 else "prompt"
        raise Refusal(
            400,
            f"{param}: the prompts have {count:,} answers, and at most {most:,} may wait"
            " (--max-waiting). Send several requests.",
            param,
            "invalid_request",
        )


def _refuse_many_logprobs(request: GenerationRequest, prompts: Sequence[Sequence[int]]) -> None:
    """Raises Refusal if the echoed prompts have more log-probabilities than the limit."""
    alternatives = request.sampling.logprobs
    if alternatives is None:
        return
    count = sum(map(len, prompts)) * request.choices * (1 + alternatives)
    if count > MOST_PROMPT_LOGPROBS:
        raise Refusal(
            400,
            f"echo: the prompts have {count:,} log-probabilities (tokens, answers, alternatives),"
            f" the limit is {MOST_PROMPT_LOGPROBS:,}",
            "echo",
            "invalid_request",
        )


class DeltaSink(Protocol):
    """Takes deltas while it is open."""

    @property
    def open(self) -> bool: ...

    def take(self, delta: AnswerDelta) -> None: ...


class Generation:
    """Generates the answers to all prompts of a request. Leaving its block cancels those that have
    not ended.

    texts: of the base's tokenizer. grammar: what the answers follow. style: how the base writes
    calls of tools; None if calls are not looked for.
    """

    def __init__(
        self,
        loop: EngineLoop,
        engine_requests: Sequence[Request],
        request: GenerationRequest,
        texts: TokenTexts,
        grammar: Grammar | None = None,
    ) -> None:
        self._loop, self._engine_requests, self._request = loop, engine_requests, request
        self._texts, self._grammar = texts, grammar
        self._inbox = Inbox(every_step=request.stream)
        self._tickets: list[Ticket] = []
        self._decoders: list[list[_AnswerDecoder]] = []
        self._unrepeated: set[int] = set()  # answers that do not have their prompt yet
        self._prompt_starts: dict[int, _PromptStart] = {}  # by the number of the request
        self.style: CallStyle | None = None

    async def __aenter__(self) -> "Generation":
        """Queues all requests, or none. Refusal."""
        try:
            for number, request in enumerate(self._engine_requests):
                self._tickets.append(self._loop.submit(request, self._inbox, number))
            for ticket in self._tickets:
                await ticket.accepted
        except BaseException as fault:
            await self.__aexit__()
            if isinstance(fault, Exception):
                raise refusal_of(fault) from fault
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt=sum(len(request.prompt) for request in self._engine_requests),
            cached=sum(ticket.cached_tokens for ticket in self._tickets),
            new=0
            if self._request.prompt_only
            else sum(ticket.new_tokens for ticket in self._tickets),
        )

    async def deltas(self) -> AsyncIterator[list[AnswerDelta]]:
        """Yields the deltas that come together, until every answer has ended. Refusal: an answer
        failed; the others end with it."""
        self._decoders = [
            [
                _AnswerDecoder(self._texts, request, self._request, self.style, self._grammar)
                for _ in range(request.choices)
            ]
            for request in self._engine_requests
        ]
        if self._request.repeats_prompt:
            self._unrepeated = {*range(sum(map(len, self._decoders)))}
        open_answers = sum(map(len, self._decoders))
        while open_answers:
            updates = await self._inbox.next_updates()
            if self._num_logprobs(updates) > LARGE_LOGPROBS:
                deltas = await asyncio.to_thread(self._deltas, updates)
            else:
                deltas = self._deltas(updates)
            open_answers -= sum(update.ended for update in updates)
            yield deltas

    def hand_to(self, sink: DeltaSink) -> None:
        """Gives the deltas of a single answer to the sink at once, while the sink is open.

        `deltas` yields the others, the last among them. Several answers are sent together, so
        `deltas` yields all of theirs.
        """
        if len(self._tickets) > 1 or self._request.choices > 1:
            return

        def take_now(update: TokenUpdate) -> bool:
            if update.ended or not sink.open:
                return False
            sink.take(self._delta(update))
            return True

        self._inbox.take_now = take_now

    def _num_logprobs(self, updates: Sequence[TokenUpdate]) -> int:
        """Returns the number of log-probabilities in the deltas of these updates."""
        tokens = sum(len(update.logprobs) for update in updates)
        if self._request.repeats_prompt:
            for number in {update.request for update in updates} - self._prompt_starts.keys():
                tokens += len(self._engine_requests[number].prompt)
        return tokens * (1 + (self._request.sampling.logprobs or 0))

    def _deltas(self, updates: Sequence[TokenUpdate]) -> list[AnswerDelta]:
        for update in updates:
            if update.error is not None:
                raise refusal_of(update.error)
        return [self._delta(update) for update in updates]

    def _delta(self, update: TokenUpdate) -> AnswerDelta:
        index = update.request * self._request.choices + update.choice
        delta = self._decoders[update.request][update.choice].delta(index, update)
        if self._request.prompt_only:
            end = None if delta.end is None else AnswerEnd("length")
            delta = replace(delta, text="", logprobs=(), end=end)
        if index in self._unrepeated:
            self._unrepeated.remove(index)
            delta = self._behind_prompt(delta, update)
        return delta

    def _behind_prompt(self, delta: AnswerDelta, update: TokenUpdate) -> AnswerDelta:
        """Puts the prompt's text and logprobs in front of an answer's first delta."""
        start = self._prompt_starts.get(update.request)
        if start is None:
            start = self._prompt_starts[update.request] = self._prompt_start(update)
        return replace(
            delta, text=start.text + delta.text, logprobs=(*start.logprobs, *delta.logprobs)
        )

    def _prompt_start(self, update: TokenUpdate) -> "_PromptStart":
        prompt = self._request.prompts[update.request]
        ids = self._engine_requests[update.request].prompt
        sent_text = prompt.text if isinstance(prompt, TextPrompt) else None
        text = str(self._texts.tokenizer.decode(ids)) if sent_text is None else sent_text
        if self._request.sampling.logprobs is None:
            return _PromptStart(text)
        sequence = self._tickets[update.request].sequences[update.choice]
        chances = (logprob_of(self._texts, chance) for chance in sequence.prompt_logprobs)
        return _PromptStart(text, (self._texts.logprob(ids[0], None), *chances))


@dataclass(frozen=True)
class _PromptStart:
    """The prompt's text and logprobs, with which all answers to it begin."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class _AnswerDecoder:
    """Turns one answer's tokens into text."""

    def __init__(
        self,
        texts: TokenTexts,
        engine_request: Request,
        request: GenerationRequest,
        style: CallStyle | None,
        grammar: Grammar | None,
    ) -> None:
        self._texts, self._grammar = texts, grammar
        self._engine_request, self._request = engine_request, request
        self._stream = TextStream(texts.tokenizer, request.stops)
        self._call_reader = None if style is None else CallReader(style, request.tools)
        self._marks = {} if style is None else {token: mark for mark, token in style.special}
        self._ids: list[int] = []
        self._text_with_marks = ""  # empty if calls have no marks

    def delta(self, index: int, update: TokenUpdate) -> AnswerDelta:
        tokens, logprobs = update.tokens, update.logprobs
        stop_token = None
        if (
            update.reason is FinishReason.STOP
            and tokens
            and tokens[-1] in self._engine_request.stops
        ):
            *tokens, stop_token = tokens  # it is not part of the answer
            logprobs = logprobs[: len(tokens)]
        text = "".join(map(self._decode, tokens)) if self._marks else self._stream.push_all(tokens)
        self._ids += tokens
        if update.reason is not None:
            text += self._stream.end()
        if self._marks:
            self._text_with_marks += text
        end = None if update.reason is None else self._end(update.reason, stop_token)
        calls: list[ToolCall] = []
        if self._call_reader is not None:
            text, pairs = self._call_reader.push(text)
            if end is not None:
                last_text, last_pairs = self._call_reader.end()
                text, pairs = text + last_text, pairs + last_pairs
            calls = [ToolCall(name, arguments) for name, arguments in pairs]
        chances = tuple(logprob_of(self._texts, chance) for chance in logprobs)
        return AnswerDelta(index, text, chances, tuple(calls), end)

    def _decode(self, token: int) -> str:
        """Decodes a token; marks of calls are text too."""
        mark = self._marks.get(token)
        if mark is None or self._stream.stopped:
            return self._stream.push(token)
        return self._stream.end() + mark

    def _end(self, reason: FinishReason, stop_token: int | None) -> AnswerEnd:
        match reason:
            case FinishReason.DEADLINE if not self._ids:
                message = "The time for this request is over, and nothing is answered yet."
                raise Refusal(408, message)
            case FinishReason.CANCELLED:
                raise Refusal(503, "This request was ended.")
            case FinishReason.LENGTH:
                return AnswerEnd("length")
            case FinishReason.DEADLINE:
                return AnswerEnd("deadline", "deadline")
        self._check_shape()
        if self._stream.stopped:
            return AnswerEnd("stop", self._first_stop())
        return AnswerEnd("stop", stop_token if stop_token in self._request.stop_tokens else None)

    def _first_stop(self) -> str | None:
        """Returns the stop string that ended first; of two, the longer."""
        text = text_of(self._texts.tokenizer, self._ids)
        ends = {stop: text.find(stop) + len(stop) for stop in self._request.stops if stop in text}
        return min(ends, key=lambda stop: (ends[stop], -len(stop)), default=None)

    def _check_shape(self) -> None:
        """Checks what the grammar could not enforce. Refusal: the answer does not have the required
        shape."""
        if self._grammar is None or self._stream.stopped:
            return
        text = self._text_with_marks if self._marks else text_of(self._texts.tokenizer, self._ids)
        if faults := self._grammar.faults(text):
            assert self._request.shape is not None
            param = self._request.shape.param
            message = f"{param}: the model's answer does not follow it: {faults[0][:300]}"
            raise Refusal(422, message, param, "answer_refused")


def logprob_of(texts: TokenTexts, chance: TokenChance) -> TokenLogprob:
    alternatives = tuple(texts.logprob(*pair) for pair in chance.alternatives)
    return texts.logprob(chance.token, chance.logprob, alternatives)
