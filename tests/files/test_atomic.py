"""Folders appear whole or not at all: every call that can fail is made to fail, one after the
other."""

import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.helpers import FailAt
from veneer.errors import ConfigError, DoesNotFitError, InputError
from veneer.files import atomic
from veneer.files.atomic import (
    atomic_file,
    atomic_folder,
    refuse_unwritable_file,
    verify_manifest,
    write_manifest,
    write_text,
)
from veneer.files.system_errors import free_bytes

WRITE_CALLS = [(os, name) for name in ("rename", "replace", "fsync", "open", "mkdir")]


def write_folder(path: Path, text: str, *, replace: bool = False) -> None:
    with atomic_folder(path, replace=replace) as partial:
        (partial / "sub").mkdir()
        (partial / "a.txt").write_text(text)
        (partial / "sub" / "b.txt").write_text(text)
        write_manifest(partial)


def content(path: Path) -> str | None:
    """What a reader finds: None if nothing; fails if it is half of anything."""
    if not path.exists():
        return None
    assert verify_manifest(path) == []
    return (path / "a.txt").read_text()


def hidden(parent: Path) -> list[str]:
    return [p.name for p in parent.iterdir() if p.name.startswith(".")]


def test_a_folder_is_whole_after_success(tmp_path):
    write_folder(tmp_path / "deep" / "er" / "x", "new")
    assert content(tmp_path / "deep" / "er" / "x") == "new"
    assert hidden(tmp_path / "deep" / "er") == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(
    ("umask", "folders", "files"),
    [(0o022, 0o755, 0o644), (0o002, 0o775, 0o664), (0o077, 0o700, 0o600)],
)
def test_what_is_published_has_the_rights_that_the_umask_gives(tmp_path, umask, folders, files):
    """Also what a library wrote through a temporary file of its own, which is the owner's alone."""
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "x") as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "plain").write_text("p")
            save_file({"a": torch.zeros(2)}, partial / "sub" / "tensors")
        with atomic_file(tmp_path / "y") as partial:
            save_file({"a": torch.zeros(2)}, partial)
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert found == {"x": folders, "sub": folders, "plain": files, "tensors": files, "y": files}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_a_folder_for_a_group_passes_its_group_on(tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    if not shared.stat().st_mode & 0o2000:
        pytest.skip("this file system keeps no group for new files")
    write_folder(shared / "x", "new")
    assert (shared / "x").stat().st_mode & 0o2000


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_what_stands_there_is_never_overwritten_unasked(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "folder":
        write_folder(path, "old")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("old")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists"):
        write_folder(path, "new")
    assert hidden(tmp_path) == []
    assert os.path.lexists(path) and (kind != "folder" or content(path) == "old")


def test_what_appears_while_writing_is_not_overwritten_either(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(ConfigError), atomic_folder(path) as partial:
        (partial / "a.txt").write_text("mine")
        write_folder(path, "theirs")
    assert content(path) == "theirs" and hidden(tmp_path) == []


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize(
    "failure",
    [OSError(errno.EIO, "I/O error"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()],
    ids=repr,
)
def test_whichever_call_fails_the_place_holds_the_old_or_the_new_never_half(tmp_path, old, failure):
    for k in range(1, 100):
        parent = tmp_path / str(k)
        parent.mkdir()
        path = parent / "x"
        if old:
            write_folder(path, old)
        with pytest.MonkeyPatch.context() as patch:
            injected = FailAt(patch, WRITE_CALLS, k, failure)
            try:
                write_folder(path, "new", replace=old is not None)
                raised = None
            except BaseException as fault:
                raised = fault
        if injected.calls < k:
            assert raised is None and content(path) == "new" and hidden(parent) == []
            assert k > 8, "the loop must have met every kind of call"
            return
        assert content(path) in (old, "new")
        if raised is None:  # "make the parent folder unless it is there": it was there
            assert content(path) == "new"
        elif not isinstance(failure, KeyboardInterrupt):
            assert isinstance(
                raised, DoesNotFitError if failure.errno == errno.ENOSPC else InputError
            )
        write_folder(path, "next", replace=True)  # and whatever was left does not stand in the way
        assert content(path) == "next" and hidden(parent) == []
    pytest.fail("the writer never got through")


def _killed_writer(path: Path, k: int) -> None:
    FailAt(pytest.MonkeyPatch(), WRITE_CALLS, k, None)
    write_folder(path, "new", replace=True)


def test_a_killed_writer_leaves_the_old_or_the_new_and_the_next_write_mends(tmp_path):
    fork = multiprocessing.get_context("fork")
    outcomes = set()
    for k in range(1, 100):
        path = tmp_path / str(k) / "x"
        write_folder(path, "old")
        process = fork.Process(target=_killed_writer, args=(path, k))
        process.start()
        process.join()
        outcomes.add(content(path))
        write_folder(path, "next", replace=True)
        assert content(path) == "next" and not (path.parent / ".replaced-x").exists()
        if process.exitcode == 0:
            break
    # None: killed between the two renames; the old one stands aside, complete, until the next write
    assert outcomes == {"old", None, "new"}


def test_a_writer_killed_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_folder(path, "old")
    path.rename(tmp_path / ".replaced-x")
    with pytest.raises(ConfigError, match="exists"):
        write_folder(path, "new")
    assert content(path) == "old"


def _race(path: Path, text: str, barrier) -> None:
    barrier.wait()
    try:
        write_folder(path, text)
    except ConfigError:
        os._exit(2)
    except InputError:  # the rename itself met the other one
        os._exit(2)
    os._exit(0)


def test_of_two_racing_writers_one_wins_and_the_other_is_told(tmp_path):
    fork = multiprocessing.get_context("fork")
    for turn in range(20):
        path = tmp_path / str(turn) / "x"
        barrier = fork.Barrier(2)
        racers = [fork.Process(target=_race, args=(path, text, barrier)) for text in ("one", "two")]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert sorted(racer.exitcode for racer in racers) == [0, 2]
        assert content(path) == ("one" if racers[0].exitcode == 0 else "two")
        assert hidden(path.parent) == []


def test_an_error_of_the_body_passes_unchanged_and_removes_what_was_written(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "x") as partial:
        (partial / "a").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path):
    needed = free_bytes(tmp_path) + 10**15
    small = pytest.raises(DoesNotFitError, match=f"{needed:,} bytes are needed")
    with small, atomic_folder(tmp_path / "x", needed_bytes=needed):
        pytest.fail("must not be reached")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_inside_the_tensor_library_is_told_as_such(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(DoesNotFitError, match="disk is full"), atomic_folder(tmp_path / "x"):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )
    with pytest.raises(SafetensorError), atomic_folder(tmp_path / "x"):
        raise SafetensorError("something else")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot be written"), atomic_folder(tmp_path / "x"):
        pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "s.json"
    with atomic_file(path) as partial:
        partial.write_text("old")
    with pytest.raises(ConfigError), atomic_file(path):
        pytest.fail("must not be reached")
    with pytest.raises(ZeroDivisionError), atomic_file(path, replace=True) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with atomic_file(path, replace=True) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["s.json"]


@pytest.mark.parametrize("there", ["folder", "pipe", "link to a pipe"])
def test_what_is_no_file_is_never_replaced(tmp_path, there):
    """A device neither: /dev/null would become a file for all programs."""
    place, pipe = tmp_path / "place", tmp_path / ("place" if there == "pipe" else "pipe")
    os.mkfifo(pipe)
    if there == "folder":
        place.mkdir()
    elif there != "pipe":
        place.symlink_to(pipe)
    before = place.lstat()
    with pytest.raises(ConfigError, match="is not replaced: it is"):
        write_text(place, "x", replace=True)
    with pytest.raises(ConfigError, match="is not replaced: it is"):
        refuse_unwritable_file(place)
    assert place.lstat() == before and pipe.is_fifo()


def test_every_change_to_a_written_folder_is_found(tmp_path):
    def faults_after(change) -> list[str]:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        write_folder(tmp_path / "x", "some text")
        change(tmp_path / "x")
        return verify_manifest(tmp_path / "x")

    def edit_manifest(folder: Path, edit) -> None:
        listing = json.loads((folder / atomic.MANIFEST).read_text())
        edit(listing)
        (folder / atomic.MANIFEST).write_text(json.dumps(listing))

    def link(folder: Path) -> None:
        (folder / "a.txt").rename(folder.parent / "elsewhere.txt")
        (folder / "a.txt").symlink_to(folder.parent / "elsewhere.txt")

    assert faults_after(lambda f: None) == []
    for change, expected in [
        (lambda f: (f / "a.txt").write_text("SOME text"), "a.txt changed"),
        (lambda f: (f / "a.txt").write_text("some tex"), "a.txt has 8 bytes"),
        (lambda f: (f / "sub" / "b.txt").unlink(), "sub/b.txt is missing"),
        (lambda f: (f / "c.txt").write_text(""), "c.txt is not listed"),
        (link, "a.txt is a link"),
        (lambda f: (f / atomic.MANIFEST).unlink(), "the folder is incomplete"),
        (lambda f: (f / atomic.MANIFEST).write_text('{"files": {'), "not valid JSON"),
        (lambda f: (f / atomic.MANIFEST).write_text("{}"), "lists no files"),
        (
            lambda f: edit_manifest(f, lambda m: m["files"].update({"../../x": {}})),
            "../../x is missing",
        ),
        (lambda f: edit_manifest(f, lambda m: m["files"].update({"a.txt": 3})), "no size and hash"),
    ]:
        assert any(expected in fault for fault in faults_after(change)), expected


def test_all_faults_of_a_folder_are_told_at_once(tmp_path):
    write_folder(tmp_path / "x", "text")
    (tmp_path / "x" / "a.txt").unlink()
    (tmp_path / "x" / "sub" / "b.txt").write_text("t")
    assert len(verify_manifest(tmp_path / "x")) == 2
