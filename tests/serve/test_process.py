"""`veneer serve` as a process: what it says, what it answers, how it ends."""

import asyncio
import gc
import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.serve.server import BASE, add_adapter, read_status, running, server_process
from tests.support.tiny import save_tiny
from veneer import api
from veneer.cli.main import main
from veneer.errors import ConfigError
from veneer.library.library import Library
from veneer.serve.http import connection
from veneer.serve.run import listening, run

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_tiny(folder / "tiny-llama", "llama_untied")
    library = Library(folder / "adapters")
    base = api.load(str(folder / "tiny-llama"))
    add_adapter(library, folder / "made", "tickets", 1, base)
    return folder


@pytest.fixture
def process(places):
    with server_process(places / "tiny-llama", places / "adapters") as started:
        yield started


def test_it_says_what_it_serves_and_ends_when_those_that_are_open_are_answered(process, places):
    told = [process.stdout.readline().rstrip("\n") for _ in range(5)]
    assert told[0] == "tiny-llama · 1 adapter · tickets"
    assert "no API key required" in told[2] and told[4].strip() == "Ctrl-C stops the server"
    assert told[3].endswith("/ in a browser: base and adapters side by side")
    assert all(len(line) <= 80 for line in told)
    assert str(places) not in "\n".join(told)
    url = re.search(r"http://127\.0\.0\.1:\d+", told[2])[0]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [card.id for card in client.models.list()] == ["tiny-llama", "tickets"]
    stream = client.chat.completions.create(
        model="tickets",
        messages=HELLO,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    next(chunks)
    process.send_signal(signal.SIGTERM)
    reasons = [
        choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason
    ]
    assert reasons == ["length"]
    out, log = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "stopped\n")
    lines = log.splitlines()
    assert all(
        re.fullmatch(r"\d\d:\d\d:\d\d (GET|POST) /v1/\S+ 200 \d+ ms [0-9a-f]+", line)
        for line in lines
    ), log
    assert all(len(line) <= 80 for line in lines) and "hello" not in log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


def test_a_library_given_by_a_relative_path_hides_no_word_of_an_error(places, monkeypatch):
    monkeypatch.chdir(places)
    Path("tickets").symlink_to("adapters")  # the name of an adapter too
    with server_process(places / "tiny-llama", Path("tickets")) as started:
        url = re.search(r"http\S+(?=/v1)", "".join(started.stdout.readline() for _ in "123"))[0]
        body = {"lora_name": "alias", "lora_path": "nobody"}
        refused = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60)
    message = refused.json()["error"]["message"]
    assert message == "no adapter 'nobody' in the library. There is: tickets."


LONG = {"model": BASE, "messages": HELLO, "max_tokens": 900, "ignore_eos": True}


