"""What holds for all tests.

Where a shell put them behind itself, it told them to ignore Ctrl-C and hang-ups, and Veneer keeps
to that. What takes minutes begins first. Garbage collections skip the objects of imports and of
earlier modules: with those, each takes up to a second.

One thread computes, since several processes test at a time; two where our own code shares work
among threads. A thread that waits sleeps, so that another process goes on.

Files of tests lie in memory where it has room for them: each file that is made durable on a disk
takes some milliseconds. PYTEST_DEBUG_TEMPROOT=/tmp puts them on the disk.
"""

import atexit
import gc
import os
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
HERE = Path(__file__).parent
MEMORY, MEMORY_BYTES = Path("/dev/shm"), 4 << 30
"""A file system in memory, and what of it must be free."""
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))  # read when a file is wanted first
ON_TWO_THREADS = {"kernels", "quant", "decoding"}
COUNTED_ONCE = {"cli", "serve", "soak", "training", "tuning"}
"""Folders whose tests do not look at what dry runs count."""
LONGEST = (
    *("kernels/bindings/test_sanitized.py", "tuning/test_tune.py", "processes/test_processes.py"),
    *("jobs/test_together.py", "soak/failures/test_failing_writes.py", "jobs/test_store.py"),
    *("adapters/test_methods.py", "models/test_accelerator.py", "test_wheel.py"),
)
"""Files that take the longest: behind all others, one process would wait for them while the other
rests."""


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_front():
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if signal.getsignal(number := getattr(signal, name, signal.SIGINT)) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def _threads(request):
    import torch

    before = torch.get_num_threads()
    if request.path.relative_to(HERE).parts[0] in ON_TWO_THREADS:
        torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _dry_runs(request):
    from tests.support.dry_runs import counted_once

    is_counted_once = request.path.relative_to(HERE).parts[0] in COUNTED_ONCE
    with counted_once() if is_counted_once else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="module")
def _garbage_of_this_module_alone():
    gc.collect()
    gc.freeze()


def pytest_collection():
    gc.disable()  # what is imported stays


def pytest_collection_finish():
    gc.enable()


atexit.register(gc.unfreeze)  # some libraries report what is left at the end of the process


def pytest_collection_modifyitems(items):
    places = {HERE / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
