"""/v1/chat/completions: OpenAI's chat, with vLLM's fields.

Source: platform.openai.com/docs/api-reference/chat, read by the client's own types (openai 3.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from veneer.bounds import LOGPROBS
from veneer.decoding.sampling.sampling import Sampling
from veneer.serve.protocols.answers import (
    DONE,
    AnswerDelta,
    ApiProtocol,
    GeneratedAnswer,
    ResponseHead,
    TextEvents,
    TokenLogprob,
    ToolCall,
    Usage,
    event,
    finish_reason,
)
from veneer.serve.protocols.body import NO_EFFECT, Length, NotSupported, Num
from veneer.serve.protocols.conversation import Messages, TemplateVariables, conversation
from veneer.serve.protocols.request import ChatPrompt, GenerationRequest
from veneer.serve.protocols.sampling_body import ChoicesBody, NewTokens
from veneer.serve.protocols.shapes import ShapedBody
from veneer.serve.protocols.tools import ToolChoice, Tools, required_call
from veneer.serve.refusals import Fault, Refusal


class ChatBody(TemplateVariables, ShapedBody, ChoicesBody):
    """The body of /v1/chat/completions."""

    messages: Messages
    """the conversation; text only"""
    max_tokens: NewTokens | None = None
    """longest answer; default: as long as the model's positions allow"""
    max_completion_tokens: NewTokens | None = None
    """the same"""
    logprobs: bool = False
    """return each token's log probability"""
    top_logprobs: Annotated[int, Num(LOGPROBS)] | None = None
    """and that of this many of the likeliest tokens; with logprobs"""
    tools: Tools | None = None
    """functions that the model may call"""
    tool_choice: ToolChoice | None = None
    """whether it calls them"""
    parallel_tool_calls: Annotated[Literal[True], NO_EFFECT] = True
    """an answer may hold several calls"""
    store: Annotated[Literal[False], NO_EFFECT] = False
    """nothing is stored here"""
    modalities: Annotated[list[Literal["text"]], Length(1, 1), NO_EFFECT] = Field(
        default_factory=list
    )
    """answers are text"""
    reasoning_effort: Annotated[Literal["none"], NO_EFFECT] = "none"
    """the template decides"""
    verbosity: Annotated[Literal["medium"], NO_EFFECT] = "medium"
    """ask in words"""
    echo: Annotated[Literal[False], NO_EFFECT] = False
    """the prompt is not repeated"""
    add_generation_prompt: Annotated[Literal[True], NO_EFFECT] = True
    """a new answer begins"""
    continue_final_message: Annotated[Literal[False], NO_EFFECT] = False
    """a new answer begins"""
    add_special_tokens: Annotated[Literal[False], NO_EFFECT] = False
    """the template writes them"""
    prompt: NotSupported = None
    """use messages, or /v1/completions"""
    functions: NotSupported = None
    """use tools"""
    function_call: NotSupported = None
    """use tool_choice"""
    audio: NotSupported = None
    """answers are text"""
    prediction: NotSupported = None
    """leave it out"""
    web_search_options: NotSupported = None
    """this server does not search the web"""
    chat_template: NotSupported = None
    """the base's own is used"""
    documents: NotSupported = None
    """put them into a message"""
    mm_processor_kwargs: NotSupported = None
    """only text is read"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        first, second = self.max_tokens, self.max_completion_tokens
        if first is not None and second not in (None, first):
            said = f"is {first:,}, and max_completion_tokens is {second:,}: give one"
            yield Fault("max_tokens", said)
        if self.top_logprobs is not None and not self.logprobs:
            yield Fault("top_logprobs", "is only for answers with logprobs: set logprobs")

    def sampling(self, **settings: Any) -> Sampling:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return super().sampling(logprobs=logprobs, **settings)

    def generation_request(self) -> GenerationRequest:
        messages, tools = conversation(self.messages, self.tools)
        offered = None if self.tool_choice == "none" else tools
        return replace(
            self.request_for(ChatPrompt(messages, offered, self.chat_template_kwargs)),
            max_new_tokens=self.max_tokens or self.max_completion_tokens,
            shape=required_call(self.tools, self.tool_choice) or self.shape(),
            parses_calls=bool(offered),
        )


def response_body(
    head: ResponseHead, asked: GenerationRequest, answers: Sequence[GeneratedAnswer], usage: Usage
) -> dict[str, Any]:
    choices = []
    for answer in answers:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text if answer.text or not answer.calls else None,
            "refusal": None,
        }
        if answer.calls:
            message["tool_calls"] = [_call(call) for call in answer.calls]
        choices.append(
            {
                "index": answer.index,
                "message": message,
                "logprobs": _logprobs(asked, answer.chances),
                "finish_reason": finish_reason(answer.end, answer.calls),
                "stop_reason": answer.end.stopped_by if answer.end else None,
            }
        )
    return {**_about(head, "chat.completion"), "choices": choices, "usage": usage_of(usage)}


class ChatStream:
    """Chunks: each answer's role first, then text and calls, its end, the counts if they are
    wanted, [DONE]."""

    def __init__(self, head: ResponseHead, asked: GenerationRequest) -> None:
        self.asked = asked
        self._about = _about(head, "chat.completion.chunk")
        self._calls: dict[int, int] = {}
        self._texts: dict[int, TextEvents] = {}

    def begin(self, usage: Usage) -> Iterator[str]:
        for index in range(self.asked.choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, piece: AnswerDelta) -> Iterator[str]:
        if piece.chances:
            yield self._chunk(piece.index, {"content": piece.text}, piece.chances)
        elif piece.text:
            index = piece.index
            if index not in self._texts:
                self._texts[index] = TextEvents(lambda text: self._chunk(index, {"content": text}))
            yield self._texts[index](piece.text)
        for call in piece.calls:
            number = self._calls[piece.index] = self._calls.get(piece.index, -1) + 1
            yield self._chunk(piece.index, {"tool_calls": [{"index": number, **_call(call)}]})
        if piece.end is not None:
            called = [ToolCall("", "")] if piece.index in self._calls else []
            yield self._chunk(
                piece.index, {}, (), finish_reason(piece.end, called), piece.end.stopped_by
            )

    def finish(self, usage: Usage) -> Iterator[str]:
        if self.asked.stream_usage:
            yield event({**self._about, "choices": [], "usage": usage_of(usage)})
        yield DONE

    def fail(self, refusal: Refusal) -> Iterator[str]:
        yield event(refusal.body)
        yield DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        chances: Sequence[TokenLogprob] = (),
        reason: str | None = None,
        stopped_by: str | int | None = None,
    ) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(self.asked, chances) if chances else None,
            "finish_reason": reason,
        }
        if reason is not None:
            choice["stop_reason"] = stopped_by
        usage = {"usage": None} if self.asked.stream_usage else {}
        return event({**self._about, "choices": [choice], **usage})


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.new,
        "total_tokens": usage.prompt + usage.new,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def _about(head: ResponseHead, kind: str) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _logprobs(asked: GenerationRequest, chances: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if asked.sampling.logprobs is None:
        return None
    content = [
        {**_chance(c), "top_logprobs": [_chance(each) for each in c.alternatives]} for c in chances
    ]
    return {"content": content, "refusal": None}


def _chance(chance: TokenLogprob) -> dict[str, Any]:
    return {"token": chance.text, "logprob": chance.logprob, "bytes": chance.bytes}


PROTOCOL = ApiProtocol("chatcmpl-", ChatBody, response_body, ChatStream)
