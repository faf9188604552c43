"""/v1/chat/completions: OpenAI's chat, with vLLM's fields.

Source: platform.openai.com/docs/api-reference/chat, read by the client's own types (openai 3.5).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from veneer.bounds import LOGPROBS
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
from veneer.serve.protocols.conversation import MESSAGES, VARIABLES, conversation, variables
from veneer.serve.protocols.fields import Field, Flag, Num, Only, Refused, read_fields
from veneer.serve.protocols.request import ChatPrompt, GenerationRequest
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
from veneer.serve.protocols.tools import TOOL_CHOICE, TOOLS, wanted_call
from veneer.serve.refusals import Fault, Refusal, refuse

FIELDS = (
    MODEL,
    Field("messages", MESSAGES, "the conversation; text alone", required=True),
    Field("max_tokens", NEW, "where the answer is cut; default: where the model's positions end"),
    Field("max_completion_tokens", NEW, "the same"),
    *OPENAI,
    Field("logprobs", Flag(), "tell each token's chance"),
    Field("top_logprobs", Num(LOGPROBS), "and so many of the likeliest; with logprobs"),
    *STREAM,
    Field("tools", TOOLS, "functions that the model may call"),
    VARIABLES,
    Field("tool_choice", TOOL_CHOICE, "whether it calls them"),
    Field(
        "parallel_tool_calls", Only((True,), "an answer may hold several calls"), "", no_effect=True
    ),
    RESPONSE_FORMAT,
    *STRUCTURED,
    *OTHERS,
    *WITHOUT_EFFECT,
    Field("store", Only((False,), "nothing is kept here"), "", no_effect=True),
    Field("modalities", Only((["text"],), "answers are text"), "", no_effect=True),
    Field("reasoning_effort", Only(("none",), "the template decides"), "", no_effect=True),
    Field("verbosity", Only(("medium",), "ask in words"), "", no_effect=True),
    Field("prompt", Refused("use messages, or ask /v1/completions"), ""),
    Field("functions", Refused("use tools"), ""),
    Field("function_call", Refused("use tool_choice"), ""),
    Field("audio", Refused("answers are text"), ""),
    Field("prediction", Refused("leave it out"), ""),
    Field("web_search_options", Refused("this server reaches no other"), ""),
    Field("echo", Only((False,), "the prompt is not repeated"), "", no_effect=True),
    Field("add_generation_prompt", Only((True,), "an answer is begun"), "", no_effect=True),
    Field("continue_final_message", Only((False,), "an answer is begun anew"), "", no_effect=True),
    Field("add_special_tokens", Only((False,), "the template writes them"), "", no_effect=True),
    Field("chat_template", Refused("the base's own is used"), ""),
    Field("documents", Refused("put them into a message"), ""),
    Field("mm_processor_kwargs", Refused("text alone is read"), ""),
)


def read_request(body: dict[str, Any]) -> GenerationRequest:
    """Refusal: 400 with all that is wrong."""
    values = read_fields(FIELDS, body)
    found = sampled(
        values, logprobs=values.get("top_logprobs", 0) if values.get("logprobs") else None
    )
    faults = []
    most = [values[name] for name in ("max_tokens", "max_completion_tokens") if name in values]
    if len(set(most)) > 1:
        faults.append(
            Fault(
                "max_tokens", f"is {most[0]:,}, and max_completion_tokens is {most[1]:,}: give one"
            )
        )
    if values.get("top_logprobs") is not None and not values.get("logprobs"):
        faults.append(Fault("top_logprobs", "is only for answers with logprobs: set logprobs"))
    if faults:
        raise refuse(faults)
    messages, tools = conversation(values["messages"], values.get("tools"))
    shape = wanted_call(values) or shape_of(values)
    return GenerationRequest(
        model=values["model"],
        prompts=(
            ChatPrompt(
                messages, None if values.get("tool_choice") == "none" else tools, variables(values)
            ),
        ),
        max_new_tokens=most[0] if most else None,
        shape=shape,
        parses_calls=bool(tools) and values.get("tool_choice") != "none",
        **found,
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


PROTOCOL = ApiProtocol("chatcmpl-", read_request, response_body, ChatStream)
