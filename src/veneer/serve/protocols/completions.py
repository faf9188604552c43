"""/v1/completions: a text, or ids, continued.

Source: platform.openai.com/docs/api-reference/completions, with vLLM's fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from veneer.bounds import CHOICES, LOGPROBS, TOKEN
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
from veneer.serve.protocols.chat import usage_of
from veneer.serve.protocols.fields import (
    Either,
    Field,
    Listed,
    Num,
    Only,
    Refused,
    Text,
    read_fields,
)
from veneer.serve.protocols.request import GenerationRequest, TextPrompt
from veneer.serve.protocols.sampling_fields import (
    MODEL,
    NEW,
    OPENAI,
    OTHERS,
    STREAM,
    WITHOUT_EFFECT,
    sampled,
)
from veneer.serve.protocols.shapes import RESPONSE_FORMAT, STRUCTURED, shape_of
from veneer.serve.refusals import Fault, Refusal, refuse

DEFAULT_NEW = 16
_TEXT = Text(MOST_TEXT, 1)
_IDS = Listed(Num(TOKEN), MOST_IDS, 1)

FIELDS = (
    MODEL,
    Field(
        "prompt",
        Either((_TEXT, _IDS, Listed(_TEXT, MOST_PROMPTS, 1), Listed(_IDS, MOST_PROMPTS, 1))),
        "a text or several; or ids of tokens; tokenised as it stands, special tokens included",
        required=True,
    ),
    Field("max_tokens", NEW, f"where an answer is cut; default {DEFAULT_NEW}"),
    *OPENAI,
    Field("logprobs", Num(LOGPROBS), "tell each token's chance, and so many of the likeliest"),
    *STREAM,
    RESPONSE_FORMAT,
    *STRUCTURED,
    *OTHERS,
    Field("best_of", Num(CHOICES), "as n, or left out"),
    Field(
        "echo",
        Only((False,), "prompts' chances are not kept; join the two yourself"),
        "",
        no_effect=True,
    ),
    Field("messages", Refused("use prompt, or ask /v1/chat/completions"), ""),
    Field("suffix", Refused("the base continues texts, it fills no gaps"), ""),
    Field(
        "add_special_tokens", Only((True,), "as the tokenizer does by itself"), "", no_effect=True
    ),
    *WITHOUT_EFFECT,
)


def read_request(body: dict[str, Any]) -> GenerationRequest:
    """Refusal: 400 with all that is wrong."""
    values = read_fields(FIELDS, body)
    if values.get("best_of", values.get("n", 1)) != values.get("n", 1):
        raise refuse([Fault("best_of", "is not n: all answers are returned")])
    return GenerationRequest(
        model=values["model"],
        prompts=_prompts(values["prompt"]),
        max_new_tokens=values.get("max_tokens", DEFAULT_NEW),
        shape=shape_of(values),
        **sampled(values, logprobs=values.get("logprobs")),
    )


def _prompts(given: str | list[Any]) -> tuple[TextPrompt, ...]:
    if isinstance(given, str):
        return (TextPrompt(text=given),)
    if isinstance(given[0], str):
        return tuple(TextPrompt(text=text) for text in given)
    several = given if isinstance(given[0], list) else [given]
    return tuple(TextPrompt(ids=tuple(map(int, ids))) for ids in several)


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


PROTOCOL = ApiProtocol("cmpl-", read_request, response_body, CompletionStream)
