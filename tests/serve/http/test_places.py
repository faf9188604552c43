"""No message to a client says where anything lies on the server's disk."""

import json
import os
import shutil
import threading

import pytest

from tests.serve.server import BASE, add_adapter, made_base, running
from veneer.formats import header_fit
from veneer.library.library import Library
from veneer.serve.refusals import without_folders

HELLO = [{"role": "user", "content": "hello"}]
SECRET = "private place"
LOAD, UNLOAD, PIN = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters/pin"
BROKEN = ("adapter_config.json", "adapter_model.safetensors", "veneer.json")


def placed(folder, **overrides):
    """A base that lies in a folder, as far as its names go."""
    base = made_base(**overrides)
    base.source = base.name_or_path = str(folder)
    return base


def foreign(library, folder, name):
    """The last version of a name as PEFT would have written it: without a word about its base's
    weights."""
    copied = folder / f"peft-{name}"
    shutil.copytree(library.path(name), copied)
    (copied / "veneer.json").unlink()
    (copied / "MANIFEST.json").unlink(missing_ok=True)
    library.add(copied, name=f"peft-{name}")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A server whose library, base and adapters' bases lie in a folder of one name, and what is
    wrong with each."""
    folder = tmp_path_factory.mktemp("served") / SECRET
    for inner in ("base", "wide"):
        (folder / inner).mkdir(parents=True)
    library = Library(folder / "adapters")
    add_adapter(library, folder / "made", "good", 1, placed(folder / "base"))
    add_adapter(library, folder / "made-wide", "wide", 2, placed(folder / "wide", hidden_size=64))
    foreign(library, folder, "good")
    foreign(library, folder, "wide")
    for number, file in enumerate(BROKEN, 3):
        name = f"broken-{number}"
        add_adapter(library, folder / name, name, number, placed(folder / "base"))
        (library.path(name) / file).write_bytes(b"[1")
    add_adapter(library, folder / "gone", "gone", 8, placed(folder / "base"))
    shutil.rmtree(library.path("gone"))
    (folder / "runs" / "broken").mkdir(parents=True)
    (folder / "runs" / "broken" / "metrics.jsonl").write_text("{\n{\n")
    with running(library, base=placed(folder / "base"), runs=folder / "runs") as server:
        yield server


def names_of(library):
    return [*library.all_names(), "nobody", "good@7", "good@best", SECRET, "../adapters", "goo"]


def requests(names):
    for name in names:
        yield "POST", "/v1/chat/completions", {"model": name, "messages": HELLO, "max_tokens": 2}
        yield (
            "POST",
            "/v1/chat/completions",
            {"model": name, "messages": HELLO, "max_tokens": 2, "stream": True},
        )
        yield "POST", "/v1/completions", {"model": name, "prompt": "a", "max_tokens": 2}
        yield "POST", "/v1/messages", {"model": name, "messages": HELLO, "max_tokens": 2}
        yield "POST", "/v1/responses", {"model": name, "input": "a", "max_output_tokens": 16}
        weighted = [{"name": name, "weight": 0.5}, {"name": "good", "weight": 0.5}]
        yield (
            "POST",
            "/v1/completions",
            {"model": BASE, "prompt": "a", "max_tokens": 2, "adapters": weighted},
        )
        yield "POST", "/tokenize", {"model": name, "messages": HELLO}
        yield "POST", PIN, {"name": name}
        yield "POST", "/v1/adapters/unpin", {"name": name}
        yield "POST", LOAD, {"lora_name": "mine", "lora_path": name}
        yield "POST", UNLOAD, {"lora_name": "mine"}
        yield "GET", f"/v1/models/{name}", None
        yield "GET", f"/v1/adapters/{name}", None
        yield "GET", f"/v1/adapters/good?against={name}", None
    for path in (
        "/v1/models",
        "/v1/adapters",
        "/v1/runs",
        "/v1/runs/broken",
        "/v1/runs/nobody",
        "/metrics",
    ):
        yield "GET", path, None
    for name in names:
        yield "POST", UNLOAD, {"lora_name": name}


def test_what_cannot_fit_the_base_is_not_listed_and_says_why_when_it_is_asked(asked):
    listed = {card["id"] for card in asked.http().get("/v1/models").json()["data"]}
    assert listed.isdisjoint({"wide", "peft-wide"})
    assert {BASE, "good", "peft-good"} <= listed
    for name in ("wide", "peft-wide"):
        answer = asked.post("/v1/chat/completions", {"model": name, "messages": HELLO})
        assert answer.status_code == 422 and name in answer.json()["error"]["message"]


def test_models_are_listed_while_an_adapter_comes_and_are_told_again_after_a_fault_of_the_disk(
    tmp_path, monkeypatch
):
    library, base = Library(tmp_path / "adapters"), made_base()
    add_adapter(library, tmp_path / "good", "good", 1, base)
    foreign(library, tmp_path, "good")
    weights = library.path("peft-good") / "adapter_model.safetensors"
    weights.parent.chmod(0o755)
    weights.rename(tmp_path / "away")
    reads, read = [], header_fit.read_header

    def counted(path):
        reads.append(path)
        if len(reads) == 2:
            raise OSError(24, "Too many open files")
        return read(path)

    monkeypatch.setattr(header_fit, "read_header", counted)
    done = threading.Event()

    def busy():
        with base.routing.changing:
            done.wait(60)

    with running(library, base=base) as server, server.http() as http:

        def listed():
            return "peft-good" in [
                card["id"] for card in http.get("/v1/models").raise_for_status().json()["data"]
            ]

        thread = threading.Thread(target=busy)
        thread.start()
        try:
            assert (
                server.post("/v1/completions", {"model": "goo", "prompt": "a"}).status_code == 404
            )
            assert not reads
            assert not listed()
            (tmp_path / "away").rename(weights)
            assert not listed()  # no file may be opened
            assert listed() and listed() and len(reads) == 3
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("HOME/x is gone", "x is gone"),
        ("no folder HOME.", "no folder ~."),
        ("CWD/x is gone", "x is gone"),
        ("no file HOME/models/x: see", "no file x: see"),
        ("in '/srv/my data/a dir/base' (see)", "in 'base' (see)"),
        ("/Users/Eve/O'Neil/m/x", "x"),
        ("path=/srv/a/b, and /srv/c/d; or /srv/e/f", "path=b, and d; or f"),
        ("/srv/a/b.json:12: wrong", "b.json:12: wrong"),
        ("see file:///srv/a/b", "see b"),
        (r"\\host\share\dir", "dir"),
        (r"C:\models\x", "x"),
        ("/srv/a,b/c/d", "d"),
        ("(/srv/x/y)", "(y)"),
        ("and/or /v1 #/properties/x", "and/or /v1 #/properties/x"),
    ],
)
def test_a_path_is_told_by_its_last_part(text, told, monkeypatch, tmp_path):
    folder = tmp_path / "John Smith"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    assert without_folders(text.replace("HOME", str(folder)).replace("CWD", str(tmp_path))) == told


def test_a_broken_record_is_told_without_the_folder_of_the_library_whoever_asks(tmp_path):
    library = Library(tmp_path / "John Smith" / SECRET / "lib rary")
    add_adapter(library, tmp_path / "made", "good", 1)
    (library.names / "good.json").write_text("{")
    with running(library) as server:
        for method, path, body in requests(["good", "good@1"]):
            answer = server.http().request(method, path, json=body)
            for part in ("Smith", SECRET, "lib rary"):
                assert part not in answer.text, (path, body, answer.text)


def test_no_message_to_a_client_holds_a_path(asked):
    statuses, told = set(), []
    with asked.http(headers={"connection": "close"}) as http:
        for method, path, body in requests(names_of(asked.library)):
            answer = http.request(method, path, json=body)
            statuses.add(answer.status_code)
            sent = [path, json.dumps(body)]
            text = answer.text + "".join(map(str, answer.headers.items()))
            own = SECRET in "".join(sent)  # what a client wrote it may read again
            if (not own and SECRET in text) or os.fspath(asked.library.folder.parent) in text:
                told.append((path, body, answer.text))
    assert not told
    assert {200, 404, 422} <= statuses <= {200, 400, 404, 409, 422}
