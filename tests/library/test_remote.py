"""Versions go to other places and come back to the byte; what arrives otherwise never appears."""

import base64
import errno
import functools
import http.server
import json
import threading
from pathlib import Path

import pytest

from veneer.cli.main import main
from veneer.errors import (
    ConfigError,
    CorruptFileError,
    DoesNotFitError,
    SourceError,
    UnsafeFileError,
    VeneerError,
)
from veneer.files.atomic import MANIFEST
from veneer.formats.adapter import WEIGHTS_NAME
from veneer.library.library import Library
from veneer.library.remote.remote import FolderRemote
from veneer.library.remote.transfer import pull, push, remote_at

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def library(tmp_path, sources) -> Library:
    found = Library(tmp_path / "mine")
    found.add(sources / "a", name="x", tags=["best"], note="the first")
    found.add(sources / "b", name="x")
    return found


@pytest.fixture(params=["folder", "file", "memory"])
def address(request, tmp_path):
    if request.param == "memory":
        yield "memory://shelf/adapters"
        fsspec.filesystem("memory").rm("/shelf", recursive=True)
    else:
        yield ("file://" if request.param == "file" else "") + str(tmp_path / "theirs")


def same_bytes(one: Path, other: Path) -> bool:
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def test_a_version_goes_and_comes_back_to_the_byte(library, address, tmp_path):
    assert push(library, "x@best", address).reference == "x@1"
    assert push(library, "x", address).reference == "x@2"
    back = Library(tmp_path / "back")
    assert pull(back, address, "x@best").version.note == "the first"
    assert pull(back, address, "x", name="other").reference == "other@1"
    assert same_bytes(back.path("x"), library.path("x@1"))
    assert same_bytes(back.path("other"), library.path("x@2"))
    assert back.get("x").version.facts == library.get("x@1").version.facts
    assert back.get("x").version.tags == ["best"]
    assert all(faults == [] for faults in back.verify().values())
    assert not list((back.folder / "incoming").glob("[!.]*"))


def test_the_same_bytes_are_not_sent_again_and_an_unknown_name_lists_what_is_there(
    library, address
):
    assert not push(library, "x@1", address).skipped
    assert push(library, "x@1", address).skipped
    assert [v.version for v in remote_at(address).record("x").versions] == [1]
    with pytest.raises(SourceError, match="There is: x"):
        pull(library, address, "y")
    with pytest.raises(ConfigError, match="there is no x@7"):
        pull(library, address, "x@7")


def cut_after(monkeypatch, remote_class, pieces: int):
    """The connection breaks after so many bytes of the tensor file; returns the offsets that were
    asked for."""
    real, offsets = remote_class.read, []

    def read(self, path, offset):
        if path.endswith(WEIGHTS_NAME):
            offsets.append(offset)
            piece = b"".join(real(self, path, offset))
            if len(offsets) == 1:
                yield piece[:pieces]
                raise SourceError("the connection broke")
            yield piece
        else:
            yield from real(self, path, offset)

    monkeypatch.setattr(remote_class, "read", read)
    return offsets


def test_what_was_cut_off_goes_on_where_it_stopped(library, tmp_path, monkeypatch):
    back = Library(tmp_path / "back")
    offsets = cut_after(monkeypatch, FolderRemote, 1000)
    with pytest.raises(SourceError, match="broke"):
        pull(back, str(library.folder), "x")
    assert back.entries() == [] and not list(back.objects.iterdir())
    assert pull(back, str(library.folder), "x").reference == "x@1"
    assert offsets == [0, 1000]
    assert same_bytes(back.path("x"), library.path("x"))


def test_a_wrong_piece_from_before_is_fetched_anew(library, tmp_path):
    back = Library(tmp_path / "back")
    version = library.get("x").version
    incoming = back.folder / "incoming" / version.object
    incoming.mkdir(parents=True)
    (back.folder / "library.json").write_text('{"format_version": 1}')
    (incoming / WEIGHTS_NAME).write_bytes(b"wrong" * 20)
    pull(back, str(library.folder), "x")
    assert same_bytes(back.path("x"), library.path("x"))


