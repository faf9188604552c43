"""/v1/completions: a text, or ids, continued.

Source: platform.openai.com/docs/api-reference/completions, with vLLM's fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, cast

from veneer.bounds import CHOICES, LOGPROBS
from veneer.decoding.sampling.sampling import Sampling
from veneer.serve.limits import MOST_IDS, MOST_PROMPTS, MOST_TEXT
from veneer.serve.protocols.answers import (
    DONE,
    AnswerDelta,
    ApiProtocol,
    GeneratedAnswer,
    ResponseHead,
    TextEvents,
    TokenLogprob,
    Usage,
    event,
    finish_reason,
)
from veneer.serve.protocols.body import BY_TYPE, NO_EFFECT, Length, NotSupported, Num
from veneer.serve.protocols.chat import usage_of
from veneer.serve.protocols.request import GenerationRequest, TextPrompt
from veneer.serve.protocols.sampling_body import ChoicesBody, NewTokens, TokenId
from veneer.serve.protocols.shapes import ShapedBody
from veneer.serve.refusals import Fault, Refusal

_Text = Annotated[str, Length(1, MOST_TEXT)]
_Ids = Annotated[list[TokenId], Length(1, MOST_IDS)]


class CompletionBody(ShapedBody, ChoicesBody):
    """The body of /v1/completions."""

    prompt: Annotated[
        _Text
        | Annotated[list[_Text], Length(1, MOST_PROMPTS)]
        | _Ids
        | Annotated[list[_Ids], Length(1, MOST_PROMPTS)],
        BY_TYPE,
    ]
    """one text or several, or token ids; tokenised as it is, special tokens included"""
    max_tokens: NewTokens = 16
    """longest answer; default 16"""
    logprobs: Annotated[int, Num(LOGPROBS)] | None = None
    """return each token's log probability, and that of this many of the likeliest tokens"""
    best_of: Annotated[int, Num(CHOICES)] | None = None
    """as n, or left out"""
    echo: Annotated[Literal[False], NO_EFFECT] = False
    """prompts have no logprobs here; join prompt and answer yourself"""
    add_special_tokens: Annotated[Literal[True], NO_EFFECT] = True
    """as the tokenizer does by itself"""
    messages: NotSupported = None
    """use prompt, or /v1/chat/completions"""
    suffix: NotSupported = None
    """the base continues texts, it does not fill gaps"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        if self.best_of not in (None, self.n):
            yield Fault("best_of", "is not n: all answers are returned")

    def sampling(self, **settings: Any) -> Sampling:
        return super().sampling(logprobs=self.logprobs, **settings)

    def generation_request(self) -> GenerationRequest:
        return replace(
            self.request_for(*self._prompts()), max_new_tokens=self.max_tokens, shape=self.shape()
        )

    def _prompts(self) -> list[TextPrompt]:
        if isinstance(self.prompt, str):
            return [TextPrompt(text=self.prompt)]
        if isinstance(self.prompt[0], int):
            return [TextPrompt(ids=tuple(self.prompt))]
        return [
            TextPrompt(text=prompt) if isinstance(prompt, str) else TextPrompt(ids=tuple(prompt))
            for prompt in cast(list[str | list[int]], self.prompt)
        ]


def response_body(
    head: ResponseHead, asked: GenerationRequest, answers: Sequence[GeneratedAnswer], usage: Usage
) -> dict[str, Any]:
    choices = []
    for answer in answers:
        end, offset = answer.end, _Offsets()
        choices.append(
            {
                "index": answer.index,
                "text": answer.text,
                "logprobs": offset.logprobs(asked, answer.chances),
                "finish_reason": finish_reason(end, ()),
                "stop_reason": end.stopped_by if end else None,
            }
        )
    return {**_about(head), "choices": choices, "usage": usage_of(usage)}


class CompletionStream:
    """Chunks of text, each answer's end, the counts if they are wanted, [DONE]."""

    def __init__(self, head: ResponseHead, asked: GenerationRequest) -> None:
        self.asked, self._head = asked, _about(head)
        self._offsets: dict[int, _Offsets] = {}
        self._texts: dict[int, TextEvents] = {}

    def begin(self, usage: Usage) -> Iterator[str]:
        return iter(())

    def piece(self, piece: AnswerDelta) -> Iterator[str]:
        if piece.chances or piece.end is not None:
            yield self._chunk(piece)
        elif piece.text:
            index = piece.index
            if index not in self._texts:
                self._texts[index] = TextEvents(lambda text: self._chunk(AnswerDelta(index, text)))
            yield self._texts[index](piece.text)

    def finish(self, usage: Usage) -> Iterator[str]:
        if self.asked.stream_usage:
            yield event({**self._head, "choices": [], "usage": usage_of(usage)})
        yield DONE

    def fail(self, refusal: Refusal) -> Iterator[str]:
        yield event(refusal.body)
        yield DONE

    def _chunk(self, piece: AnswerDelta) -> str:
        offsets = self._offsets.setdefault(piece.index, _Offsets())
        choice = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": offsets.logprobs(self.asked, piece.chances) if piece.chances else None,
            "finish_reason": finish_reason(piece.end, ()),
        }
        if piece.end is not None:
            choice["stop_reason"] = piece.end.stopped_by
        usage = {"usage": None} if self.asked.stream_usage else {}
        return event({**self._head, "choices": [choice], **usage})


class _Offsets:
    """Where each token's text begins in the answer."""

    def __init__(self) -> None:
        self._at = 0

    def logprobs(
        self, asked: GenerationRequest, chances: Sequence[TokenLogprob]
    ) -> dict[str, Any] | None:
        if asked.sampling.logprobs is None:
            return None
        at = []
        for chance in chances:
            at.append(self._at)
            self._at += len(chance.text)
        return {
            "tokens": [chance.text for chance in chances],
            "token_logprobs": [chance.logprob for chance in chances],
            "top_logprobs": [{each.text: each.logprob for each in c.alternatives} for c in chances]
            if asked.sampling.logprobs
            else None,
            "text_offset": at,
        }


def _about(head: ResponseHead) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


PROTOCOL = ApiProtocol("cmpl-", CompletionBody, response_body, CompletionStream)
