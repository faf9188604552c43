"""Where sets of rows come from: files, folders, the hub, object stores and HTTP."""

from __future__ import annotations

import gzip
import http.server
import os
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import parquet

from tests.support.row_files import QA, lines, loaded, prompts, records
from tests.support.tiny import tiny_tokenizer
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Capacity
from veneer.data.files import places
from veneer.data.files.sources import scan_rows
from veneer.data.large import training_data
from veneer.errors import ConfigError, DataError

# where they lie


def test_files_folders_patterns_and_packed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows" / "deep").mkdir(parents=True)
    (tmp_path / "rows" / "a.jsonl").write_bytes(lines(records(2, "a")))
    (tmp_path / "rows" / "b.jsonl.gz").write_bytes(gzip.compress(lines(records(2, "b"))))
    packed = pyarrow.compress(lines(records(2, "c")), codec="zstd", asbytes=True)
    (tmp_path / "rows" / "deep" / "c.jsonl.zst").write_bytes(packed)
    (tmp_path / "rows" / "README.md").write_text("no rows")
    for hidden in (".ipynb_checkpoints/a-checkpoint.jsonl", "deep/._c.jsonl"):
        (tmp_path / "rows" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "rows" / hidden).write_bytes(lines(records(2, "copy")))
    whole = prompts(str(tmp_path / "rows"))
    assert whole == [f"{name} {n}" for name in "abc" for n in range(2)]
    assert prompts(str(tmp_path / "rows" / "*.jsonl*")) == whole[:4]
    assert prompts(str(tmp_path / "rows" / "**" / "*.zst")) == whole[4:]


def test_a_packed_file_that_is_damaged_or_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(records(50)))[:-20])
    (tmp_path / "b.jsonl.gz").write_bytes(lines(records(2)))
    (tmp_path / "c.jsonl.zst").write_bytes(lines(records(2)))
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.jsonl.zst"):
        _, problems = scan_rows(tmp_path / name)
        assert problems[0].code == "D100", name
    with pytest.raises(DataError, match="no row files"):
        scan_rows(str(tmp_path / "*.csv"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="requires named pipes")
def test_a_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.csv", "rows.jsonl.gz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="D100") as caught:
            loaded(str(tmp_path / name), validation_share=0.1)
        assert "not a regular file" in str(caught.value) and "Write the rows into a file" in str(
            caught.value
        )


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


class Hub(MemoryFileSystem):
    """What huggingface_hub shows of one data set: its branch of plain Parquet."""

    protocol = "hf"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("hf://").strip("/")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Hub, "store", {})
    before = fsspec.registry.get("hf")
    fsspec.register_implementation("hf", Hub, clobber=True)
    fs = fsspec.filesystem("hf", skip_instance_cache=True)
    root = "datasets/org/qa@refs/convert/parquet"
    fs.pipe(f"{root}/default/train/0000.parquet", as_parquet([{"question": "x", "answer": "y"}]))
    fs.pipe(f"{root}/default/train/0001.parquet", as_parquet([{"question": "v", "answer": "w"}]))
    fs.pipe(f"{root}/default/test/0000.parquet", as_parquet([{"question": "t", "answer": "u"}]))
    fs.pipe(f"{root}/hard/train/0000.parquet", as_parquet([{"question": "h", "answer": "i"}]))
    yield fs
    fsspec.register_implementation("hf", before or "huggingface_hub.HfFileSystem", clobber=True)


def test_data_sets_of_the_hub_are_plain_parquet_brought_once(hub: Hub, tmp_path: Path) -> None:
    asked = [
        ("org/qa", ["x", "v"]),
        ("hf://datasets/org/qa", ["x", "v"]),
        ("org/qa:test", ["t"]),
        ("org/qa:hard/train", ["h"]),
        ("hf://datasets/org/qa@refs/convert/parquet/hard/train/*.parquet", ["h"]),
    ]
    for name, expected in asked:
        assert prompts(name, columns=QA) == expected, name
    assert len(list((tmp_path / "cache" / "data").rglob("*.parquet"))) == 4
    with pytest.raises(DataError, match="has no validation") as caught:
        scan_rows("org/qa:validation")
    assert "default/test, default/train, hard/train" in str(caught.value)


