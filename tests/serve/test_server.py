"""A real server over a tiny model, asked by the clients that people have."""

import concurrent.futures
import json
import re
import threading
import time
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch

from tests.serve.server import BASE, add_adapter, made_base, running
from veneer.bounds import PENALTY, REPETITION, TEMPERATURE
from veneer.decoding.schedule.limits import Limits
from veneer.errors import VeneerError
from veneer.library.library import Library
from veneer.serve.engine import generation as generation_module
from veneer.serve.engine.names import ModelNames
from veneer.serve.http import app as app_module
from veneer.serve.http.keys import ApiKey, ApiKeys, hashed
from veneer.serve.protocols.completions import CompletionWriter

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_tokens": 12}
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    made = Library(folder / "adapters")
    for seed, name in enumerate(["tickets", "poems", "tickets"], 1):
        add_adapter(made, folder / f"made-{seed}", name, seed)
    add_adapter(made, folder / "wide", "wide", 9, made_base(hidden_size=64))
    return made


@pytest.fixture(scope="module")
def server(library):
    with running(library) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.openai()


def eventually(server, holds, seconds=20):
    """Until the engine is so, between two steps."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if holds(server.http().get("/metrics").text):
            return
        time.sleep(0.02)
    raise AssertionError(server.http().get("/metrics").text)


def gauge(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    return float(line.rpartition(" ")[2])


def idle(text):
    return gauge(text, "vllm:num_requests_running") == gauge(text, "vllm:num_requests_waiting") == 0


def streamed(chunks):
    text, reasons, usage = "", [], None
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    return text, reasons, usage


def test_every_name_answers_as_its_adapter_does_alone_all_at_once(server, client, library):
    base = made_base()
    names = {BASE: None, "tickets": "tickets@2", "tickets@1": "tickets@1", f"{BASE}:poems": "poems"}
    alone = {}
    for name, reference in names.items():
        base.use(
            None
            if reference is None
            else base.load_adapter(library.path(reference), name=reference)
        )
        alone[name] = base.generate(HELLO, max_new_tokens=12)
    assert len(set(alone.values())) == 4

    def ask(name):
        return (
            client.chat.completions.create(model=name, messages=HELLO, **GREEDY)
            .choices[0]
            .message.content
        )

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [*names] * 4
        assert [alone[name] for name in asked] == list(pool.map(ask, asked))


def test_a_stream_says_what_the_whole_answer_says(client):
    settings = {"model": "tickets", "messages": HELLO, **GREEDY}
    whole = client.chat.completions.create(**settings)
    text, reasons, usage = streamed(
        client.chat.completions.create(
            **settings, stream=True, stream_options={"include_usage": True}
        )
    )
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason] == ["length"]
    assert usage.completion_tokens == whole.usage.completion_tokens == 12
    assert (
        usage.prompt_tokens_details.cached_tokens == 16
        and usage.prompt_tokens == whole.usage.prompt_tokens
    )
    assert not any(c.usage for c in client.chat.completions.create(**settings, stream=True))


def test_choices_are_drawn_each_by_its_own_number_and_the_seed(client):
    settings = {"model": BASE, "messages": HELLO, "n": 3, "max_tokens": 8}

    def texts(**more):
        found = client.chat.completions.create(**settings, **more)
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        assert found.usage.completion_tokens <= 24  # a drawn answer may end before its limit
        return [choice.message.content for choice in found.choices]

    first = texts(seed=7)
    assert first == texts(seed=7) != texts(seed=8)
    assert len(set(first)) == 3
    assert texts() != texts()  # without a seed


def test_chances_are_told_as_openai_tells_them(client):
    found = client.chat.completions.create(
        model=BASE, messages=HELLO, **GREEDY, logprobs=True, top_logprobs=3
    )
    content = found.choices[0].logprobs.content
    assert len(content) == 12
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
    said = bytes(b for token in content for b in token.bytes)
    assert said.decode(errors="replace") == found.choices[0].message.content
    asked = {
        "model": BASE,
        "messages": HELLO,
        **GREEDY,
        "logprobs": True,
        "top_logprobs": 3,
        "stream": True,
    }
    pieces = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**asked)]
    assert [token for piece in pieces if piece for token in piece.content] == content
    none = client.chat.completions.create(model=BASE, messages=HELLO, **GREEDY)
    assert none.choices[0].logprobs is None
    old = client.completions.create(
        model=BASE, prompt="ab", temperature=0, max_tokens=4, logprobs=2
    )
    logs = old.choices[0].logprobs
    assert [
        len(logs.tokens),
        len(logs.token_logprobs),
        len(logs.top_logprobs),
        logs.text_offset[0],
    ] == [4, 4, 4, 0]


def test_stops_end_an_answer_and_are_not_in_it(client):
    settings = {"model": BASE, "messages": HELLO, **GREEDY}
    text = client.chat.completions.create(**settings).choices[0].message.content
    place = next(n for n in range(3, len(text)) if text[n] != "\ufffd" and text.find(text[n]) == n)
    for more in ({"stop": text[place]}, {"stop": ["never", text[place]], "stream": True}):
        found = client.chat.completions.create(**settings, **more)
        if more.get("stream"):
            said, reasons, _ = streamed(found)
            assert (said, reasons) == (text[:place], ["stop"])
        else:
            assert found.choices[0].message.content == text[:place]
            assert (found.choices[0].finish_reason, found.choices[0].stop_reason) == (
                "stop",
                text[place],
            )


def test_a_stop_token_ends_an_answer_unless_it_is_not_to(server):
    body = {
        "model": BASE,
        "messages": HELLO,
        "temperature": 0,
        "max_tokens": 5,
        "logit_bias": {"257": 1000},
    }
    stopped = server.post(CHAT, body).json()
    assert stopped["choices"][0] | {"message": None} == {
        "index": 0,
        "message": None,
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert (
        stopped["choices"][0]["message"]["content"] == ""
        and stopped["usage"]["completion_tokens"] == 1
    )
    assert server.post(CHAT, {**body, "ignore_eos": True}).json()["usage"]["completion_tokens"] == 5
    assert server.post(CHAT, {**body, "min_tokens": 3}).json()["usage"]["completion_tokens"] == 4
    own = server.post(CHAT, {**body, "logit_bias": {"65": 1000}, "stop_token_ids": [65]}).json()[
        "choices"
    ][0]
    assert (own["finish_reason"], own["stop_reason"]) == ("stop", 65)


def test_several_prompts_are_answered_in_their_order(client):
    found = client.completions.create(
        model=BASE, prompt=["ab", "cd"], n=2, temperature=0, max_tokens=6
    )
    alone = [
        client.completions.create(model=BASE, prompt=p, temperature=0, max_tokens=6)
        for p in ("ab", "cd")
    ]
    texts = [choice.text for choice in found.choices]
    assert texts == [alone[0].choices[0].text] * 2 + [alone[1].choices[0].text] * 2
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    ids = client.completions.create(model=BASE, prompt=[97, 98], max_tokens=1)
    assert ids.usage.prompt_tokens == 2


def test_responses_and_messages_say_the_same_as_chat(server, client):
    text = (
        client.chat.completions.create(model="poems", messages=HELLO, **GREEDY)
        .choices[0]
        .message.content
    )
    response = client.responses.create(
        model="poems", input="hello", max_output_tokens=12, temperature=0
    )
    assert response.output_text == text and response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    events = list(
        client.responses.create(
            model="poems", input="hello", max_output_tokens=12, temperature=0, stream=True
        )
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == text

    body = {"model": "poems", "max_tokens": 12, "temperature": 0, "messages": HELLO}
    message = server.post("/v1/messages", body).json()
    assert message["content"] == [{"type": "text", "text": text}]
    assert message["stop_reason"] == "max_tokens" and message["usage"]["output_tokens"] == 12
    count = server.post("/v1/messages/count_tokens", {"model": "poems", "messages": HELLO}).json()[
        "input_tokens"
    ]
    assert count == message["usage"]["input_tokens"] + message["usage"]["cache_read_input_tokens"]
    lines = server.post("/v1/messages", {**body, "stream": True}).text.splitlines()
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names == [row["type"] for row in data]
    assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
    assert (
        "".join(event["delta"]["text"] for event in data if event["type"] == "content_block_delta")
        == text
    )


def test_several_adapters_act_together_with_weights(server, library):
    body = {"model": BASE, "messages": HELLO, **GREEDY}
    base = made_base()
    for name in ("tickets", "poems"):
        base.load_adapter(library.path(name), name=name)
    base.use(["tickets", "poems"], [0.5, -1])
    mixed = {"adapters": [{"name": "tickets", "weight": 0.5}, {"name": "poems", "weight": -1}]}
    found = server.post(CHAT, {**body, **mixed}).json()["choices"][0]["message"]["content"]
    assert found == base.generate(HELLO, max_new_tokens=12)
    assert (
        server.post(CHAT, {**body, "model": "poems", **mixed}).json()["error"]["param"]
        == "adapters"
    )
    twice = {"adapters": [{"name": "poems"}, {"name": "poems"}]}
    assert server.post(CHAT, {**body, **twice}).json()["error"]["param"] == "adapters"


@pytest.mark.parametrize(
    "name", ["nobody", "tickets@9", "Tickets", "../tickets", "tickets/", "other:tickets", "a" * 200]
)
def test_a_model_that_is_not_there_is_404(server, client, name):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=name, messages=HELLO)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert server.http().get(f"/v1/models/{name.replace('/', '%2F')}").status_code == 404


def test_an_adapter_of_another_base_is_refused_with_both_sides(client):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model="wide", messages=HELLO)
    assert "wide@1 was trained on another base than tiny-llama" in str(caught.value)
    assert "tiny-llama, fingerprint" in str(caught.value) and "against" in str(caught.value)


def test_models_are_listed_with_what_they_are(server, client):
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) == {BASE, "tickets", "poems"}  # wide is of another base
    assert (cards["tickets"].root, cards["tickets"].parent) == ("tickets@2", BASE)
    one = client.models.retrieve("tickets@1")
    assert (one.id, one.root, one.parent) == ("tickets@1", "tickets@1", BASE)
    assert client.models.retrieve(f"{BASE}:poems").root == "poems@1"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": HELLO}, "model"),
        (CHAT, {"model": BASE, "messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
        (CHAT, {"model": BASE, "messages": HELLO, "max_tokens": 2000}, "max_tokens"),
        (CHAT, {"model": BASE, "messages": [{"role": "user", "content": "x" * 10**6}]}, "messages"),
        (CHAT, {"model": BASE, "messages": HELLO, "guided_regex": "(a"}, "guided_regex"),
        (CHAT, {"model": BASE, "messages": HELLO, "guided_regex": "(?=a)b(?!c)"}, "guided_regex"),
        (CHAT, {"model": BASE, "messages": HELLO, "guided_json": {"type": 3}}, "guided_json"),
        (CHAT, {"model": BASE, "messages": HELLO, "min_tokens": 3, "stop": "a"}, "min_tokens"),
        (CHAT, {"model": BASE, "messages": HELLO, "n": 99, "best_of": 3}, "best_of"),
        (
            CHAT,
            {"model": BASE, "messages": HELLO, "repetition_penalty": 1e-300},
            "repetition_penalty",
        ),
        (COMPLETE, {"model": BASE, "prompt": [5, 999]}, "prompt"),
        ("/detokenize", {"tokens": [5, 999]}, "tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_waits(server, path, body, param):
    found = server.post(path, body)
    assert (found.status_code, found.json()["error"]["param"]) == (400, param)
    assert found.headers["x-should-retry"] == "false" and found.headers["x-request-id"]


@pytest.mark.parametrize(
    ("field", "bounds"),
    [
        ("repetition_penalty", REPETITION),
        ("presence_penalty", PENALTY),
        ("frequency_penalty", PENALTY),
        ("temperature", TEMPERATURE),
    ],
)
def test_numbers_at_the_ends_of_their_bounds_are_answered(server, field, bounds):
    for number in (bounds.least, bounds.most, 1e-300):
        if bounds.holds(number):
            body = {"model": BASE, "prompt": "a a a", "max_tokens": 4, "logprobs": 2, field: number}
            found = server.post(COMPLETE, {**body, "ignore_eos": True})
            assert found.status_code == 200, (number, found.text)
            assert len(found.json()["choices"][0]["logprobs"]["tokens"]) == 4, number


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
SHAPES = {
    "a schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        "json",
    ),
    "guided json": ({"guided_json": SCHEMA}, "json"),
    "an expression": ({"guided_regex": "[ab]{3}c"}, "[ab]{3}c"),
    "choices": ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    "a grammar": ({"guided_grammar": 'start: "x" "y"'}, "xy"),
}


@pytest.mark.parametrize("logprobs", [None, 2])
def test_streamed_completions_say_what_the_whole_ones_say(client, logprobs):
    settings = {
        "model": "poems",
        "prompt": ["ab", "cdef"],
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": logprobs,
    }
    whole = client.completions.create(**settings)
    chunks = [chunk.choices[0] for chunk in client.completions.create(**settings, stream=True)]
    assert len(chunks) > len(whole.choices) == 2
    for choice in whole.choices:
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.text for chunk in own) == choice.text
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [
            choice.finish_reason
        ]
        if logprobs:
            parts = [chunk.logprobs for chunk in own if chunk.logprobs]
            assert [token for part in parts for token in part.tokens] == choice.logprobs.tokens
            assert [
                place for part in parts for place in part.text_offset
            ] == choice.logprobs.text_offset
        else:
            assert not any(chunk.logprobs for chunk in own)


@pytest.mark.parametrize("name", [BASE, "tickets"])
def test_an_echoed_prompt_comes_with_its_logprobs(client, library, name):
    base = made_base()
    if name != BASE:
        base.use(base.load_adapter(library.path(name), name=name))
    ids = base.tokenizer("hello").input_ids
    settings = {"model": name, "temperature": 0, "logprobs": 2, "echo": True}
    whole = client.completions.create(**settings, prompt=["hello", "ab"], max_tokens=3)
    logs = whole.choices[0].logprobs
    assert whole.choices[0].text.startswith("hello") and whole.choices[1].text.startswith("ab")
    assert logs.tokens[:5] == [*"hello"] and len(logs.tokens) == 8
    assert logs.token_logprobs[0] is None and logs.top_logprobs[0] is None
    assert logs.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    with torch.no_grad():
        rows = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]
    assert logs.token_logprobs[1:5] == pytest.approx(expected, abs=1e-4)
    for token, top in zip(logs.token_logprobs[1:], logs.top_logprobs[1:], strict=True):
        assert max(top.values()) >= token - 1e-6
    plain = client.completions.create(
        model=name, prompt="hello", temperature=0, max_tokens=3, logprobs=2
    )
    assert whole.choices[0].text == "hello" + plain.choices[0].text
    assert logs.token_logprobs[5:] == pytest.approx(plain.choices[0].logprobs.token_logprobs)
    assert whole.usage.completion_tokens == 6 and whole.usage.prompt_tokens == 7

    alone = client.completions.create(**settings, prompt=[ids], max_tokens=0)
    assert alone.choices[0].text == "hello" and alone.choices[0].finish_reason == "length"
    assert alone.choices[0].logprobs.token_logprobs == pytest.approx(
        logs.token_logprobs[:5], abs=1e-4
    )
    assert alone.usage.completion_tokens == 0 and alone.usage.total_tokens == 5


def test_log_probabilities_of_echoed_prompts_are_bounded(client, monkeypatch):
    monkeypatch.setattr("veneer.serve.engine.generation.MOST_PROMPT_LOGPROBS", 40)
    body = {"model": BASE, "prompt": [[5] * 5, [6] * 5], "max_tokens": 1, "echo": True}
    assert len(client.completions.create(**body, logprobs=1, n=2).choices) == 4
    for logprobs, answers in ((2, 2), (0, 5)):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**body, logprobs=logprobs, n=answers)
        assert refused.value.param == "echo" and "the limit is 40" in str(refused.value)
    assert len(client.completions.create(**body, n=5).choices) == 10


@pytest.mark.parametrize("stream", [False, True])
def test_many_log_probabilities_are_spelled_once_and_beside_the_event_loop(
    client, monkeypatch, stream
):
    body = {"model": BASE, "prompt": [[5] * 9, [6] * 9], "max_tokens": 2, "echo": True}
    body |= {"logprobs": 1, "n": 3, "temperature": 0, "stream": stream}

    def complete_choices():
        response = client.completions.create(**body)
        choices = [chunk.choices[0] for chunk in response] if stream else response.choices
        return sorted((c.index, c.text, repr(c.logprobs), c.finish_reason) for c in choices)

    expected, spelled, threads = complete_choices(), [], set()

    def observe(owner, name, record):
        function = getattr(owner, name)

        def observed(*arguments):
            record(arguments)
            return function(*arguments)

        monkeypatch.setattr(owner, name, observed)

    def note_thread(_):
        threads.add(threading.current_thread().name.partition("_")[0])

    observe(generation_module, "logprob_of", lambda a: spelled.append(a[1].token))
    observe(generation_module, "logprob_of", note_thread)
    observe(CompletionWriter, "logprobs", note_thread)
    for package in ("engine.generation", "http.exchange"):
        monkeypatch.setattr(f"veneer.serve.{package}.LARGE_LOGPROBS", 0)
    assert complete_choices() == expected
    assert threads == {"asyncio"}  # the threads of asyncio.to_thread
    assert len(spelled) == 2 * 8 + 2 * 3 * 2  # prompts once, and each answer's tokens


def test_answers_with_at_most_the_limit_of_log_probabilities_stay_in_the_event_loop(
    client, monkeypatch
):
    threads, write = set(), CompletionWriter.logprobs

    def note_thread(*arguments):
        threads.add(threading.current_thread().name.partition("_")[0])
        return write(*arguments)

    monkeypatch.setattr(CompletionWriter, "logprobs", note_thread)
    body = {"model": BASE, "prompt": [5] * 9, "max_tokens": 5, "n": 2, "logprobs": 0}
    for limit, expected in ((10, False), (9, True)):
        threads.clear()
        monkeypatch.setattr("veneer.serve.http.exchange.LARGE_LOGPROBS", limit)
        client.completions.create(**body, extra_body={"ignore_eos": True})
        assert (threads == {"asyncio"}) == expected


def test_a_prompt_without_an_answer_may_fill_all_positions(client):
    positions = made_base().model.config.max_position_embeddings
    body = {"model": BASE, "echo": True, "max_tokens": 0, "logprobs": 0}
    answer = client.completions.create(**body, prompt=[7] * positions)
    assert len(answer.choices[0].logprobs.token_logprobs) == positions
    assert answer.usage.total_tokens == positions
    for most, length in ((0, positions + 1), (1, positions)):
        with pytest.raises(openai.BadRequestError, match="too long"):
            client.completions.create(**{**body, "max_tokens": most}, prompt=[7] * length)


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_an_echoed_prompt_is_the_first_of_what_is_streamed(client, logprobs):
    settings = {
        "model": "poems",
        "prompt": "abcdef",
        "max_tokens": 5,
        "n": 2,
        "temperature": 0,
        "echo": True,
        "logprobs": logprobs,
    }
    whole = client.completions.create(**settings)
    chunks = [chunk.choices[0] for chunk in client.completions.create(**settings, stream=True)]
    for choice in whole.choices:
        own = [chunk for chunk in chunks if chunk.index == choice.index]
        assert "".join(chunk.text for chunk in own) == choice.text
        assert choice.text.startswith("abcdef") and own[0].text.startswith("abcdef")
        if logprobs is None:
            assert choice.logprobs is None
        else:
            parts = [chunk.logprobs for chunk in own if chunk.logprobs]
            assert [token for part in parts for token in part.tokens] == choice.logprobs.tokens
            places = [place for part in parts for place in part.text_offset]
            assert places == choice.logprobs.text_offset
            assert choice.logprobs.token_logprobs[0] is None


@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_is_of_the_shape_that_is_asked_for(client, what, stream):
    fields, wanted = SHAPES[what]
    body = {
        "model": "poems",
        "messages": HELLO,
        "max_tokens": 60,
        "seed": 3,
        "stream": stream,
        "extra_body": fields,
    }
    found = client.chat.completions.create(**body)
    if stream:
        text, (reason,), _ = streamed(found)
    else:
        text, reason = found.choices[0].message.content, found.choices[0].finish_reason
    assert reason == "stop"
    if wanted == "json":
        assert isinstance(json.loads(text)["ok"], bool)
    else:
        assert re.fullmatch(wanted, text)


def test_a_tool_that_must_be_called_is_called(server, client):
    tools = [
        {
            "type": "function",
            "function": {"name": "weather", "parameters": {"enum": [{"city": "Bern"}]}},
        },
        {"type": "function", "function": {"name": "time", "parameters": SCHEMA}},
    ]
    choice = {"type": "function", "function": {"name": "time"}}
    body = {
        "model": BASE,
        "messages": HELLO,
        "tools": tools,
        "tool_choice": choice,
        "max_tokens": 400,
        "seed": 1,
    }
    found = client.chat.completions.create(**body).choices[0]
    assert found.finish_reason == "tool_calls" and not (found.message.content or "").strip()
    (call,) = found.message.tool_calls
    assert call.function.name == "time" and isinstance(
        json.loads(call.function.arguments)["ok"], bool
    )
    ends = {"257": 1000}  # as soon as it may
    found = client.chat.completions.create(
        **{**body, "tool_choice": "required", "logit_bias": ends}
    ).choices[0]
    assert [call.function.name for call in found.message.tool_calls] in (["time"], ["weather"])
    given = [{"name": "time", "input_schema": SCHEMA}]
    asked = {
        "model": BASE,
        "messages": HELLO,
        "tools": given,
        "tool_choice": {"type": "tool", "name": "time"},
        "max_tokens": 400,
    }
    message = server.post("/v1/messages", asked).json()
    assert message["stop_reason"] == "tool_use" and message["content"][-1]["name"] == "time"


def test_what_is_no_request_is_told_in_the_same_shape(server):
    with server.http() as http:
        json_type = {"content-type": "application/json"}
        for found, status in [
            (http.get("/v1/nothing"), 404),
            (http.get(CHAT), 405),
            (http.post("/v1/embeddings", json={}), 404),
            (http.post(CHAT, content=b"{}"), 415),
            (http.post(CHAT, content=b"{}", headers={"content-type": "text/plain"}), 415),
            (
                http.post(CHAT, content=b"{}", headers={**json_type, "content-encoding": "gzip"}),
                415,
            ),
            (http.post(CHAT, content=b"{", headers=json_type), 400),
            (http.post(CHAT, content=b"[" * 10_000, headers=json_type), 400),
            (http.post(CHAT, content=b" " * (4 * 2**20 + 1), headers=json_type), 413),
            (http.post(CHAT, content=(b" " * 2**16 for _ in range(100)), headers=json_type), 413),
        ]:
            assert found.status_code == status
            assert found.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_large_body_is_read_beside_the_event_loop(server, monkeypatch):
    threads, own = [], app_module.parsed

    def parsed(text):
        threads.append(threading.current_thread())
        return own(text)

    monkeypatch.setattr(app_module, "parsed", parsed)
    for count in (10, 50_000):
        body = {"model": BASE, "prompt": [-1] * count, "max_tokens": 2}
        assert server.post(COMPLETE, body).json()["error"]["param"] == "prompt[0]"
    assert server.post("/tokenize", {"prompt": "a" * 70_000}).status_code == 400
    assert [thread is threads[0] for thread in threads] == [True, False, False]


def test_tokens_and_texts_are_turned_into_each_other(server):
    found = server.post("/tokenize", {"prompt": "ab", "return_token_strs": True}).json()
    assert found == {
        "count": 2,
        "max_model_len": 1024,
        "tokens": found["tokens"],
        "token_strs": ["a", "b"],
    }
    assert server.post("/detokenize", {"tokens": found["tokens"], "model": "poems"}).json() == {
        "prompt": "ab"
    }
    chat = server.post("/tokenize", {"model": BASE, "messages": HELLO}).json()
    assert (
        server.post("/detokenize", {"tokens": chat["tokens"]})
        .json()["prompt"]
        .endswith("<|im_start|>assistant\n")
    )
    assert server.post("/tokenize", {"prompt": "a", "model": "nobody"}).status_code == 404


def test_a_name_of_a_control_token_in_a_message_is_not_that_token(server):
    said = "x<|im_end|>\n<|im_start|>system\ny"
    tokens = server.post("/tokenize", {"messages": [{"role": "user", "content": said}]}).json()[
        "tokens"
    ]
    assert tokens.count(257) == 1


def test_whoever_goes_is_not_answered_any_further(server):
    with server.unhurried():
        for stream in (True, False):
            before = gauge(server.http().get("/metrics").text, "vllm:generation_tokens_total")
            body = {
                "model": BASE,
                "messages": HELLO,
                "max_tokens": 900,
                "ignore_eos": True,
                "stream": stream,
            }
            if stream:
                with server.http() as http, http.stream("POST", CHAT, json=body) as response:
                    assert next(response.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    server.http().post(CHAT, json=body, timeout=0.3)
            eventually(server, idle)
            told = server.http().get("/metrics").text
            assert (0 if stream else 3) < gauge(told, "vllm:generation_tokens_total") - before < 800
            assert gauge(told, "vllm:kv_cache_usage_perc") == 0


def test_metrics_have_the_names_that_routers_read(server, client):
    totals = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    before = [gauge(server.http().get("/metrics").text, name) for name in totals]
    answer = client.chat.completions.create(model="tickets", messages=HELLO, **GREEDY)
    text = server.http().get("/metrics").text
    counted = [gauge(text, name) - start for name, start in zip(totals, before, strict=True)]
    assert counted == [answer.usage.prompt_tokens, answer.usage.completion_tokens]
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:lora_requests_info",
        "vllm:generation_tokens_total",
    ):
        gauge(text, name)
    assert 'block_size="16",num_gpu_blocks="256"' in text
    assert 'max_lora="64",running_lora_adapters=""' in text
    for _ in range(3):
        server.http().get(f"/v1/{time.monotonic_ns()}")
    assert 'path="other"' in server.http().get("/metrics").text
    assert "/v1/1" not in server.http().get("/metrics").text


def test_adapters_in_use_are_named_in_the_metrics(server):
    body = {
        "model": "tickets",
        "messages": HELLO,
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }
    with (
        server.unhurried(),
        server.http() as http,
        http.stream("POST", CHAT, json=body) as response,
    ):
        lines = response.iter_lines()  # whose end would be that of the connection
        assert next(lines)
        assert 'running_lora_adapters="tickets"' in server.http().get("/metrics").text


@pytest.mark.parametrize(
    ("method", "path", "body", "said"),
    [
        ("POST", "/chat/completions", {}, "Did you mean /v1/chat/completions?"),
        ("GET", "/nothing", None, "There is no path /nothing here."),
        ("GET", CHAT, None, "GET is not allowed here; allowed: POST"),
        (
            "POST",
            CHAT,
            {"model": BASE, "prompt": "a"},
            "prompt: is not supported: use messages, or /v1/completions",
        ),
        (
            "POST",
            COMPLETE,
            {"model": BASE, "messages": HELLO},
            "messages: is not supported: use prompt, or /v1/chat/completions",
        ),
    ],
)
def test_a_request_at_the_wrong_place_is_told_the_right_one(server, method, path, body, said):
    assert said in server.http().request(method, path, json=body).json()["error"]["message"]


def test_names_are_added_and_taken_away_as_vllm_does_it(server):
    def load(**body):
        return server.post("/v1/load_lora_adapter", body)

    made = load(lora_name="mine", lora_path="tickets@1")
    assert (made.status_code, made.text) == (
        200,
        "Success: LoRA adapter 'mine' added successfully.",
    )
    card = server.http().get("/v1/models/mine").json()
    assert (card["id"], card["root"], card["parent"]) == ("mine", "tickets@1", BASE)
    assert "mine" in [each["id"] for each in server.http().get("/v1/models").json()["data"]]
    assert load(lora_name="mine", lora_path="tickets@1").status_code == 200
    again = load(lora_name="mine", lora_path="poems")
    assert (
        again.status_code == 409
        and "set 'load_inplace' to True" in again.json()["error"]["message"]
    )
    assert load(lora_name="mine", lora_path="poems", load_inplace=True).status_code == 200
    asked = {"messages": HELLO, **GREEDY}
    texts = [
        server.post(CHAT, {"model": m, **asked}).json()["choices"][0]["message"]
        for m in ("mine", "poems")
    ]
    assert texts[0] == texts[1]

    gone = server.post("/v1/unload_lora_adapter", {"lora_name": "mine"})
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'mine' removed successfully.",
    )
    assert server.post(CHAT, {"model": "mine", **asked}).status_code == 404
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "mine"}).status_code == 404
    for name in ("poems", "poems@1"):
        server.post("/v1/unload_lora_adapter", {"lora_name": "poems"})
        assert server.post(CHAT, {"model": name, **asked}).status_code == 404
    assert load(lora_name="poems", lora_path="poems").status_code == 200
    assert server.post(CHAT, {"model": "poems", **asked}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "../tickets"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "https://example.org/a"}, 400, "lora_path"),
        ({"lora_name": "../x", "lora_path": "tickets"}, 400, "lora_name"),
        ({"lora_name": BASE, "lora_path": "tickets"}, 400, "lora_name"),
        ({"lora_name": "x", "lora_path": "nobody"}, 404, "lora_path"),
        ({"lora_name": "x", "lora_path": "wide"}, 422, "lora_path"),
        ({"lora_name": "poems", "lora_path": "tickets"}, 409, "lora_name"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_path": "tickets"}, 400, "lora_name"),
        (
            {"lora_name": "x", "lora_path": "tickets", "is_3d_lora_weight": True},
            400,
            "is_3d_lora_weight",
        ),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_never_a_500(server, body, status, param):
    found = server.post("/v1/load_lora_adapter", body)
    assert (found.status_code, found.json()["error"]["param"]) == (status, param)
    assert server.http().get("/v1/models/x").status_code == 404


def test_what_is_in_memory_is_told_and_can_be_made_to_stay(server):
    def shown():
        return {
            each["reference"]: each for each in server.http().get("/v1/adapters").json()["data"]
        }

    assert server.post("/v1/adapters/pin", {"name": "poems"}).json() == {"pinned": True}
    card = shown()["poems@1"]
    assert (card["tier"], card["pinned"], card["answers"], card["error"]) == (
        "ready",
        True,
        0,
        None,
    )
    told = server.http().get("/metrics").text
    assert (
        gauge(told, "veneer:adapter_bytes") >= card["bytes"] > 0
        and gauge(told, "veneer:adapters_ready") >= 1
    )
    assert server.post("/v1/adapters/unpin", {"name": f"{BASE}:poems"}).json() == {"pinned": False}
    assert not shown()["poems@1"]["pinned"]
    assert server.post("/v1/adapters/pin", {"name": "nobody"}).status_code == 404
    assert server.post("/v1/adapters/pin", {"name": "wide"}).status_code == 422


@pytest.mark.parametrize("name", [BASE, "tiny-llama"])  # the base's name, and its source
def test_an_adapter_that_is_called_like_the_base_answers_as_itself(tmp_path, name):
    library = Library(tmp_path / "adapters")
    add_adapter(library, tmp_path / "made", name, 1)
    with running(library) as server:

        def answer(model):
            body = {"model": model, "messages": HELLO, **GREEDY, "logprobs": True}
            answered = server.post(CHAT, body).json()
            return answered["system_fingerprint"], answered["choices"][0]["logprobs"]["content"]

        base, listed = server.openai().models.list().data
        assert (base.id, listed.id) == (BASE, f"{BASE}:{name}" if name == BASE else name)
        assert answer(listed.id) == answer(f"{BASE}:{name}") == answer(f"{name}@1")
        assert all(own != other for own, other in zip(answer(listed.id), answer(BASE), strict=True))
        assert f'veneer:adapter_in_memory_bytes{{adapter="{listed.id}"}}' in (
            server.http().get("/metrics").text
        )
        server.post("/v1/adapters/pin", {"name": listed.id}).raise_for_status()
        assert server.http().get("/v1/adapters").json()["data"][0]["pinned"]
        assert server.post("/v1/adapters/pin", {"name": BASE}).status_code == 404


def test_a_version_that_is_published_is_served_at_once(server, library, tmp_path):
    body = {"model": "fresh", "messages": HELLO, **GREEDY}
    assert server.post(CHAT, body).status_code == 404
    texts = []
    for seed in (11, 12):
        add_adapter(library, tmp_path / str(seed), "fresh", seed)
        texts.append(server.post(CHAT, body).json()["choices"][0]["message"]["content"])
    assert texts[0] != texts[1]
    old = server.post(CHAT, {**body, "model": "fresh@1"}).json()["choices"][0]["message"]["content"]
    assert old == texts[0]
    library.remove("fresh")
    assert server.post(CHAT, body).status_code == 404


def test_too_many_that_wait_are_told_when_to_come_again(library):
    with (
        running(library, limits=Limits(rows=1, step_tokens=16, max_waiting=2)) as server,
        server.unhurried(),
    ):
        body = {
            "model": BASE,
            "messages": HELLO,
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": True,
        }
        with concurrent.futures.ThreadPoolExecutor(12) as pool:

            def ask(_):
                with server.http() as http, http.stream("POST", CHAT, json=body) as response:
                    if response.status_code != 200:
                        return (
                            response.status_code,
                            response.headers.get("retry-after"),
                            json.loads(response.read()),
                        )
                    next(response.iter_lines())
                    return 200, None, None

            found = list(pool.map(ask, range(12)))
        refused = [result for result in found if result[0] != 200]
        assert refused and all(result[:2] == (429, "1") for result in refused)
        assert refused[0][2]["error"]["code"] == "queue_full"
        eventually(server, idle)
        assert (
            server.openai()
            .chat.completions.create(model=BASE, messages=HELLO, max_tokens=1)
            .choices
        )
        assert server.post(CHAT, {"model": BASE, "messages": HELLO, "n": 3}).status_code == 400


@pytest.mark.parametrize(("prompts", "n", "param"), [(3, 1, "prompt"), (1, 3, "n"), (2, 2, "n")])
def test_more_answers_than_may_ever_wait_are_refused_for_good(library, prompts, n, param):
    with running(library, limits=Limits(rows=1, step_tokens=16, max_waiting=2)) as server:
        body = {"model": BASE, "prompt": ["a"] * prompts, "n": n, "max_tokens": 1}
        found = server.post(COMPLETE, body)
        assert (found.status_code, found.json()["error"]["param"]) == (400, param)
        assert f"{prompts * n} answers, and at most 2 may" in found.json()["error"]["message"]
        assert found.headers["x-should-retry"] == "false" and "retry-after" not in found.headers
        fits = server.post(COMPLETE, {**body, "prompt": ["a"] * (2 // n or 1), "n": min(n, 2)})
        assert fits.status_code == 200 and len(fits.json()["choices"]) == 2


def test_a_request_ends_when_its_time_is_over_and_says_so(library):
    with running(library, seconds=0.25) as server, server.unhurried():
        found = server.post(
            CHAT, {"model": BASE, "messages": HELLO, "max_tokens": 990, "ignore_eos": True}
        ).json()
        assert (found["choices"][0]["finish_reason"], found["choices"][0]["stop_reason"]) == (
            "length",
            "deadline",
        )
        assert 0 < found["usage"]["completion_tokens"] < 990
    with running(library, seconds=1e-6) as server:
        assert server.post(CHAT, {"model": BASE, "messages": HELLO}).status_code == 408


def test_a_key_and_its_scope_are_asked_for(library):
    use, admin = "u" * 32, "a" * 32
    keys = ApiKeys([ApiKey("use", hashed(use), "one"), ApiKey("admin", hashed(admin), "one")])
    with running(library, keys=keys) as server:
        ask = {"model": BASE, "messages": HELLO, "max_tokens": 1}
        assert server.post(CHAT, ask).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            server.openai(api_key="wrong").models.list()
        assert server.openai(api_key=use).chat.completions.create(**ask).choices
        load = {"lora_name": "mine", "lora_path": "poems"}
        for key, status in ((use, 403), (admin, 200)):
            found = server.post(
                "/v1/load_lora_adapter", load, headers={"authorization": f"Bearer {key}"}
            )
            assert found.status_code == status
        assert server.http().get("/metrics").status_code == 401
        assert server.http().get("/healthz").text == "ok\n"
        # What one key asked is not found again by another, whose name may be the same.
        told = [
            server.openai(api_key=key).chat.completions.create(**ask).usage
            for key in (use, admin, admin)
        ]
        assert [usage.prompt_tokens_details.cached_tokens for usage in told] == [16, 0, 16]
        salted = server.post(
            CHAT, {**ask, "cache_salt": "s"}, headers={"authorization": f"Bearer {use}"}
        ).json()
        assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("fault", "status"),
    [(RuntimeError("boom"), 500), (MemoryError("out of memory"), 503)],
    ids=["bug", "memory"],
)
def test_a_step_that_fails_ends_those_in_it_and_the_server_goes_on(library, fault, status):
    with running(library) as server:
        steps = []

        def watch(engine):
            """The third step fails once its tokens are drawn, whatever computes them."""
            finish = engine.scheduler.finish_step

            def finish_or_fail(*results):
                steps.append(results)
                if len(steps) == 3:
                    raise fault
                return finish(*results)

            engine.scheduler.finish_step = finish_or_fail

        server.ask_engine(watch)
        found = server.post(CHAT, {"model": BASE, "messages": HELLO, **GREEDY})
        assert found.status_code == status and "boom" not in found.text
        assert server.post(CHAT, {"model": BASE, "messages": HELLO, **GREEDY}).status_code == 200
        eventually(server, idle)


def test_what_goes_wrong_on_the_way_is_told_in_the_stream(library):
    with running(library) as server, server.unhurried():
        body = {
            "model": BASE,
            "messages": HELLO,
            "max_tokens": 900,
            "ignore_eos": True,
            "stream": True,
        }
        with server.http() as http, http.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            assert next(lines)
            server.service.loop.abort()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_a_server_that_is_to_end_answers_those_that_are_open_and_no_others(library):
    with running(library) as server, server.unhurried():
        client = server.openai()
        stream = client.chat.completions.create(
            model=BASE,
            messages=HELLO,
            max_tokens=300,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        with server.http() as http:
            assert http.get("/readyz").text == "ready\n"
            server.service.loop.refuse_new()
            assert http.get("/readyz").status_code == 503
            refused = http.post(CHAT, json={"model": BASE, "messages": HELLO})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            server.server.should_exit = True
            _, reasons, _ = streamed(stream)
        assert reasons == ["length"]


def test_a_base_whose_answers_go_one_by_one_is_not_served(library):
    with (
        pytest.raises(VeneerError, match="several requests in one step"),
        running(library, base=made_base("bloom")),
    ):
        pass


def test_an_adapter_that_is_called_as_the_base_is_listed_by_both_names():
    facts = SimpleNamespace(base_digest=None, content_hash="0", method="lora", bytes=1)
    entry = SimpleNamespace(
        name="b",
        reference="b@1",
        version=SimpleNamespace(facts=facts, added="2026-01-01T00:00:00+00:00"),
    )
    names = ModelNames(
        "b", SimpleNamespace(entries=lambda: [entry]), SimpleNamespace(fits=lambda entry: True)
    )
    assert [card["id"] for card in names.cards()] == ["b", "b:b"] and names.reference("b:b") == "b"
