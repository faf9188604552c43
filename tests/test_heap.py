"""What a step frees stays the process's while a run trains, and is the system's again afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
glibc = pytest.mark.skipif(
    sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="no glibc"
)
SCRIPT = """
import json, resource
import torch
from veneer.train.heap import steady_heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def marked():
    parts = open("/proc/self/smaps").read().split("VmFlags:")
    return any("[heap]" in part and " hg" in flags.splitlines()[0] for part, flags in zip(parts, parts[1:]))

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
    found = {"outside": outside, "inside": inside, "marked": marked(), "most": most, "kept": resident()}
print(json.dumps({**found, "after": resident()}))
"""


def measured(**given):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env={**own, **given})
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
    "own", [{"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}], ids=str
)
def test_limits_that_someone_set_stay(own):
    found = measured(**own)
    assert found["inside"] > 10_000
    assert not found["marked"]