def test_files_beside_a_data_set_s_parts_are_none_of_it(hub: Hub) -> None:
    root = "datasets/org/qa@refs/convert/parquet"
    for name in ("odd.parquet", "default/odd.parquet"):
        hub.pipe(f"{root}/{name}", as_parquet([{"question": "no", "answer": "no"}]))
    assert prompts("org/qa", columns=QA) == ["x", "v"]


def test_files_that_are_too_many_are_counted_before_one_is_brought(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "MOST_FILES", 1)
    for name in ("org/qa", "hf://datasets/org/qa@refs/convert/parquet/default/train/*.parquet"):
        with pytest.raises(DataError, match="2 files, at most 1 are read"):
            scan_rows(name)
    assert not list((tmp_path / "cache").rglob("*.parquet"))


def test_a_data_set_that_is_not_reached_is_an_error_with_what_to_do(hub: Hub) -> None:
    with pytest.raises(DataError) as caught:
        scan_rows("org/other")
    assert "org/other" in str(caught.value)
    with pytest.raises(ConfigError, match="unknown to fsspec"):
        scan_rows("nothing://rows.jsonl")


def test_any_address_of_fsspec_is_read_and_read_anew_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.pipe("/rows/a.jsonl", lines(records(2, "a")))
    fs.pipe("/rows/b.jsonl.gz", gzip.compress(lines(records(1, "b"))))
    assert prompts("memory://rows/a.jsonl") == ["a 0", "a 1"]
    assert prompts("memory://rows") == prompts("memory://rows/*") == ["a 0", "a 1", "b 0"]
    fs.pipe("/rows/a.jsonl", lines(records(3, "c")))
    assert prompts("memory://rows/a.jsonl") == ["c 0", "c 1", "c 2"]
    fs.rm("/rows", recursive=True)


class Served(http.server.BaseHTTPRequestHandler):
    """One file, with the headers that a test names; counts how often it is downloaded."""

    content: ClassVar[bytes] = b""
    headers_sent: ClassVar[dict[str, str]] = {}
    downloads: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(self.content)), **self.headers_sent}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        type(self).downloads += 1
        self.wfile.write(self.content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


STATES = {
    "etag": ({"ETag": '"1"'}, {"ETag": '"2"'}),
    "time of the last change": (
        {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"},
        {"Last-Modified": "Wed, 21 Oct 2015 07:28:01 GMT"},
    ),
    "nothing": ({}, {}),
    "a time that is too young": (
        ({"Last-Modified": formatdate(time.time() + 3600, usegmt=True)},) * 2
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_a_set_behind_http_is_downloaded_again_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    before, after = STATES[state]
    monkeypatch.setattr(Served, "content", lines(records(2, "old")))
    monkeypatch.setattr(Served, "headers_sent", before)
    monkeypatch.setattr(Served, "downloads", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
        assert [prompts(address), prompts(address)] == [["old 0", "old 1"]] * 2
        assert Served.downloads == (1 if before != after else 2)
        monkeypatch.setattr(Served, "content", lines(records(2, "new")))  # as many bytes
        monkeypatch.setattr(Served, "headers_sent", after)
        assert prompts(address) == ["new 0", "new 1"]
        if before != after:
            monkeypatch.setattr(Served, "content", lines(records(2, "old")))
            monkeypatch.setattr(Served, "headers_sent", before)
            assert (prompts(address), Served.downloads) == (["old 0", "old 1"], 2)
            for file in (tmp_path / "cache" / "data").rglob("*.jsonl"):
                file.write_bytes(file.read_bytes().replace(b"old 0", b"odd 0"))
            assert (prompts(address), Served.downloads) == (["old 0", "old 1"], 3)
        server.shutdown()


@pytest.mark.parametrize("tokens", ["memory", "files"])
def test_a_run_downloads_a_set_whose_store_names_no_state_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    """So which rows are held out and the rows themselves come from one version."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Served, "content", lines(records(40)))
    monkeypatch.setattr(Served, "headers_sent", {})
    monkeypatch.setattr(Served, "downloads", 0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
        data = DataConfig.of({"train": address, "validation_share": 0.2, "tokens": tokens})
        for runs in (1, 2):
            made = training_data(data, RowRules(512, Capacity()), tiny_tokenizer())
            assert (len(made.train), len(made.validation), Served.downloads) == (32, 8, runs)
        server.shutdown()
