"""What a step frees stays the process's while a run trains, and is the system's again
afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.tiny import tiny_model
from veneer.adapters.placement.routing import Routing
from veneer.models import checkpointing
from veneer.models.checkpointing import checkpointed

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
glibc = pytest.mark.skipif(
    sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="no glibc"
)
SCRIPT = """
import json, resource
import torch
from veneer.training.optimizer.heap import steady_heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def marked():
    parts = open("/proc/self/smaps").read().split("VmFlags:")
    pairs = zip(parts, parts[1:])
    return any("[heap]" in part and " hg" in flags.splitlines()[0] for part, flags in pairs)

def step():
    held = [torch.ones(2**18) for _ in range(64)]
    return resident()

def faults():
    step(), step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        most = step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, most

outside, _ = faults()
with steady_heap(256 * 2**20):
    inside, most = faults()
    found = {"outside": outside, "inside": inside, "marked": marked(), "most": most}
    found["kept"] = resident()
print(json.dumps({**found, "after": resident()}))
"""


def measured(**given):
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**own, **given}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@glibc
def test_a_step_takes_no_page_anew_and_the_pages_go_back_at_the_end():
    found = measured()
    assert found["outside"] > 10_000  # 64 MiB, eight times, in pages of 4 KiB
    assert found["inside"] < 500
    assert found["marked"] or not LARGE_PAGES.exists()
    assert found["kept"] > found["most"] - 2**20
    assert found["after"] < found["kept"] - 48 * 2**20


@glibc
@pytest.mark.parametrize(
    "own",
    [
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
    ],
    ids=str,
)
def test_limits_that_someone_set_stay(own):
    found = measured(**own)
    assert found["inside"] > 10_000
    assert not found["marked"]


def test_every_fourth_checkpointed_layer_gives_free_pages_back_both_ways(monkeypatch):
    model, given = tiny_model("llama", num_hidden_layers=8), []
    model.requires_grad_(True)
    monkeypatch.setattr(checkpointing, "give_back", lambda: given.append("pages"))
    ids = torch.arange(6)[None]
    with checkpointed(model, Routing(), on=True):
        loss = model(ids).logits.square().sum()
        assert len(given) == 2 + 1  # and before the logits
        loss.backward()
        assert len(given) == 2 + 1 + 2
        with torch.no_grad():
            model(ids)
        assert len(given) == 2 + 1 + 2
    planned, given[:] = model.to("meta"), []
    with checkpointed(planned, Routing(), on=True):
        planned(ids.to("meta")).logits.sum().backward()
        assert not given
