"""The compiled kernels load, and say what they run on."""

import ctypes
import shutil

import pytest
import torch

from veneer.kernels import native


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


def test_switched_off_there_are_none(monkeypatch):
    monkeypatch.setenv(native.OFF, "1")
    native._library.cache_clear()
    try:
        assert native.library() is None
        assert native.level() == -1
    finally:
        native._library.cache_clear()
