"""What a dead writer left goes with the next command; what a living one writes stays."""

import errno
import multiprocessing
import os
import signal
import stat
import time
from pathlib import Path

import pytest

from veneer.files import partial
from veneer.files.atomic import atomic_file, atomic_folder
from veneer.files.partial import is_alive, unfinished

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="on Windows nothing is judged")


def _write_and_wait(place: Path) -> None:
    with unfinished(place) as folder:
        folder.mkdir()
        (folder / "half").write_text("x" * 1000)
        time.sleep(600)


def start_writer(place: Path):
    """A process that is writing in `place`, and the name of what it writes."""
    before = {path.name for path in place.iterdir()}
    process = FORK.Process(target=_write_and_wait, args=(place,))
    process.start()
    while (
        not (new := {path.name for path in place.iterdir()} - before)
        or not (place / next(iter(new)) / "half").exists()
    ):
        time.sleep(0.01)
    return process, next(iter(new))


@pytest.fixture
def writer(tmp_path):
    process, name = start_writer(tmp_path)
    yield process, tmp_path / name
    process.kill()
    process.join()


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_the_next_write_beside_it_removes_what_a_killed_one_left(tmp_path, writer, write):
    process, left = writer
    process.kill()
    process.join()
    assert left.is_dir() and is_alive(left.name) is False
    with write(tmp_path / "new") as path:
        (path if path.is_file() else path / "a").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_zombie_writes_no_more(writer):
    process, left = writer
    os.kill(process.pid, signal.SIGKILL)  # and nobody waits for it
    for _ in range(500):
        if is_alive(left.name) is False:
            return
        time.sleep(0.01)
    pytest.fail("a process that has ended counts as alive")


def test_what_a_living_process_writes_is_left_alone(tmp_path, writer):
    _, left = writer
    assert is_alive(left.name) is True
    with atomic_file(tmp_path / "new") as path:
        path.write_text("whole")
    assert (left / "half").is_file()


def test_our_own_failed_removal_is_made_good_and_our_own_work_is_not_touched(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, unfinished(tmp_path) as left:
        left.write_text("half")
        patch.setattr(partial, "remove", lambda path: None)
    with unfinished(tmp_path) as mine:
        mine.write_text("going on")
        partial.sweep(tmp_path)
        assert mine.is_file() and not left.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: [parts[0], "0" * 8, *parts[2:]],  # another machine, or another container
        lambda parts: [
            *parts[:3],
            "0",
            parts[4],
        ],  # a system that does not say when a process began
        lambda parts: parts[:3],  # no name of ours
    ],
)
def test_what_cannot_be_judged_here_stays(tmp_path, writer, change):
    process, left = writer
    process.kill()
    process.join()
    strange = left.rename(tmp_path / "-".join(change(left.name.split("-"))))
    assert is_alive(strange.name) is None
    partial.sweep(tmp_path)
    assert strange.exists()


def test_a_machine_with_the_same_name_whose_processes_are_counted_alike_is_another_one(
    tmp_path, writer, monkeypatch
):
    _, left = writer
    other = tmp_path / "id"
    other.write_text("another machine, or another start of the one that the containers run on")
    monkeypatch.setattr(partial, "_MACHINE", other)
    monkeypatch.setattr(partial, "_START", other)
    assert is_alive(left.name) is None
    partial.sweep(tmp_path)
    assert left.exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_rights_or_synced_folders_is_written_to(
    tmp_path, monkeypatch, number
):
    own = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        own(descriptor)

    def chmod(path, mode, **_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "chmod", chmod)
    with atomic_folder(tmp_path / "folder") as path:
        (path / "a").touch(mode=0o600)
    assert (tmp_path / "folder" / "a").is_file()


def test_another_process_with_the_same_number_is_not_the_writer(writer):
    _, left = writer
    *start, began, number = left.name.split("-")
    assert is_alive("-".join([*start, str(int(began) + 1), number])) is False
