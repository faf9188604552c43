"""A library for several people: rights as the umask gives them, on a medium that may only be read,
and with a collector that gets its turn while others keep adding."""

import errno
import multiprocessing
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.soak.world import FROM_LIBRARY, READING, make_world
from tests.support.helpers import files_limited_to, run_where_it_may_only_be_read
from veneer.cli.main import main
from veneer.files.partial import unfinished
from veneer.library.index import INDEX
from veneer.library.library import Library

FORK = multiprocessing.get_context("fork")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(
    ("umask", "folders", "files"), [(0o002, 0o775, 0o664), (0o077, 0o700, 0o600)]
)
def test_everything_in_a_library_has_the_rights_that_the_umask_gives(
    sources, tmp_path, umask, folders, files
):
    private = Path(shutil.copytree(sources / "a", tmp_path / "private"))
    for path in private.iterdir():
        path.chmod(0o600)
    before = os.umask(umask)
    try:
        library = Library(tmp_path / "l")
        library.add(private, name="x")
        for place in (
            ["push", "x", str(tmp_path / "m")],
            ["pull", str(tmp_path / "m"), "x", "--name", "y"],
        ):
            assert main(["adapters", *place, "--library", str(library.folder)]) == 0
        library.entries()
    finally:
        os.umask(before)
    for path in [*library.folder.rglob("*"), *(tmp_path / "m").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (folders if path.is_dir() else files), path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Made under a umask that lets the group read, and others not at all."""
    before = os.umask(0o027)
    try:
        return make_world(tmp_path_factory.mktemp("shared") / "world")
    finally:
        os.umask(before)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of this kind is Linux's")
@pytest.mark.parametrize("limit", [16, 3_000, 20_000])
def test_a_gguf_model_that_finds_no_room_is_told_as_such(world, tmp_path, capsys, limit):
    """numpy's own way to a file gives no reason."""
    out = tmp_path / "o.gguf"
    line = f"export {world}/a --to llamacpp --merged --base {world}/base --out {out}"
    with files_limited_to(limit):
        assert main(line.split()) == 3
    assert "files that large" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_runs_checkpoints_reports_adapters_and_models_have_the_rights_that_the_umask_gives(
    world, tmp_path
):
    before = os.umask(0o027)
    try:
        for line in (
            "quantize --base {w}/base --out {o}/nf4",
            "export {w}/a --to vllm --base {w}/base --out {o}/vllm",
            "export {w}/a --to llamacpp --merged --base {w}/base --out {o}/whole.gguf",
            "extract --base {w}/base --model {w}/tuned --rank 2 --out {o}/extracted",
        ):
            assert main(line.format(w=world, o=tmp_path / "o").split()) == 0
    finally:
        os.umask(before)
    ours = [
        *(path for path in world.iterdir() if path.name != "base"),
        tmp_path / "o",
    ]  # transformers wrote it
    found = [path for place in ours for path in (place, *place.rglob("*"))]
    assert {"report.html", "state.safetensors", "metrics.jsonl", "whole.gguf"} <= {
        path.name for path in found
    }
    wrong = [
        path for path in found if path.stat().st_mode & 0o777 != (0o750 if path.is_dir() else 0o640)
    ]
    assert not wrong


def test_every_command_that_reads_works_on_a_library_that_may_only_be_read(world, tmp_path):
    (world / "library" / INDEX).unlink(missing_ok=True)  # so that every listing wants to write it
    (tmp_path / "o").mkdir()
    lines = [
        line.format(w=world, o=tmp_path / "o").split() for line in (READING | FROM_LIBRARY).values()
    ]
    code = f"""
import shutil
from veneer.cli.main import main
for line in {lines!r}:
    shutil.rmtree({str(tmp_path / "o" / "result")!r}, ignore_errors=True)
    if main(line):
        sys.exit(f"failed: {{line}}")
for change in (["tag", "x", "t9"], ["rm", "x"], ["gc", "--yes"], ["add", {str(world / "a")!r}]):
    if main(["adapters", *change, "--library", {str(world / "library")!r}]) != 2:
        sys.exit(f"not refused as it should be: {{change}}")
"""
    done = run_where_it_may_only_be_read(world / "library", code)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Read-only file system" in done.stderr


def test_a_listing_reads_where_every_write_is_refused(sources, tmp_path, monkeypatch, capsys):
    library = Library(tmp_path / "l")
    library.add(sources / "a", name="x")

    def refused(real, writes):
        def call(*args, **kwargs):
            if writes(*args, **kwargs):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))
            return real(*args, **kwargs)

        return call

    for name in ("mkdir", "unlink", "rename", "replace", "rmdir", "chmod"):
        monkeypatch.setattr(os, name, refused(getattr(os, name), lambda *a, **k: True))
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    monkeypatch.setattr(os, "open", refused(os.open, lambda path, how, *a, **k: how & flags))
    for action in (["ls"], ["show", "x"], ["verify"], ["gc"]):
        assert main(["adapters", *action, "--library", str(library.folder)]) == 0
    assert main(["adapters", "tag", "x", "t", "--library", str(library.folder)]) == 2
    assert "Read-only file system" in capsys.readouterr().err


def _die_while_writing(place: Path) -> None:
    with unfinished(place) as path:
        path.write_text("half")
        os._exit(9)


@pytest.mark.parametrize("place", ["", "names", "objects"])
@pytest.mark.parametrize("command", [["ls"], ["tag", "x", "t"]], ids=lambda c: c[0])
def test_what_a_dead_writer_left_anywhere_in_a_library_goes_with_the_next_command(
    sources, tmp_path, place, command
):
    library = Library(tmp_path / "l")
    library.add(sources / "a", name="x")
    writer = FORK.Process(target=_die_while_writing, args=(library.folder / place,))
    writer.start()
    writer.join()
    assert list(library.folder.rglob(".partial-*"))
    assert main(["adapters", *command, "--library", str(library.folder)]) == 0
    assert not list(library.folder.rglob(".partial-*"))


def test_a_collection_gets_its_turn_while_others_keep_adding(sources, tmp_path):
    """At every moment somebody is adding; without turns the collector would find the lock taken for
    ever."""
    library = Library(tmp_path / "l")
    library.add(sources / "a", name="x")
    library.add(sources / "b", name="x")
    stop = threading.Event()

    def keep_adding():
        while not stop.is_set():
            with library.receiving():
                time.sleep(0.05)

    adders = [threading.Thread(target=keep_adding) for _ in range(4)]
    for adder in adders:
        adder.start()
    try:
        assert library.collect().versions == ["x@1"]
    finally:
        stop.set()
        for adder in adders:
            adder.join()


def test_what_a_collection_would_remove_is_told_while_others_add(sources, tmp_path):
    library = Library(tmp_path / "l")
    library.add(sources / "a", name="x")
    with library.receiving(), unfinished(library.objects) as theirs:
        theirs.mkdir()
        assert library.collect(apply=False).remains == []


def test_a_collection_that_cannot_begin_says_so(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("veneer.library.library.COLLECT_WAIT_SECONDS", 0.05)
    library = Library(tmp_path / "l")
    library.add(sources / "a", name="x")
    with library.receiving():
        assert main(["adapters", "gc", "--yes", "--library", str(library.folder)]) == 2
    assert "busy" in capsys.readouterr().err
    assert main(["adapters", "gc", "--yes", "--library", str(library.folder)]) == 0
