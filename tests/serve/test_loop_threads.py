"""The engine's thread has the processors to itself."""

import asyncio
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.serve.server import made_base
from veneer.decoding.adapters import Fixed
from veneer.decoding.engine import Engine
from veneer.kernels import native
from veneer.serve.loop import EngineLoop


def test_the_thread_that_loaded_the_base_keeps_no_helpers_once_another_computes():
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        pytest.skip("threads are counted as Linux counts them")
    threads, before = Path("/proc/self/task"), torch.get_num_threads()
    base = made_base()
    engine = Engine(base, budget_bytes=2**20, adapters=Fixed({}))

    async def started() -> None:
        loop = EngineLoop(engine)
        helped = len(list(threads.iterdir()))
        loop.start()
        try:
            deadline = time.monotonic() + 10
            while len(list(threads.iterdir())) > helped - 4 + 1 and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert len(list(threads.iterdir())) <= helped - 4 + 1  # the engine's own
        finally:
            await loop.close(1.0)

    try:
        torch.set_num_threads(5)
        torch.ones(2**20).add(1)
        asyncio.run(started())
    finally:
        torch.set_num_threads(before)
        native.end_helpers()
