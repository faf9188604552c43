"""/v1/chat/completions: OpenAI's chat, with vLLM's fields.

Source: platform.openai.com/docs/api-reference/chat, read by the client's own types (openai 3.5).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from veneer.bounds import LOGPROBS
from veneer.decoding.sampling.sampling import Sampling
from veneer.serve.protocols.answer_formats import ShapedBody, only_shape
from veneer.serve.protocols.answers import (
    AnswerDelta,
    ApiProtocol,
    GeneratedAnswer,
    ResponseHead,
    TokenLogprob,
    ToolCall,
    Usage,
)
from veneer.serve.protocols.body import (
    NO_EFFECT,
    Length,
    NotSupported,
    Num,
    Object,
    OnlyFalse,
    OnlyTrue,
)
from veneer.serve.protocols.chunks import ChoiceWriter
from veneer.serve.protocols.conversation import (
    Messages,
    TemplateVariables,
    conversation,
    dump_messages,
)
from veneer.serve.protocols.request import GenerationRequest
from veneer.serve.protocols.sampling_body import ChoicesBody, NewTokens
from veneer.serve.protocols.tools import FunctionChoice, ToolChoice, Tools, required_call
from veneer.serve.refusals import Fault


class ChatBody(TemplateVariables, ShapedBody, ChoicesBody):
    """The body of /v1/chat/completions."""

    messages: Messages
    """the conversation; text only"""
    max_tokens: NewTokens | None = None
    """longest answer; default: as long as the model's positions allow"""
    max_completion_tokens: NewTokens | None = None
    """the same"""
    logprobs: bool = False
    """return the log probability of each token"""
    top_logprobs: Annotated[int, Num(LOGPROBS)] | None = None
    """also return this many of the likeliest tokens; requires logprobs"""
    tools: Tools | None = None
    """functions that the model may call"""
    tool_choice: ToolChoice | None = None
    """whether it calls them"""
    parallel_tool_calls: OnlyTrue = True
    """an answer may have several calls"""
    store: OnlyFalse = False
    """nothing is stored here"""
    modalities: Annotated[list[Literal["text"]], Length(1, 1), NO_EFFECT] = Field(
        default_factory=list
    )
    """answers are text"""
    reasoning_effort: Annotated[Literal["none"], NO_EFFECT] = "none"
    """set by the chat template"""
    verbosity: Annotated[Literal["medium"], NO_EFFECT] = "medium"
    """say it in the prompt"""
    echo: OnlyFalse = False
    """the prompt is not repeated"""
    add_generation_prompt: OnlyTrue = True
    """a new answer begins"""
    continue_final_message: OnlyFalse = False
    """a new answer begins"""
    add_special_tokens: OnlyFalse = False
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
    """there is no replacement"""
    web_search_options: NotSupported = None
    """this server does not search the web"""
    chat_template: NotSupported = None
    """the base's own is used"""
    documents: NotSupported = None
    """put them in a message"""
    mm_processor_kwargs: NotSupported = None
    """only text is read"""

    def conflicts(self) -> Iterator[Fault]:
        yield from super().conflicts()
        first, second = self.max_tokens, self.max_completion_tokens
        if first is not None and second not in (None, first):
            reason = f"is {first:,}, and max_completion_tokens is {second:,}: give one"
            yield Fault("max_tokens", reason)
        if self.top_logprobs is not None and not self.logprobs:
            yield Fault("top_logprobs", "is only for answers with logprobs: set logprobs")

    def sampling(self, **settings: Any) -> Sampling:
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return super().sampling(logprobs=logprobs, **settings)

    def generation_request(self) -> GenerationRequest:
        choice = self.tool_choice
        tool = choice.function if isinstance(choice, FunctionChoice) else choice
        prompt = conversation(
            dump_messages(self.messages),
            self.tools,
            choice=tool,
            variables=self.chat_template_kwargs,
        )
        return replace(
            self.request_for(prompt),
            max_new_tokens=self.max_tokens or self.max_completion_tokens,
            shape=only_shape(required_call(self.tools, tool), *self.shapes()),
        )


class ChatWriter(ChoiceWriter):
    """Streams each answer's role first, then its text and calls, then its end."""

    response_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, head: ResponseHead, request: GenerationRequest) -> None:
        super().__init__(head, request)
        self._call_counts: Counter[int] = Counter()

    def answer_fields(self, answer: GeneratedAnswer) -> Object:
        message: Object = {
            "role": "assistant",
            "content": answer.text if answer.text or not answer.calls else None,
            "refusal": None,
        }
        if answer.calls:
            message["tool_calls"] = [_tool_call(call) for call in answer.calls]
        return {"message": message}

    def text_fields(self, text: str) -> Object:
        return {"delta": {"content": text}}

    def logprobs(self, tokens: Sequence[TokenLogprob], offset: int = 0) -> Object:
        content = [
            {**_token(token), "top_logprobs": [*map(_token, token.alternatives)]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def begin(self, usage: Usage) -> Iterator[str]:
        for index in range(self.request.choices):
            yield self.chunk(index, {"delta": {"role": "assistant", "content": ""}})

    def write(self, delta: AnswerDelta) -> Iterator[str]:
        index = delta.index
        if delta.logprobs:
            yield self.chunk(index, self.text_fields(delta.text), self.logprobs(delta.logprobs))
        elif delta.text:
            yield self.text_chunk(index, delta.text)
        for call in delta.calls:
            numbered = {"index": self._call_counts[index], **_tool_call(call)}
            self._call_counts[index] += 1
            yield self.chunk(index, {"delta": {"tool_calls": [numbered]}})
        if delta.end is not None:
            called = [ToolCall("", "")] if self._call_counts[index] else []
            yield self.chunk(index, {"delta": {}}, None, delta.end, called)


def _tool_call(call: ToolCall) -> Object:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _token(token: TokenLogprob) -> Object:
    return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes}


PROTOCOL = ApiProtocol("chatcmpl-", ChatBody, ChatWriter)
