"""What holds for all tests.

Where a shell put them behind itself, it told them to ignore Ctrl-C and hang-ups, and Veneer keeps
to that. What takes minutes begins first. Garbage collections skip the objects of imports and of
earlier modules: with those, each takes up to a second.
"""

import gc
import signal

import pytest


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_front():
    for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        if signal.getsignal(number := getattr(signal, name, signal.SIGINT)) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def _garbage_of_this_module_alone():
    gc.collect()
    gc.freeze()


def pytest_collection():
    gc.disable()  # what is imported stays


def pytest_collection_finish():
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # some libraries report what is left at the end of the process


def pytest_collection_modifyitems(items):
    """Behind all others one process would wait for it while the other rests."""
    items.sort(key=lambda item: item.path.name != "test_sanitized.py")
