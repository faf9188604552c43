"""The compiled kernels load, and say what they run on."""

import ctypes
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from veneer.errors import ConfigError
from veneer.kernels.bindings import library as native
from veneer.kernels.bindings.arguments import available
from veneer.kernels.sources import NATIVE, digest


def test_with_a_compiler_at_hand_the_kernels_are_there():
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no compiler")
    assert native.library() is not None
    assert native.level() in (0, 2, 3)


def test_the_threads_are_those_of_the_openmp_that_torch_uses():
    if native.library() is None or not torch.backends.openmp.is_available():
        pytest.skip("no kernels or no OpenMP here")
    found = native._openmp()
    assert found is not None
    most = ctypes.CFUNCTYPE(ctypes.c_int)(found[1])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert most() == 3
    finally:
        torch.set_num_threads(before)


def test_helpers_of_a_thread_that_computes_no_more_end_before_another_computes():
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        pytest.skip("threads are counted as Linux counts them")
    before, threads = torch.get_num_threads(), Path("/proc/self/task")
    x = torch.ones(2**20)
    try:
        torch.set_num_threads(5)
        x.add(1)
        helped = len(list(threads.iterdir()))
        native.end_helpers()
        deadline = time.monotonic() + 10
        while len(list(threads.iterdir())) > helped - 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(threads.iterdir())) <= helped - 4
        assert x.add(1).sum() == 2**21  # others start
        assert len(list(threads.iterdir())) >= helped
    finally:
        torch.set_num_threads(before)
        native.end_helpers()


def test_switched_off_there_are_none(monkeypatch):
    monkeypatch.setenv(native.OFF, "1")
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert native.level() == -1
    finally:
        native.library.cache_clear()


@pytest.fixture
def limited_to(monkeypatch):
    """The compiled kernels loaded anew under a limit, and without it afterwards."""

    def load(name):
        monkeypatch.setenv(native.MAX_ISA, name)
        native.library.cache_clear()
        return native.library()

    yield load
    monkeypatch.undo()
    if (found := native.library()) is not None:
        found.veneer_limit(5)  # it stays loaded
    native.library.cache_clear()


@pytest.mark.skipif(native.level() < 0, reason="the kernels are not compiled here")
def test_a_newer_processor_acts_as_an_older_one(limited_to):
    before, pairs = native.level(), native.has_bf16()
    for name, level in native.LIMITS.items():
        limited_to(name)
        assert native.level() == min(before, level)
        assert native.has_bf16() == (pairs and level > 3) and not native.has_amx()


def test_kernels_of_other_c_sources_are_refused(monkeypatch, tmp_path):
    """Their functions may take other arguments: a call of them would crash the process."""
    if native.library() is None or os.environ.get(native.BUILT_ELSEWHERE):
        pytest.skip("no kernels of these sources")
    sources = tmp_path / "native"
    shutil.copytree(NATIVE, sources)
    assert digest(sources) == digest()
    changed = sources / "common" / "features.c"
    changed.write_text(changed.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert digest(sources) != digest()
    monkeypatch.setattr(native, "digest", lambda: digest(sources))
    with pytest.raises(ConfigError, match="built from other C sources"):
        native.library.__wrapped__()


def test_a_digest_of_sources_sees_their_names_and_where_each_ends(tmp_path):
    sources = [
        {"a.c": b"12", "b.c": b"3"},
        {"a.c": b"1", "b.c": b"23"},
        {"a.c": b"12", "c.c": b"3"},
        {"a.c": b"12", "under/b.c": b"3"},
    ]
    digests = set()
    for number, texts in enumerate(sources):
        for name, text in texts.items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
        digests.add(digest(tmp_path / str(number)))
    assert len(digests) == len(sources)


@pytest.mark.skipif(native.level() < 0, reason="the kernels are not compiled here")
def test_a_function_that_is_not_compiled_is_not_available():
    assert available("veneer_rms_norm_forward") and not available("veneer_no_such_function")


def test_an_unknown_limit_of_the_processor_is_refused(limited_to):
    if native.level() >= 0:
        with pytest.raises(ConfigError, match="plain, avx2, avx512"):
            limited_to("sse9")
