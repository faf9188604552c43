"""Weights on pages of this process: the same values, in no file, at no time twice, and only where
there is room."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.tiny import save_tiny
from veneer import api
from veneer.bases.loading import own_pages
from veneer.bases.loading.own_pages import available_bytes, take_own_pages
from veneer.kernels.bindings import pages
from veneer.models.load import load_base

MIB = 2**20

pytestmark = pytest.mark.skipif(not pages.has_huge_pages(), reason="no huge pages here")


class Mapped(nn.Module):
    """Of the tensors of a file, which lie where it is mapped."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        for name, tensor in load_file(file).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def written(folder: Path, count: int, mib: int) -> Path:
    draw = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(mib * MIB // 4 + i, generator=draw) for i in range(count)}
    save_file(tensors, folder / "weights.safetensors", metadata={"of": "an odd length"})
    return folder / "weights.safetensors"


def in_files(module: nn.Module) -> list[bool]:
    files = own_pages.MappedFiles()
    return [files.hold(parameter) for parameter in module.parameters()]


def test_weights_keep_their_values_and_leave_the_file_for_whole_lines(tmp_path: Path) -> None:
    file = written(tmp_path, 3, 1)
    module = Mapped(file)
    objects = [*module.parameters()]
    module.register_parameter("again", module.w1)
    assert in_files(module) == [True] * 3
    assert take_own_pages(module) >= 3 * MIB
    assert in_files(module) == [False] * 3
    assert all(a is b for a, b in zip(module.parameters(), objects, strict=True))
    assert all(parameter.data_ptr() % own_pages.LINE == 0 for parameter in module.parameters())
    assert all(
        torch.equal(tensor, module.get_parameter(name)) for name, tensor in load_file(file).items()
    )
    assert str(file) not in Path("/proc/self/maps").read_text()
    assert take_own_pages(module) == 0  # they are in no file any more


def test_what_left_the_process_comes_back_out_of_the_file(tmp_path: Path) -> None:
    module = Mapped(written(tmp_path, 1, 4))
    before = module.w0.clone()
    own_pages.release_pages(module.w0)
    assert torch.equal(module.w0, before)


def test_weights_stay_where_memory_is_short_or_they_are_few_or_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Mapped(written(tmp_path, 1, 1))
    assert take_own_pages(few) == 0
    assert in_files(few) == [True]
    assert take_own_pages(nn.Linear(1024, 1024)) == 0
    many = Mapped(written(tmp_path, 4, 1))
    assert available_bytes() > 8 * MIB
    monkeypatch.setattr(own_pages, "available_bytes", lambda: 7 * MIB)
    assert take_own_pages(many) == 0
    assert in_files(many) == [True] * 4


WATCHED = """
import sys
from pathlib import Path
import torch
from tests.bases.test_own_pages import Mapped
from veneer.bases.loading.own_pages import take_own_pages
def status(name):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024
module = Mapped(Path(sys.argv[1]))
before = status("VmRSS")
assert sum(float(each.sum()) for each in module.parameters()) != 0.5
read = status("VmRSS") - before
print(take_own_pages(module) // 2**20, read, status("VmHWM") - before)
"""


def test_memory_that_is_read_again_and_again_shares_no_huge_page_with_any_other() -> None:
    """Where two mappings meet within one, the system gives both small pages there."""
    rooms = [pages.allocate(count) for count in (pages.HUGE, 9_830_400, 10 * pages.HUGE + 1)]
    assert [len(room) for room in rooms] == [pages.HUGE, 9_830_400, 10 * pages.HUGE + 1]
    assert all(room.data_ptr() % pages.HUGE == 0 for room in rooms)
    for room in rooms:
        assert int(room.fill_(7).sum(dtype=torch.int64)) == 7 * len(room)


def test_a_process_never_holds_both_copies(tmp_path: Path) -> None:
    file = written(tmp_path, 16, 12)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, str(file)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    moved, read, most = map(int, run.stdout.split())
    assert moved == 192
    assert read > 180  # MiB, while the file is mapped
    assert most < 192 + 12 + 16  # one tensor twice; what threads and libraries take


def test_a_base_is_the_same_base_and_computes_the_same_bits(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path, "llama", hidden_size=128, intermediate_size=2048))
    mapped, own = load_base(folder, dtype="stored"), api.load(folder, dtype="stored")
    assert all(in_files(mapped.model))
    assert not any(in_files(own.model))
    assert own.fingerprint() == mapped.fingerprint()
    ids = torch.arange(40)[None]
    assert torch.equal(own.model(ids).logits, mapped.model(ids).logits)


def is_advised(address: int) -> bool:
    """Whether the process asked for huge pages at this address: flag "hg" of its mapping."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("an address in no mapping")


@pytest.mark.parametrize(
    ("huge", "last"), [(1, True), (4.7, True), (1.1, False), (7.1, False), (8.5, True), (9.1, True)]
)
def test_the_last_huge_page_is_used_if_little_of_it_is_left_over(huge: float, last: bool) -> None:
    count = int(huge * pages.HUGE)
    room = pages.allocate(count)
    assert is_advised(room.data_ptr()) and is_advised(room.data_ptr() + count - 1) == last


def test_transposed_weights_are_stored_by_rows_with_the_same_values(tmp_path):
    folder = save_tiny(tmp_path, "gpt2")
    file = load_file(folder / "model.safetensors")
    block = load_base(str(folder), device="cpu").model.transformer.h[0]
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        weight = block.get_parameter(f"{name}.weight")
        assert weight.T.is_contiguous()
        assert torch.equal(weight, file[f"transformer.h.0.{name}.weight"])