@pytest.mark.parametrize("what", [WEIGHTS_NAME, "adapter_config.json", MANIFEST])
@pytest.mark.parametrize("how", ["flip", "cut", "grow", "remove"])
def test_what_arrives_changed_is_refused_and_never_appears(library, tmp_path, what, how):
    path = library.path("x") / what
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {
        "flip": lambda: path.write_bytes(data),
        "cut": lambda: path.write_bytes(data[:-7]),
        "grow": lambda: path.write_bytes(path.read_bytes() + b"x"),
        "remove": path.unlink,
    }[how]()
    back = Library(tmp_path / "back")
    with pytest.raises((CorruptFileError, SourceError)):
        pull(back, str(library.folder), "x")
    assert back.entries() == [] and list(back.objects.iterdir()) == []


def test_an_object_that_climbs_out_of_its_folder_is_refused(library, tmp_path):
    """A hostile store may name any file in a manifest whose hash is right."""
    import hashlib
    import shutil

    for name in ("../../../evil", "evil.py", "/tmp/evil", "adapter_config.json/x"):
        theirs = Library(shutil.copytree(library.folder, tmp_path / f"theirs{len(name)}"))
        folder = theirs.path("x")
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        text = json.dumps(manifest)
        fake = hashlib.sha256(text.encode()).hexdigest()
        (folder / MANIFEST).write_text(text)
        folder.rename(folder.with_name(fake))
        record = json.loads((theirs.names / "x.json").read_text())
        record["versions"][-1]["object"] = fake
        (theirs.names / "x.json").write_text(json.dumps(record))
        with pytest.raises(CorruptFileError, match="not a file of an adapter"):
            pull(Library(tmp_path / "back"), str(theirs.folder), "x")


def test_a_record_that_lies_is_not_believed(library, tmp_path):
    path = library.names / "x.json"
    record = json.loads(path.read_text())
    record["versions"][-1]["facts"] |= {"base_proof": "fingerprint", "base": "something else"}
    path.write_text(json.dumps(record))
    assert (
        pull(Library(tmp_path / "back"), str(library.folder), "x").version.facts.base
        == "tiny-llama_untied"
    )


def test_a_push_that_breaks_shows_nothing_and_goes_on(library, monkeypatch):
    memory = fsspec.filesystem("memory")
    real = type(memory).put_file

    def broken(self, source, *rest, **options):
        if source.endswith(MANIFEST):
            raise OSError("broken pipe")
        return real(self, source, *rest, **options)

    monkeypatch.setattr(type(memory), "put_file", broken)
    with pytest.raises(VeneerError, match="broken pipe"):
        push(library, "x", "memory://broken")
    assert remote_at("memory://broken").record("x") is None
    monkeypatch.setattr(type(memory), "put_file", real)
    push(library, "x", "memory://broken")
    assert remote_at("memory://broken").record("x") is not None
    memory.rm("/broken", recursive=True)


def test_unknown_addresses_and_missing_packages_are_named(library):
    with pytest.raises(ConfigError, match="xyz"):
        push(library, "x", "xyz://place")
    with pytest.raises(VeneerError, match="is not the address of a repository"):
        pull(library, "hf://../x")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(handler) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_library_that_a_web_server_shows_can_be_pulled_from(library, tmp_path, serve):
    pytest.importorskip("aiohttp")
    address = serve(functools.partial(_Quiet, directory=str(library.folder)))
    back = Library(tmp_path / "back")
    pull(back, address, "x@best")
    assert same_bytes(back.path("x"), library.path("x@1"))
    with pytest.raises(SourceError, match="no adapter 'y'"):
        pull(back, address, "y")
    with pytest.raises(ConfigError, match="read-only"):
        push(library, "x", address)


# the hub


