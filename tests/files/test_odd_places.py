"""What is called so that nobody can mean it, or cannot be written to the end: an error with its
place, and nothing half done."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import save_tiny
from veneer.cli.main import main
from veneer.comparison.ray_trial import own_folder
from veneer.comparison.store import RunStore
from veneer.data.files.places import find_files
from veneer.data.files.writing import split_rows
from veneer.errors import ConfigError, CorruptFileError, RefusedError
from veneer.files import atomic
from veneer.files.addresses import file_system
from veneer.files.home import absolute_if_exists, expanded, home, name_of

ROW = '{"prompt": "q", "completion": "a"}\n'


@pytest.mark.parametrize(
    "name",
    ["a**", "**b/*.jsonl", "", "  ", "a\0.jsonl", "x" * 300, "*" * 300, "/proc/1/cwd/*.jsonl"],
)
def test_a_set_that_nobody_can_mean_is_refused_by_its_name(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROW)
    assert main(["data", "convert", name, "--out", "out.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "out.jsonl cannot be written" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "/" + "y" * 3000])
def test_a_base_whose_name_no_path_can_have_is_a_name_all_the_same(name: str) -> None:
    assert name.endswith(name_of(name)) and absolute_if_exists(name) == name


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")
def test_an_output_whose_path_is_no_utf8_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    for words in (["quantize"], ["merge", "--adapter", "a"]):
        assert main([*words, "--base", "base", "--out", "b\udcffd/out"]) == 2
        assert "is no UTF-8" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_home_of_nobody_is_a_name_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "~nobody of that name/rows.jsonl"
    assert expanded(name) == Path(name) and expanded("~/x") == Path.home() / "x"
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text(ROW)
    assert [place.path for place in find_files(name)] == [Path(name)]
    for words in (
        ["merge", "--base", name, "--adapter", name, "--out", "o"],
        ["plan", "--base", name],
    ):
        assert main(words) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="users are called otherwise there")
def test_a_user_without_a_home_is_told_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ConfigError, match="no home folder"):
        home()
    assert main(["adapters", "list"]) == 2
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert own_folder().is_dir()


@pytest.mark.parametrize(
    "address",
    ["zip://a.jsonl::/nowhere.zip", "ftp://127.0.0.1:1/a", "reference://a", "nothing://a"],
)
def test_an_address_behind_which_nothing_stands_is_an_error_whatever_the_package_raises(
    address: str,
) -> None:
    with pytest.raises(ConfigError, match="unknown to fsspec, or its server does not answer"):
        file_system(address)
    assert main(["data", "convert", address, "--out", "/nowhere/out.jsonl"]) == 2


def test_a_division_that_cannot_be_written_to_its_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its three files are published one after another: the last one fails."""
    rows, out, right, calls = (
        tmp_path / "rows.jsonl",
        tmp_path / "out",
        atomic.sync_folder,
        iter(range(9)),
    )
    rows.write_text("".join(ROW.replace("q", f"q {n}") for n in range(40)))

    def full(folder: Path) -> None:
        if next(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))
        right(folder)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync_folder", full)
        assert (
            main(
                [
                    "data",
                    "split",
                    str(rows),
                    "--out",
                    str(out),
                    "--validation",
                    "0.2",
                    "--test",
                    "0.2",
                ]
            )
            == 2
        )
    assert not list(out.iterdir())
    (out / "test.jsonl").write_text("somebody's")
    with pytest.raises(ConfigError, match="exists"):
        split_rows(str(rows), out, validation=0.2, test=0.2)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [
        ("test.jsonl", "somebody's")
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{",
        '{"a": 1, "a": 2}',
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    ],
)
def test_what_is_no_list_of_files_in_a_store_is_damage_and_no_bug(
    tmp_path: Path, text: str
) -> None:
    store = RunStore(str(tmp_path))
    store.put_text("runs/run.json", text)
    with pytest.raises(CorruptFileError):
        store.get_folder("run", tmp_path / "into")
    store.put_text("runs/other.json", '{"": "x"}')
    with pytest.raises(CorruptFileError, match="leads out"):
        store.get_folder("other", tmp_path / "into")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives a folder to another user"
)
def test_a_folder_of_somebody_else_under_our_name_is_not_worked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = own_folder()
    assert made.stat().st_mode & 0o077 == 0 and own_folder() == made
    for spoil in (
        lambda: os.chown(made, 12345, 12345),
        lambda: (os.chown(made, 0, 0), made.chmod(0o777)),
    ):
        spoil()
        with pytest.raises(RefusedError, match="this user alone"):
            own_folder()
    made.rmdir()
    made.symlink_to(tmp_path)
    with pytest.raises(RefusedError):
        own_folder()
