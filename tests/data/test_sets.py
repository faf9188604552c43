"""Several sets of rows: where they lie, what their columns are called, and how much of each an
epoch takes."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow
import pytest
import torch
import yaml
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import veneer
from tests.support.helpers import ended_before_step
from tests.support.tiny import save_tiny, tiny_tokenizer
from veneer.cli import main
from veneer.data.batching import plan_epoch
from veneer.data.config import DataConfig
from veneer.data.examples import Capacity
from veneer.data.files import places
from veneer.data.files.sources import scan_rows
from veneer.data.large import training_data
from veneer.data.load import DataSet, load_data
from veneer.data.mixture import Mixture, mix_sets
from veneer.errors import ConfigError, DataError
from veneer.files.strict_tensors import read_tensors
from veneer.training.output.records import read_records
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training
from veneer.training.state.folder import resume_config


def records(count: int, word: str = "question") -> list[dict[str, Any]]:
    return [{"prompt": f"{word} {n}", "completion": f"answer {n}"} for n in range(count)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def loaded(train: Any, **more: Any) -> DataSet:
    data = DataConfig.of({"train": train, "validation_share": 0.0, **more})
    return load_data(data, length=512, capacity=Capacity(), tokenizer=tiny_tokenizer())


def prompts(path: str, **more: Any) -> list[str]:
    rows, problems = scan_rows(path, **more)
    assert not problems
    return [row.messages[0]["content"] for row in rows]


# how much of each


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 3)), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_no_row_comes_again_before_all_others_of_its_set_came(
    sets: list[tuple[int, float]], seed: int
) -> None:
    made = Mixture(tuple(size for size, _ in sets), tuple(size * weight for size, weight in sets))
    seen: Counter[int] = Counter()
    for epoch in range(4):
        taken = made.rows(seed, epoch)
        assert made.rows(seed, epoch).tolist() == taken.tolist()
        seen.update(taken.tolist())
        start = 0
        for size, weight in sets:
            own = [seen[row] for row in range(start, start + size)]
            assert max(own) - min(own) <= (2 if size == 1 else 1)
            if not made.is_plain:
                assert abs(sum(own) - (epoch + 1) * size * weight) <= 1
            start += size


def test_shares_are_of_rows_or_of_tokens_and_the_rest_is_seen_once() -> None:
    by_rows = mix_sets([90, 1000], [900, 50_000], [1, 1], [None, 0.1], by="rows")
    assert by_rows.draws == pytest.approx((90, 10))
    by_tokens = mix_sets([90, 1000], [900, 50_000], [1, 1], [None, 0.1], by="tokens")
    assert by_tokens.draws == pytest.approx((90, 2))  # of 50 tokens each
    assert mix_sets([10, 30], [1, 1], [1, 1], [0.75, 0.25], by="rows").draws == pytest.approx(
        (30, 10)
    )
    assert mix_sets([10, 30], [1, 1], [1, 1], [None, None], by="rows").is_plain


@pytest.mark.parametrize(
    ("share", "by"), [(0.9999, "rows"), (1 - 1e-16, "rows"), (0.99999, "tokens")]
)
def test_a_share_that_would_repeat_a_small_set_for_ever_is_refused_with_the_number(
    tmp_path: Path, share: float, by: str
) -> None:
    """Of one row beside five: 0.999999 of an epoch is five million of it."""
    for name, count in (("many", 5), ("one", 1)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(records(count)))
    sets = [
        str(tmp_path / "many.jsonl"),
        {"path": str(tmp_path / "one.jsonl"), "share": share, "name": "replay"},
    ]
    with pytest.raises(ConfigError, match=r"each of the 1 rows of replay [\d,]+ times"):
        loaded(sets, shares_of=by)
    sets[1]["share"] = 0.99  # type: ignore[index]
    assert loaded(sets).mixture.draws == pytest.approx((5, 495))


def test_a_plan_takes_what_is_mixed_in_batches_and_a_plain_mixture_is_none() -> None:
    lengths = [3 + n % 5 for n in range(20)]
    mixture = Mixture((10, 10), (10.0, 2.5))
    for order in ("bucketed", "shuffled", "file"):
        asked = {"batch": 4, "seed": 3, "order": order}
        plan = [*plan_epoch(lengths, epoch=1, mixture=mixture, **asked)]  # type: ignore[arg-type]
        assert sorted(row for batch in plan for row in batch) == sorted(mixture.rows(3, 1).tolist())
        plain = [*plan_epoch(lengths, epoch=1, mixture=Mixture((10, 10), (10.0, 10.0)), **asked)]  # type: ignore[arg-type]
        assert plain == [*plan_epoch(lengths, epoch=1, **asked)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([], "empty list"),
        ([{"path": "a", "weight": 0}], "data.train.0.weight is 0: should be a number above 0"),
        ([{"path": "a", "share": 0.5, "weight": 2}], "a weight and a share"),
        ([{"path": "a", "share": 0.6}, {"path": "b", "share": 0.4}, "c"], "leaves nothing"),
        ([{"path": "a", "share": 0.6}, {"path": "b", "share": 0.3}], "not 1"),
        (["a", "a"], "give each a name"),
        ([{"path": "a", "wieght": 2}], "wieght"),
        ([{"weight": 2}], "path"),
    ],
)
def test_sets_that_make_no_mixture_are_refused(train: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        veneer.RunConfig.of({"base": "b", "out": "o", "data": {"train": train}})
    assert said in str(caught.value)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"base": "b", "out": "o", "data": {"train": train}}))
    assert main.main(["train", str(run)]) == 2


def test_a_run_over_sets_says_what_it_mixes_tells_their_losses_apart_and_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "base")
    (tmp_path / "own.jsonl").write_bytes(lines(records(20)))
    (tmp_path / "general.jsonl").write_bytes(lines(records(40, "general")))
    general = {"path": str(tmp_path / "general.jsonl"), "share": 0.25, "name": "replay"}
    fields = {
        "base": str(tmp_path / "base"),
        "data": {"train": [str(tmp_path / "own.jsonl"), general], "validation_share": 0.2},
        "method": {"name": "lora", "rank": 2},
        "epochs": 2,
        "batch": 3,
        "evaluate_every": 3,
    }

    class Told(QuietScreen):
        def start(self, info: Any) -> None:
            said.extend(info["paths"])

    said: list[str] = []
    config = veneer.RunConfig.model_validate({**fields, "out": str(tmp_path / "a")})
    run_training(config, resume=False, screen=Told())
    assert any("an epoch takes" in line and "replay" in line and "(25%)" in line for line in said)
    found = [
        record
        for record in read_records(tmp_path / "a" / "metrics.jsonl")
        if record["kind"] == "evaluation"
    ]
    assert all(set(record["sets"]) == {str(tmp_path / "own.jsonl"), "replay"} for record in found)

    other = veneer.RunConfig.model_validate({**fields, "out": str(tmp_path / "b")})
    with ended_before_step(4):
        run_training(other, resume=False, screen=QuietScreen())
    run_training(resume_config(tmp_path / "b"), resume=True, screen=QuietScreen())
    first, second = (
        read_tensors(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in "ab"
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_over_sets_from_python_has_a_report(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(records(8, name)))
    sets = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "weight": 0.5}]
    data = {"train": sets, "validation_share": 0.2}
    veneer.train(str(tmp_path / "base"), data, out=tmp_path / "run", steps=1, batch=2)
    assert "b.jsonl" in (tmp_path / "run" / "report.html").read_text()


def test_other_shares_are_other_rows_to_a_run_that_goes_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(records(10, name)))
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    found = {
        loaded([paths[0], {"path": paths[1], **how}]).fingerprint
        for how in ({}, {"weight": 0.5}, {"share": 0.1})
    }
    assert len(found) == 3


# where they lie


def test_files_folders_patterns_and_packed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows" / "deep").mkdir(parents=True)
    (tmp_path / "rows" / "a.jsonl").write_bytes(lines(records(2, "a")))
    (tmp_path / "rows" / "b.jsonl.gz").write_bytes(gzip.compress(lines(records(2, "b"))))
    packed = pyarrow.compress(lines(records(2, "c")), codec="zstd", asbytes=True)
    (tmp_path / "rows" / "deep" / "c.jsonl.zst").write_bytes(packed)
    (tmp_path / "rows" / "README.md").write_text("no rows")
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


QA = {"question": "prompt", "answer": "completion"}


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
            made = training_data(data, length=512, capacity=Capacity(), tokenizer=tiny_tokenizer())
            assert (len(made.train), len(made.validation), Served.downloads) == (32, 8, runs)
        server.shutdown()


# what their columns are called


def test_columns_are_read_under_the_names_that_a_person_gives(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer,id\nx,y,1\n")
    assert prompts(str(tmp_path / "rows.csv"), columns=QA) == ["x"]
    _, problems = scan_rows(tmp_path / "rows.csv", columns={**QA, "qestion": "prompt"})
    assert [problem.message for problem in problems] == [
        "the map names 'qestion', which no row has"
    ]
    _, problems = scan_rows(tmp_path / "rows.csv", columns={**QA, "id": "prompt"})
    assert problems[0].code == "D107" and "two columns the name 'prompt'" in problems[0].message


def test_a_column_that_is_mapped_to_nothing_is_left_out_in_messages_too(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    row = {"messages": [{"role": "user", "content": "a"}, answer], "prompt": "x", "completion": "y"}
    (tmp_path / "rows.jsonl").write_bytes(lines([row]))
    columns = {"prompt": None, "reasoning_content": None}
    (found,), problems = scan_rows(tmp_path / "rows.jsonl", columns=columns)
    assert found.messages[1] == {"role": "assistant", "content": "b"} and not problems


def test_the_command_maps_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "base")
    (tmp_path / "rows.csv").write_text(
        "question,answer\n" + "".join(f"x {n},y {n}\n" for n in range(30))
    )
    which = [str(tmp_path / "rows.csv"), "--base", str(tmp_path / "base")]
    mapped = ["--map", "question=prompt", "--map", "answer=completion"]
    assert main.main(["data", "check", *which, *mapped]) == 0
    assert main.main(["data", "check", *which]) == 4
    assert main.main(["data", "check", *which, "--map", "question"]) == 2
    out = str(tmp_path / "run")
    train = [
        "train",
        "--base",
        which[2],
        "--data",
        which[0],
        *mapped,
        "--out",
        out,
        "--steps",
        "1",
        "--quiet",
    ]
    assert main.main(train) == 0
    assert main.main(["evaluate", "--base", which[2], "--data", which[0], *mapped, "--json"]) == 0
    capsys.readouterr()


def test_a_plan_of_rows_that_cannot_be_read_is_refused_as_training_on_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(save_tiny(tmp_path / "base"))
    odd, mapped = tmp_path / "odd.csv", ["--map", "question=prompt", "--map", "answer=completion"]
    odd.write_text("question,answer\n" + "".join(f"x {n},y {n}\n" for n in range(30)))
    preferences, half = tmp_path / "preferences.jsonl", tmp_path / "half.jsonl"
    preferences.write_bytes(lines([{"prompt": "x", "chosen": "y", "rejected": "z"}]))
    half.write_bytes(lines([*records(9), {"prompt": "alone"}]))
    for file in (odd, preferences, half):
        assert main.main(["plan", "--base", base, "--data", str(file)]) == 2, file
        said = capsys.readouterr()
        assert "D107" in said.err and str(file) in said.err and "GB" not in said.out
        run = tmp_path / "run.yaml"
        run.write_text(
            yaml.safe_dump({"base": base, "data": str(file), "out": str(tmp_path / "run")})
        )
        assert main.main(["plan", str(run)]) == 2
        assert main.main(["train", str(run), "--fit", "1TB"]) == 2
    capsys.readouterr()
    written = tmp_path / "written.yaml"
    assert (
        main.main(
            ["plan", "--base", base, "--data", str(odd), *mapped, "--write", str(written), "--json"]
        )
        == 0
    )
    assert "plans" in capsys.readouterr().out
    assert yaml.safe_load(written.read_text())["data"] == {
        "train": str(odd),
        "map": {"question": "prompt", "answer": "completion"},
    }
    assert (
        main.main(
            [
                "plan",
                "--base",
                base,
                "--data",
                str(odd),
                *mapped,
                "--probe",
                "--batch",
                "2",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["planned_memory_bytes"] > 0
    assert main.main(["plan", str(written), *mapped]) == 2  # a run file says it
    assert "--map" in capsys.readouterr().err
    assert main.main(["plan", "--base", base, *mapped]) == 2  # of no rows
    capsys.readouterr()


def test_messages_about_rows_say_what_is_wrong_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(save_tiny(tmp_path / "base"))
    broken, half, odd = (tmp_path / name for name in ("broken.jsonl", "half.jsonl", "odd.csv"))
    broken.write_bytes(
        b'{"prompt": "x", "completion": "a\x01b"}\n{"prompt": "x\n{"prompt": "x", "completion":'
        b' "\\q"}\n'
    )
    _, problems = scan_rows(broken)
    assert [problem.message for problem in problems] == [
        "is not JSON: Invalid control character at column 33",
        "is not JSON: Unterminated string starting at column 12",
        "is not JSON: Invalid \\escape at column 32",
    ]
    half.write_bytes(lines([*records(9), {"prompt": "alone"}, {"prompt": "x", "completion": None}]))
    _, (problem,) = scan_rows(half)
    assert problem.lines == (10, 11)
    assert problem.message.startswith(
        "columns prompt: format prompt_completion also needs completion"
    )
    odd.write_text("question,answer\nx,y\n")
    assert main.main(["data", "check", str(odd), "--base", base]) == 4
    said = " ".join(capsys.readouterr().out.split())
    assert (
        said.startswith(f"{odd}: no row can be read")
        and "1 problem D107" in said
        and "0 rows" not in said
    )
    assert main.main(["evaluate", "--base", base, "--data", str(odd)]) == 2
    assert f"{odd} cannot be evaluated" in capsys.readouterr().err


def test_a_comparison_maps_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "odd.csv"
    odd.write_text("question,answer\n" + "".join(f"x {n},y {n}\n" for n in range(30)))
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "veneer.api.compare", lambda configs, **_: seen.append(configs[0][1].data.map) or {}
    )
    monkeypatch.setattr("veneer.cli.training.compare._comparison_table", lambda figures: "")
    base = str(save_tiny(tmp_path / "base"))
    asked = [
        "compare",
        "--base",
        base,
        "--data",
        str(odd),
        "--methods",
        "lora,prefix",
        "--out",
        str(tmp_path / "c"),
        "--json",
    ]
    assert main.main([*asked, "--map", "question=prompt", "--map", "answer=completion"]) == 0
    assert seen == [{"question": "prompt", "answer": "completion"}]


# what is done with them by hand


def test_rows_of_any_layout_are_converted_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nx,y\nv,w\n")
    shared = [{"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]}]
    for number, record in enumerate(
        ({"text": "t", "unfinished": True}, {**shared[0], "unfinished": True})
    ):
        (tmp_path / f"cut{number}.jsonl").write_bytes(lines([record]))
        out = tmp_path / f"still{number}.jsonl"
        assert (
            main.main(["data", "convert", str(tmp_path / f"cut{number}.jsonl"), "--out", str(out)])
            == 0
        )
        (row,), _ = scan_rows(out)
        assert row.unfinished
    (tmp_path / "b.jsonl").write_bytes(lines(shared))
    mapped = ["--map", "question=prompt", "--map", "answer=completion"]
    for out in ("rows.jsonl", "rows.jsonl.gz"):
        command = [
            "data",
            "convert",
            str(tmp_path / "a.csv"),
            "--out",
            str(tmp_path / out),
            *mapped,
        ]
        assert main.main(command) == 0
        rows, problems = scan_rows(tmp_path / out)
        assert [[m["content"] for m in row.messages] for row in rows] == [
            ["x", "y"],
            ["v", "w"],
        ] and not problems
    assert (
        main.main(
            ["data", "convert", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c.jsonl")]
        )
        == 0
    )
    (row,), _ = scan_rows(tmp_path / "c.jsonl")
    assert (
        row.format == "chat"
        and row.messages[1] == {"role": "assistant", "content": "g"}
        and not row.unfinished
    )
    assert (
        main.main(
            ["data", "convert", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c.jsonl")]
        )
        == 2
    )
    assert (
        main.main(["data", "convert", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c.txt")])
        == 2
    )
    capsys.readouterr()


def test_rows_that_cannot_be_read_keep_a_file_from_being_written_unless_they_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([*records(3), {"prompt": "x", "completion": ""}]))
    command = [
        "data",
        "convert",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "out.jsonl"),
    ]
    assert main.main(command) == 2 and not (tmp_path / "out.jsonl").exists()
    assert main.main([*command, "--leave-out"]) == 0
    assert "skipped: D101" in capsys.readouterr().out
    assert len(prompts(str(tmp_path / "out.jsonl"))) == 3


def test_split_rows_are_those_that_a_run_would_hold_out_and_no_prompt_is_in_two(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(records(200) + records(200)))
    shares = ["--validation", "0.1", "--test", "0.2"]
    assert (
        main.main(
            ["data", "split", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "s"), *shares]
        )
        == 0
    )
    sides = [
        set(prompts(str(tmp_path / "s" / f"{name}.jsonl")))
        for name in ("train", "validation", "test")
    ]
    assert [len(side) for side in sides] == [140, 20, 40] and len(set.union(*sides)) == 200
    held = [row.messages[0]["content"] for row in held_out_of(str(tmp_path / "rows.jsonl"), 0.1)]
    assert sides[1] == set(held)


def held_out_of(path: str, share: float) -> list[Any]:
    from veneer.data.split import split_by_shares

    return split_by_shares(scan_rows(path)[0], [share])[1]


def test_a_sample_is_drawn_by_content_and_seed_in_the_order_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(records(100)))
    drawn = {}
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        out = str(tmp_path / f"{name}.jsonl")
        command = [
            "data",
            "sample",
            str(tmp_path / "rows.jsonl"),
            "20",
            "--out",
            out,
            "--seed",
            str(seed),
        ]
        assert main.main(command) == 0
        drawn[name] = prompts(out)
    assert drawn["a"] == drawn["b"] != drawn["c"]
    numbers = [int(each.split()[1]) for each in drawn["a"]]
    assert len(numbers) == 20 and numbers == sorted(numbers)