class Hub:
    """As much of the hub's interface as one repository needs: its listing, its files, one
    commit."""

    def __init__(self) -> None:
        self.commits: list[dict[str, bytes]] = [{}]

    @property
    def sha(self) -> str:
        return f"{len(self.commits):040x}"

    def handler(self):
        hub = self

        class Handler(_Quiet):
            protocol_version = "HTTP/1.1"

            def _answer(
                self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
            ) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def _json(self, value) -> None:
                self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def do_GET(self):
                path = self.path.partition("?")[0]
                if path.startswith("/api/models/org/repo"):
                    files = hub.commits[-1]
                    return self._json(
                        {
                            "id": "org/repo",
                            "sha": hub.sha,
                            "siblings": [
                                {"rfilename": n, "size": len(c)} for n, c in files.items()
                            ],
                        }
                    )
                if path.startswith(f"/org/repo/resolve/{hub.sha}/"):
                    content = hub.commits[-1].get(path.rpartition("/")[2])
                    if content is not None:
                        etag = f'"{len(content)}-{hub.sha}"'
                        return self._answer(200, content, {"ETag": etag, "X-Repo-Commit": hub.sha})
                return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

            do_HEAD = do_GET  # noqa: N815

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                if path == "/api/repos/create":
                    return self._json(
                        {
                            "url": f"http://{self.headers['Host']}/org/repo",
                            "name": "org/repo",
                            "id": "org/repo",
                        }
                    )
                if path == "/api/validate-yaml":
                    return self._json({"errors": [], "warnings": []})
                if "/preupload/" in path:
                    asked = json.loads(body)["files"]
                    return self._json(
                        {
                            "files": [
                                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                for f in asked
                            ]
                        }
                    )
                if "/commit/" in path:
                    lines = [json.loads(line) for line in body.splitlines()]
                    files = {
                        line["value"]["path"]: base64.b64decode(line["value"]["content"])
                        for line in lines
                        if line["key"] == "file"
                    }
                    hub.commits.append(hub.commits[-1] | files)
                    return self._json(
                        {
                            "commitUrl": f"http://{self.headers['Host']}/org/repo/commit/{hub.sha}",
                            "commitOid": hub.sha,
                        }
                    )
                return self._answer(404)

        return Handler


@pytest.fixture
def hub(serve, monkeypatch, tmp_path):
    import huggingface_hub.constants as constants
    from huggingface_hub import hf_api

    found = Hub()
    address = serve(found.handler())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return found


def test_the_hub_takes_an_adapter_in_one_commit_and_gives_it_back(library, hub, tmp_path):
    moved = push(
        library, "x@1", "hf://org/repo", lambda entry, folder: f"card of {entry.reference}"
    )
    assert len(hub.commits) == 2 and hub.commits[-1]["README.md"] == b"card of x@1"
    assert moved.reference == f"org/repo@{hub.sha}"
    back = Library(tmp_path / "back")
    entry = pull(back, "hf://org/repo")
    assert entry.reference == "repo@1" and same_bytes(back.path("repo"), library.path("x@1"))
    assert "org/repo at 0000" in entry.version.note
    assert not list((back.folder / "incoming").iterdir())


def test_a_repository_that_peft_wrote_is_marked_as_unverified(hub, library, tmp_path, sources):
    files = {path.name: path.read_bytes() for path in (sources / "p").iterdir()}
    hub.commits.append(files | {"README.md": b"hello", "evil.py": b"import os"})
    entry = pull(library, "hf://org/repo", name="theirs")
    assert entry.version.facts.base_proof == "unverified"
    assert not (library.path("theirs") / "evil.py").exists()


def test_a_hub_pickle_a_giant_and_a_changed_file_are_refused(hub, library, sources):
    config = (sources / "p" / "adapter_config.json").read_bytes()
    hub.commits.append({"adapter_config.json": config, "adapter_model.bin": b"x"})
    with pytest.raises(UnsafeFileError, match="pickle"):
        pull(library, "hf://org/repo")
    push(library, "x", "hf://org/repo")
    hub.commits[-1].pop("adapter_model.bin")
    hub.commits[-1][WEIGHTS_NAME] = hub.commits[-1][WEIGHTS_NAME][:-4] + b"abcd"
    with pytest.raises(CorruptFileError, match="not what was pushed"):
        pull(library, "hf://org/repo")
    assert "repo" not in library.all_names()


def test_a_repository_that_is_not_there_is_told(hub, library):
    with pytest.raises(SourceError, match="cannot be read"):
        pull(library, "hf://org/nothing")
    with pytest.raises(SourceError, match="holds no adapter"):
        pull(library, "hf://org/repo")


def test_the_commands_say_where_it_went(library, tmp_path, capsys):
    folder = ["--library", str(library.folder)]
    assert main(["adapters", "push", "x@1", str(tmp_path / "t"), *folder]) == 0
    assert "x@1" in capsys.readouterr().out
    assert (
        main(["adapters", "pull", str(tmp_path / "t"), "x", "--name", "y", "--json", *folder]) == 0
    )
    assert json.loads(capsys.readouterr().out)["reference"] == "y@1"
    assert main(["adapters", "pull", str(tmp_path / "t"), *folder]) == 2


def test_a_disk_that_is_full_while_the_hub_gives_is_told_as_such(
    hub, library, tmp_path, monkeypatch
):
    push(library, "x", "hf://org/repo")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(DoesNotFitError, match="the disk is full"):
        pull(Library(tmp_path / "other"), "hf://org/repo")
