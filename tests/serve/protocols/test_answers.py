"""Answers with calls of tools, as each protocol writes them, whole and in pieces; the clients' own
types read them."""

import json
from dataclasses import replace

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from veneer.serve.protocols import chat, completions, messages, responses
from veneer.serve.protocols.answers import (
    AnswerDelta,
    AnswerEnd,
    GeneratedAnswer,
    ResponseHead,
    ToolCall,
    Usage,
    event,
)
from veneer.serve.protocols.request import ChatPrompt, GenerationRequest
from veneer.serve.refusals import Refusal

ECHO = responses.PROTOCOL.read({"model": "m", "input": "x"}).echo
ASKED = GenerationRequest(
    model="m", prompts=(ChatPrompt([]),), stream=True, stream_usage=True, echo=ECHO
)
CALLS = (ToolCall("weather", '{"city":"Bern"}'), ToolCall("time", "{}"))
PIECES = [
    AnswerDelta(0, "Let me "),
    AnswerDelta(0, "see."),
    AnswerDelta(0, "", calls=CALLS[:1]),
    AnswerDelta(0, "", (), CALLS[1:], AnswerEnd("stop")),
]
HEAD = ResponseHead("m", "f", "id-")
USAGE = Usage(prompt=20, cached=16, new=9)


def whole(protocol):
    answer = GeneratedAnswer(0)
    for piece in PIECES:
        answer.add(piece)
    return protocol.PROTOCOL.writer(HEAD, ASKED).whole([answer], USAGE)


def events(protocol, failing=None, asked=ASKED):
    stream = protocol.PROTOCOL.writer(HEAD, asked)
    lines = [*stream.begin(Usage(20, 16, 0))]
    for piece in PIECES:
        lines += stream.write(piece)
    lines += stream.fail(failing) if failing else stream.finish(USAGE)
    data = [line.partition("data: ")[2].strip() for line in "".join(lines).split("\n\n") if line]
    return [json.loads(row) for row in data if row != "[DONE]"], data[-1] == "[DONE]"


def test_chat_has_calls_beside_its_text():
    found = ChatCompletion.model_validate(whole(chat), strict=True)
    message = found.choices[0].message
    assert (message.content, found.choices[0].finish_reason) == ("Let me see.", "tool_calls")
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [
        (c.name, c.arguments) for c in CALLS
    ]
    data, done = events(chat)
    chunks = [ChatCompletionChunk.model_validate(row) for row in data]
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == "Let me see." and done
    made = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    assert [(c.index, c.id, c.function.name) for c in made] == [
        (n, c.id, c.name) for n, c in enumerate(CALLS)
    ]
    assert [choice.finish_reason for choice in deltas if choice.finish_reason] == ["tool_calls"]
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 16 and not chunks[-1].choices


@pytest.mark.parametrize("protocol", [chat, completions])
def test_counts_are_streamed_to_those_who_asked_for_them_alone(protocol):
    with_counts, _ = events(protocol)
    assert [chunk["usage"] is None for chunk in with_counts] == [True] * (len(with_counts) - 1) + [
        False
    ]
    assert with_counts[-1]["choices"] == [] and with_counts[-1]["usage"]["completion_tokens"] == 9
    without, done = events(protocol, asked=replace(ASKED, stream_usage=False))
    assert done and all("usage" not in chunk and chunk["choices"] for chunk in without)


def test_responses_have_an_item_for_each_call():
    found = Response.model_validate(whole(responses))
    assert [item.type for item in found.output] == ["message", "function_call", "function_call"]
    assert found.output[1].arguments == '{"city":"Bern"}' and found.output[1].call_id == CALLS[0].id
    assert found.status == "completed" and found.output_text == "Let me see."
    data, _ = events(responses)
    last = Response.model_validate(data[-1]["response"])
    assert data[-1]["type"] == "response.completed"
    assert [item.type for item in last.output] == ["message", "function_call", "function_call"]
    added = [row["output_index"] for row in data if row["type"] == "response.output_item.added"]
    done = [row["output_index"] for row in data if row["type"] == "response.output_item.done"]
    assert added == done == [0, 1, 2]


def test_messages_have_a_block_for_each_call():
    found = whole(messages)
    assert [block["type"] for block in found["content"]] == ["text", "tool_use", "tool_use"]
    assert found["content"][1]["input"] == {"city": "Bern"} and found["stop_reason"] == "tool_use"
    assert found["usage"]["input_tokens"] == 4 and found["usage"]["cache_read_input_tokens"] == 16
    data, _ = events(messages)
    starts = [row["index"] for row in data if row["type"] == "content_block_start"]
    stops = [row["index"] for row in data if row["type"] == "content_block_stop"]
    assert starts == stops == [0, 1, 2]
    inputs = [
        e["delta"]["partial_json"]
        for e in data
        if e.get("delta", {}).get("type") == "input_json_delta"
    ]
    assert list(map(json.loads, inputs)) == [{"city": "Bern"}, {}]
    assert data[-2]["delta"]["stop_reason"] == "tool_use"


def test_an_event_is_one_line_whatever_a_client_takes_for_the_end_of_one():
    text = "".join(map(chr, [*range(32), 0x85, 0x2028, 0x2029])) + "é\U0001f600"
    for protocol in (chat, messages, responses):
        stream = protocol.PROTOCOL.writer(HEAD, ASKED)
        lines = "".join([*stream.begin(Usage()), *stream.write(AnswerDelta(0, text))])
        assert lines.splitlines() == lines.split("\n")[:-1]
        assert "é\U0001f600" in lines
    assert json.loads(event({"x": text}).removeprefix("data: ")) == {"x": text}


@pytest.mark.parametrize(
    "protocol", [chat, responses, messages], ids=lambda each: each.__name__.rpartition(".")[2]
)
def test_a_failure_on_the_way_is_an_event(protocol):
    data, _ = events(protocol, Refusal(503, "out of memory", code="out_of_memory"))
    last = data[-1]
    error = last.get("error") or last["response"]["error"]
    assert error["message"] == "out of memory" and error["code"] == "out_of_memory"