def ended_by(places, signals, caplog, drain_seconds):
    """A streamed and a whole answer of 9 s that are open when the signals come: (events, status,
    error, seconds)."""
    with (
        caplog.at_level("ERROR"),
        running(Library(places / "adapters"), drain_seconds=drain_seconds) as server,
        server.unhurried(),
        ThreadPoolExecutor(1) as beside,
        server.http() as http,
        http.stream("POST", CHAT, json={**LONG, "stream": True}) as stream,
    ):
        lines = stream.iter_lines()
        assert next(lines)
        whole = beside.submit(server.post, CHAT, LONG)
        while server.service.loop.open_answers < 2:
            time.sleep(0.01)
        began = time.monotonic()
        for _ in range(signals):
            server.server.handle_exit(signal.SIGTERM, None)
        if signals == 1:
            assert server.http().get("/readyz").status_code == 503, "asked by a new connection"
            refused = server.post(CHAT, LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert server.http().get("/healthz").status_code == 200
        events = [line for line in lines if line]
        found = whole.result(30)
        while server.server.servers[0].is_serving():
            time.sleep(0.01)
        seconds = time.monotonic() - began
    assert [record.getMessage() for record in caplog.records] == []
    return events, found, seconds


@pytest.mark.parametrize(
    ("signals", "drain_seconds"), [(1, 0.7), (2, 60.0)], ids=["time is over", "a second signal"]
)
def test_answers_that_outlive_the_drain_end_with_an_error_and_without_a_traceback(
    places, signals, drain_seconds, caplog, monkeypatch
):
    monkeypatch.setattr(
        signal, "signal", lambda *of: None
    )  # signals are told to the server, in its thread
    events, found, seconds = ended_by(places, signals, caplog, drain_seconds)
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert (found.status_code, found.json()["error"]["code"], found.headers["retry-after"]) == (
        503,
        "shutting_down",
        "1",
    )
    assert seconds < 4


def test_a_request_that_waits_for_anything_else_is_answered_503_when_the_server_ends(
    places, caplog, monkeypatch
):
    """Its prompt never comes back from the tokenizer, say."""
    monkeypatch.setattr(connection, "ENDING_SECONDS", 0.1)

    async def never(*of, **more):
        await asyncio.sleep(600)

    asks = {
        CHAT: LONG,
        "/v1/completions": {"model": BASE, "prompt": "a", "stream": True},
        "/tokenize": {"prompt": "a"},
    }
    with (
        running(Library(places / "adapters"), drain_seconds=0.1) as server,
        ThreadPoolExecutor(len(asks)) as beside,
    ):
        monkeypatch.setattr(server.service.prompts, "encoded", never)
        asked = [beside.submit(server.post, *ask) for ask in asks.items()]
        while len(server.server.server_state.tasks) < len(asks):
            time.sleep(0.01)
        server.server.handle_exit(signal.SIGTERM, None)
        answers = [request.result(30) for request in asked]
    assert [answer.status_code for answer in answers] == [503] * len(asks)
    assert {answer.json()["error"]["code"] for answer in answers} == {"shutting_down"}
    assert not any(record.exc_info for record in caplog.records)


def test_a_body_that_is_still_arriving_does_not_outlive_the_drain(places, caplog):
    with running(Library(places / "adapters"), drain_seconds=0.1) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            header = (
                f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type:"
                " application/json\r\ncontent-length: 9\r\n"
            )
            client.sendall(f"{header}\r\n{{".encode())
            while not server.server.server_state.tasks:
                time.sleep(0.01)
            began = time.monotonic()
            server.server.handle_exit(signal.SIGTERM, None)
            assert read_status(client) == 503 and client.recv(1) == b""
            assert time.monotonic() - began < 3
    assert not any(record.levelname == "ERROR" for record in caplog.records)


def test_elsewhere_than_on_this_machine_a_key_is_needed(places, capsys, monkeypatch):
    for name in ("VENEER_API_KEY", "VENEER_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert main(["serve", "--base", "smollm2-135m", "--host", "0.0.0.0"]) == 2
    told = capsys.readouterr().err
    assert "no API key is required" in told and "--new-key use --keys FILE" in told


def test_a_key_is_shown_once_and_kept_as_its_hash(tmp_path, capsys):
    file = tmp_path / "keys"
    assert main(["serve", "--new-key", "admin", "--keys", str(file)]) == 0
    out = capsys.readouterr()
    assert re.fullmatch(r"vn-[0-9a-f]{64}\n", out.out)
    assert out.out.strip() not in file.read_text() and file.read_text().startswith("admin ")
    assert main(["serve", "--new-key", "use"]) == 2


def test_what_cannot_be_served_is_an_error_with_what_to_do(places, tmp_path, capsys):
    base = str(places / "tiny-llama")
    assert main(["serve"]) == 2
    assert "--base" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    assert main(["serve", "--base", base, "--library", str(tmp_path / "other")]) == 2
    assert "not a library" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["--library", str(places / "adapters"), "--cache-mib", "8", "--port", str(port)]
        assert main(["serve", "--base", base, *words]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert (
        main(["serve", "--base", base, "--library", str(places / "adapters"), "--pin", "nobody"])
        == 2
    )
    assert "nobody" in capsys.readouterr().err


def test_a_host_that_is_not_found_is_refused_with_the_systems_words(monkeypatch):
    """Its error number is below 0: `os.strerror` does not know it."""

    def look_up(host, port, **settings):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ConfigError, match=r"somewhere:80: .*Name or service not known"):
        listening("somewhere", 80)


def test_a_connection_that_is_used_again_waits_for_no_acknowledgement():
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_while_it_serves_nobody_searches_what_was_loaded_for_garbage():
    class Fake:
        async def serve(self, sockets):
            self.frozen, self.left = gc.get_freeze_count(), len(gc.get_objects())

    server = Fake()
    run(server, [])
    assert server.frozen > 10 * server.left
    assert gc.get_freeze_count() == 0


def test_help_shows_a_request(capsys):
    assert main(["serve", "--help"]) == 0
    assert "/v1/chat/completions" in capsys.readouterr().out
