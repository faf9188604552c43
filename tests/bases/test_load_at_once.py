"""Bases that several threads load at once, and adapters put on beside: each as alone, and the
process as it was."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import veneer
from tests.support.tiny import save_tiny
from veneer import LoRA
from veneer.adapters.placement.attachment import Attachment
from veneer.bases.compute import times_float32
from veneer.bases.quiet_transformers import quiet

IDS = torch.tensor([[5, 66, 7, 123]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("bases")
    kinds = [("llama", torch.float32), ("qwen2", torch.bfloat16)]
    return [save_tiny(place / name, name, dtype) for name, dtype in kinds]


def logits(folder: Path) -> torch.Tensor:
    return veneer.load(folder, dtype="stored").model(IDS).logits


def test_threads_that_load_at_once_get_the_bases_that_each_gets_alone(folders: list[Path]) -> None:
    alone = [logits(folder) for folder in folders]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(logits, folders * 8))
    for number, result in enumerate(found):
        assert torch.equal(result, alone[number % len(folders)])
    assert torch.get_default_dtype() == torch.float32
    for folder, before in zip(
        folders, alone, strict=True
    ):  # what was left behind broke every later one
        assert torch.equal(logits(folder), before)


def test_who_is_quiet_is_so_alone() -> None:
    bars, filters = logging.is_progress_bar_enabled(), list(warnings.filters)
    inside = threading.Event()

    def other() -> None:
        with quiet():
            inside.set()

    with quiet(), quiet():  # one thread may twice
        thread = threading.Thread(target=other)
        thread.start()
        assert not inside.wait(0.2)
    thread.join()
    assert inside.is_set()
    assert (logging.is_progress_bar_enabled(), warnings.filters) == (bars, filters)


def test_an_adapter_that_is_made_while_another_thread_loads_is_the_same(
    folders: list[Path],
) -> None:
    base = veneer.load(folders[0])

    def values(adapter: Attachment) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in adapter.parameters().items()}

    wanted = values(base.attach(LoRA(rank=4), name="before", seed=3))
    with ThreadPoolExecutor(1) as threads, quiet():
        torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a model
        try:
            making = threads.submit(base.attach, LoRA(rank=4), name="meanwhile", seed=3)
            with pytest.raises(TimeoutError):
                making.result(0.3)
        finally:
            torch.set_default_dtype(torch.float32)
    found = values(making.result())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_processor_is_measured_by_one_thread_and_left_as_it_was() -> None:
    threads = torch.get_num_threads()
    times_float32.cache_clear()
    with ThreadPoolExecutor(3) as pool:
        assert all(each > 0 for each in pool.map(times_float32, [torch.bfloat16] * 3))
    assert torch.get_num_threads() == threads
