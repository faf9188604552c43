"""Clients that send nothing, send slowly, do not read, or are too many: they are let go, and others
are answered."""

import json
import socket
import time
from types import SimpleNamespace

import pytest

from tests.serve.server import BASE, read_status, running
from veneer.library.library import Library
from veneer.serve import limits
from veneer.serve.http import connection as connection_module
from veneer.serve.http.connection import Connection, Connections
from veneer.serve.http.open_files import RESERVED_FILES, raise_open_files, room_for_connections

HEADER = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
BODY = json.dumps({"model": BASE, "prompt": [5], "max_tokens": 2}).encode()
WHOLE = HEADER + b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(Library(tmp_path_factory.mktemp("library") / "adapters")) as found:
        yield found


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.4)
    monkeypatch.setattr(limits, "KEEP_ALIVE_SECONDS", 0.4)
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.4)
    monkeypatch.setattr(connection_module, "LATE_SECONDS", 0.0)


def connected(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def closed_after(sent, client, seconds=10.0):
    """Seconds until the server closes a connection on which these bytes are sent again and again,
    and what it said."""
    began, said = time.monotonic(), b""
    client.settimeout(0.1)
    while time.monotonic() - began < seconds:
        try:
            if sent:
                client.sendall(sent)
            part = client.recv(2**16)
        except TimeoutError:
            continue
        except OSError:  # it is closed, and we have sent more
            part = b""
        if not part:
            return time.monotonic() - began, said
        said += part
    raise AssertionError(f"it is still open: {said!r}")


@pytest.mark.parametrize("sent", [b"", b"x"], ids=["nothing", "a header byte by byte"])
def test_a_connection_without_a_whole_header_is_closed(server, short, sent):
    with connected(server) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nx: " if sent else b"")
        assert 0.3 < closed_after(sent, client)[0] < 5
    with connected(server) as client:  # after an answer too
        client.sendall(WHOLE)
        assert read_status(client) == 200
        client.sendall(b"GET /healthz HTTP/1.1\r\nx: " if sent else b"")
        assert 0.2 < closed_after(sent, client)[0] < 5


def test_a_connection_may_be_idle_between_two_requests_longer_than_a_header_takes(
    server, short, monkeypatch
):
    monkeypatch.setattr(limits, "KEEP_ALIVE_SECONDS", 60.0)
    with connected(server) as client:
        for _ in range(2):
            client.sendall(WHOLE)
            assert read_status(client) == 200
            time.sleep(0.8)
        client.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert 0.3 < closed_after(b"", client)[0] < 5


def test_a_body_that_comes_byte_by_byte_is_not_waited_for_though_nobody_reads_it(server, short):
    with connected(server) as client:  # refused for its type, before the body
        client.sendall(
            HEADER.replace(b"application/json", b"text/plain") + b"content-length: 1000\r\n\r\n"
        )
        seconds, said = closed_after(b" ", client)
    assert said.startswith(b"HTTP/1.1 415") and seconds < 5


def test_an_answer_may_take_longer_than_a_header(server, short):
    body = json.dumps(
        {"model": BASE, "prompt": [5], "max_tokens": 120, "ignore_eos": True}
    ).encode()
    with server.unhurried(), connected(server) as client:
        client.sendall(HEADER + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        began = time.monotonic()
        assert read_status(client) == 200
        assert time.monotonic() - began > 0.8


def test_where_too_many_are_open_the_one_that_is_idle_longest_goes(server, monkeypatch):
    state = server.server.server_state
    monkeypatch.setattr(state, "most", 4)
    silent = [connected(server) for _ in range(30)]
    try:
        for _ in range(3):
            with connected(server) as client:
                client.sendall(WHOLE)
                assert read_status(client) == 200
        assert len(state.connections) <= state.most + 1
        closed_after(b"", silent[0])
    finally:
        for client in silent:
            client.close()


def test_as_many_as_the_limit_stay_open(server, monkeypatch):
    state = server.server.server_state
    for client in list(state.idle):
        server.service.loop.events.call_soon_threadsafe(client.drop)
    while state.connections:
        time.sleep(0.01)
    monkeypatch.setattr(state, "most", 4)
    clients = [connected(server) for _ in range(4)]
    try:
        for client in clients[::-1]:
            client.sendall(WHOLE)
            assert read_status(client) == 200
        assert len(state.connections) == 4
    finally:
        for client in clients:
            client.close()


def test_where_all_are_being_answered_one_more_is_told_to_come_again(server, monkeypatch):
    state = server.server.server_state
    body = json.dumps(
        {"model": BASE, "prompt": [5], "max_tokens": 900, "ignore_eos": True}
    ).encode()
    with server.unhurried(), connected(server) as first:
        first.sendall(HEADER + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        while not server.service.loop.open_answers:
            time.sleep(0.01)
        monkeypatch.setattr(state, "most", len(state.connections) - len(state.idle))
        for client in list(state.idle):
            server.service.loop.events.call_soon_threadsafe(client.drop)
        with connected(server) as second:
            assert closed_after(b"", second)[1].startswith(b"HTTP/1.1 503")


def test_a_client_that_does_not_read_is_let_go(monkeypatch):
    clocks = []

    def call_later(seconds, function):
        clocks.append(
            (seconds, function, SimpleNamespace(cancel=lambda: cancelled.append(seconds)))
        )
        return clocks[-1][2]

    aborted, cancelled = [], []
    client = object.__new__(Connection)
    client.flow = SimpleNamespace(pause_writing=lambda: None, resume_writing=lambda: None)
    client.loop = SimpleNamespace(call_later=call_later)
    client.transport = SimpleNamespace(abort=lambda: aborted.append(1))
    client.pause_writing()
    client.resume_writing()
    assert cancelled == [limits.STALLED_SECONDS]
    client.pause_writing()
    clocks[-1][1]()
    assert aborted == [1]


@pytest.mark.parametrize(("files", "most"), [(1024, 464), (256, 80), (20, 8), (2**20, 8192)])
def test_connections_leave_files_for_everything_else(files, most, monkeypatch):
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, files))
    connections, at_once = room_for_connections()
    assert connections == most and connections + 4 * at_once <= max(files - 64, 16)
    assert at_once > 0 and Connections(most).most == most


def test_a_server_asks_for_two_files_a_connection(monkeypatch):
    resource, asked = pytest.importorskip("resource"), []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 2**20))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, pair: asked.append(pair))
    raise_open_files()
    assert asked == [(2 * limits.MOST_CONNECTIONS + RESERVED_FILES, 2**20)]


def test_a_server_raises_the_soft_limit_of_open_files_towards_the_hard_one():
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        raise_open_files()
        raised, same = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert same == hard and raised in (hard, 2 * limits.MOST_CONNECTIONS + RESERVED_FILES)
        if raised != hard:
            assert room_for_connections()[0] == limits.MOST_CONNECTIONS
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (raised, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
