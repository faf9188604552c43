"""Many processes at once, and a failure or a kill at every call that writes: nothing is lost,
nothing half visible.

VENEER_MANY_PROCESSES=200 sets how many processes add at once; default 20.
"""

import errno
import multiprocessing
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.helpers import FailAt
from veneer.errors import VeneerError
from veneer.library.library import Library

MANY = int(os.environ.get("VENEER_MANY_PROCESSES", "20"))
FORK = multiprocessing.get_context("fork")
WRITES = [
    (os, "rename"),
    (os, "replace"),
    (os, "fsync"),
    (os, "open"),
    (os, "mkdir"),
    (os, "unlink"),
    (shutil, "copyfile"),
    (Path, "write_text"),
    (Path, "chmod"),
]


def state(library: Library) -> list[tuple[str, tuple[str, ...], str]]:
    """What a reader finds; fails where any of it is not whole."""
    found = library.entries(every_version=True)
    for entry in found:
        library.whole(entry.reference)
    return [(entry.reference, tuple(entry.version.tags), entry.version.object) for entry in found]


def filled(folder: Path, sources: Path) -> Library:
    library = Library(folder)
    library.add(sources / "a", name="x", tags=["best"])
    library.add(sources / "p", name="x")
    library.add(sources / "b", name="y")
    return library


CHANGES = {
    "add": lambda library, folder: library.add(folder / "b", name="x"),
    "first add": lambda library, folder: library.add(folder / "b", name="new"),
    "tag": lambda library, folder: library.change("x", tag=["best"]),
    "rename": lambda library, folder: library.rename("x", "z"),
    "remove a version": lambda library, folder: library.remove("x@2"),
    "remove": lambda library, folder: library.remove("x"),
    "collect": lambda library, folder: library.collect(),
}


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad"), None], ids=str
)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_fails_at_any_call_has_happened_or_not(sources, tmp_path, change, failure):
    template = filled(tmp_path / "template", sources)
    if change == "collect":
        template.remove("y")
    before = state(template)
    expected = Library(shutil.copytree(template.folder, tmp_path / "expected"))
    CHANGES[change](expected, sources)
    after = state(expected)
    for k in range(1, 120):
        library = Library(shutil.copytree(template.folder, tmp_path / str(k)))

        def run(library=library, k=k) -> None:
            with pytest.MonkeyPatch.context() as patch:
                FailAt(patch, WRITES, k, failure)
                CHANGES[change](library, sources)

        if failure is None:
            process = FORK.Process(target=run)
            process.start()
            process.join()
            done = process.exitcode == 0
        else:
            try:
                run()
                done = True
            except VeneerError:
                done = False
        found = state(library)
        assert found in (before, after) or (
            change == "collect" and set(after) <= set(found) <= set(before)
        ), k
        if done:
            assert found == after
            break
        if found == before:  # what was left behind does not stand in the way
            CHANGES[change](library, sources)
            assert state(library) == after
        library.collect(keep=9)
        assert not [p for p in library.objects.iterdir() if p.name.startswith(".")]
        shutil.rmtree(library.folder)
    else:
        pytest.fail("the change never got through")


def _add(folder: Path, source: Path, name: str, barrier) -> None:
    barrier.wait()
    Library(folder).add(source, name=name)


def test_many_processes_adding_at_once_lose_nothing(sources, tmp_path):
    """They share one name and two objects, and make the library themselves."""
    barrier = FORK.Barrier(MANY)
    processes = [
        FORK.Process(
            target=_add,
            args=(
                tmp_path / "l",
                sources / "ab"[n % 2],
                "shared" if n % 5 else f"own-{n}",
                barrier,
            ),
        )
        for n in range(MANY)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * MANY
    library = Library(tmp_path / "l")
    assert {e.name for e in library.entries()} == {
        "shared",
        *(f"own-{n}" for n in range(0, MANY, 5)),
    }
    versions = [e.version for e in library.entries(every_version=True, name="shared")]
    assert [v.version for v in versions] == list(range(1, len(versions) + 1))
    assert all(one.object != two.object for one, two in pairwise(versions))
    assert all(faults == [] for faults in library.verify().values())
    assert not [p for p in library.objects.iterdir() if p.name.startswith(".")]


def _rename_and_tag(folder: Path, number: int, barrier) -> None:
    library = Library(folder)
    barrier.wait()
    for turn in range(6):
        try:
            if number % 2:
                library.change(f"n{(turn + number) % 3}", tag=[f"t{number}"])
            else:
                library.rename(f"n{(turn + number) % 3}", f"n{(turn + number + 1) % 3}")
        except VeneerError:
            continue


def test_renames_and_tags_that_race_lose_no_version(sources, tmp_path):
    library = Library(tmp_path / "l")
    library.add(sources / "a", name="n0")
    library.add(sources / "b", name="n0")
    library.add(sources / "p", name="n1")
    objects = sorted(entry[2] for entry in state(library))
    barrier = FORK.Barrier(6)
    processes = [
        FORK.Process(target=_rename_and_tag, args=(library.folder, n, barrier)) for n in range(6)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(entry[2] for entry in state(library)) == objects


def _collect(folder: Path, stop) -> None:
    while not stop.is_set():
        Library(folder).collect(keep=1)


def test_collecting_while_others_add_removes_nothing_that_is_named(sources, tmp_path):
    library = Library(tmp_path / "l")
    library.add(sources / "p", name="z")
    stop, barrier = FORK.Event(), FORK.Barrier(6)
    collector = FORK.Process(target=_collect, args=(library.folder, stop))
    collector.start()
    adders = [
        FORK.Process(target=_add, args=(library.folder, sources / "ab"[n % 2], f"n{n}", barrier))
        for n in range(6)
    ]
    for process in adders:
        process.start()
    for process in adders:
        process.join()
    stop.set()
    collector.join()
    assert {e.name for e in library.entries()} == {"z", *(f"n{n}" for n in range(6))}
    assert all(faults == [] for faults in library.verify().values())
