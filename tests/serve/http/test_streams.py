"""Pieces of answers that are written where they are told: the bytes that would be sent, in the same
order."""

import asyncio
import http.client
import json
import re
from random import Random

import pytest

from tests.serve.server import BASE, running
from veneer.library.library import Library
from veneer.serve.engine.loop import Inbox, TokenUpdate
from veneer.serve.http.connection import ChunkWriter

HELLO = [{"role": "user", "content": "hello"}]
ASK = {
    "/v1/completions": {"prompt": [97, 98, 99], "max_tokens": 40, "logprobs": 2},
    "/v1/chat/completions": {
        "messages": HELLO,
        "max_tokens": 40,
        "stream_options": {"include_usage": True},
    },
    "/v1/responses": {"input": "hello", "max_output_tokens": 40},
    "/v1/messages": {"messages": HELLO, "max_tokens": 40},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    library = Library(tmp_path_factory.mktemp("library") / "adapters")
    with running(library, lookup="off") as found:  # a piece for each token
        yield found


@pytest.fixture
def written(monkeypatch):
    found, own = [], ChunkWriter.write

    def write(self, body):
        found.append(body)
        own(self, body)

    monkeypatch.setattr(ChunkWriter, "write", write)
    return found


def stream(server, path, body, version=11):
    """Its events, without what is new in each answer."""
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    connection._http_vsn, connection._http_vsn_str = version, f"HTTP/1.{version - 10}"
    whole = {"model": BASE, "temperature": 0, "stream": True, **body}
    named = {"host": host} if version == 10 else {}
    connection.request(
        "POST", path, json.dumps(whole), {"content-type": "application/json", **named}
    )
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    assert answer.status == 200, text
    assert answer.chunked == (version == 11)
    alike = re.sub(r'"([a-z]+[-_])[0-9a-f]{16,}"', r'"\1"', text)
    return re.sub(
        r'"(created|created_at|completed_at|cached_tokens)":[0-9.]+', r'"\1":0', alike
    ).split("\n\n")


@pytest.mark.parametrize("path", ASK)
def test_what_is_written_is_what_would_be_sent(server, written, path):
    stream(server, path, ASK[path], version=10)  # both answers then find their prompt in the cache
    sent = stream(server, path, ASK[path], version=10)  # which knows no chunks
    assert not written and len(sent) > 5
    with server.unhurried():  # each step is heard of before the next
        assert stream(server, path, ASK[path]) == sent
    assert len(written) > 5


def test_an_answer_that_repeats_an_earlier_one_has_its_text_in_fewer_pieces(tmp_path):
    body = {"prompt": [97, 98, 99], "max_tokens": 60, "logprobs": 2}

    def parse_events(events):
        bodies = [json.loads(event[len("data: ") :]) for event in events if "{" in event]
        choices = [choice for body in bodies for choice in body["choices"]]
        tokens = [token for c in choices if c["logprobs"] for token in c["logprobs"]["tokens"]]
        return "".join(choice["text"] for choice in choices), tokens, len(bodies)

    with running(Library(tmp_path / "adapters")) as server:
        first, *_, last = [parse_events(stream(server, "/v1/completions", body)) for _ in range(3)]
    assert first[:2] == last[:2]
    assert last[2] < 0.7 * first[2]


def test_a_piece_follows_those_that_wait_to_be_sent(server, written, monkeypatch):
    body = ASK["/v1/completions"]
    sent = stream(server, "/v1/completions", body, version=10)
    for seed in range(3):
        draw = Random(seed)
        monkeypatch.setattr(
            ChunkWriter, "open", property(lambda self, draw=draw: draw.random() < 0.5)
        )
        written.clear()
        with server.unhurried():
            assert stream(server, "/v1/completions", body) == sent
        assert 0 < len(written) < 39


def test_pieces_of_several_answers_are_sent_together(server, written):
    body = {**ASK["/v1/completions"], "n": 3}
    assert stream(server, "/v1/completions", body) and not written


def test_an_update_is_taken_at_once_only_while_nothing_is_on_its_way():
    updates = [TokenUpdate(0, 0, [number], []) for number in range(9)]

    async def asked():
        inbox, taken, heard = Inbox(every_step=True), [], []
        inbox.take_now = lambda update: taken.append(update) is None

        async def task(times):
            for _ in range(times):
                heard.append(await inbox.next_updates())

        inbox.put(updates[0])  # before anyone asks
        reading = asyncio.create_task(task(2))
        await asyncio.sleep(0)
        inbox.put(updates[1])
        inbox.take_now = lambda update: False
        inbox.put(updates[2])
        inbox.take_now = lambda update: taken.append(update) is None
        inbox.put(updates[3])  # the task has not heard of the one before
        await reading
        inbox.put(updates[4])  # nobody waits
        reading = asyncio.create_task(task(2))
        await asyncio.sleep(0)
        inbox.take_now = lambda update: 1 / 0
        inbox.put(updates[5])
        await reading
        return taken, heard

    taken, heard = asyncio.run(asked())
    assert taken == [updates[1]]
    assert heard[:3] == [updates[:1], updates[2:4], updates[4:5]]
    (failed,) = heard[3]
    assert failed.tokens == [5] and isinstance(failed.error, ZeroDivisionError)
