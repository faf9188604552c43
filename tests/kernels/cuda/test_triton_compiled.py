"""Every kernel in Triton, ours and those of liger-kernel that we call, becomes machine code of GPUs
that are not here: what its interpreter lets pass, a compiler refuses."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MOST_SHARED = {75: 64 * 1024}
"""Bytes that a block of threads has."""
MOST_ELSEWHERE = 99 * 1024
"""On the smallest of the others, those for consumers (86, 89, 120)."""
MOST_SPILLED = 32
"""Bytes of a thread without a register, from Ampere on and Triton 3.7: each is stored and loaded
again."""
KERNELS = sorted(path.stem for path in (ROOT / "src/veneer/kernels/cuda").glob("triton_*.py"))


@pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (it comes with torch for CUDA)"
)
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_every_kernel_is_compiled_for(capability, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment.pop("TRITON_INTERPRET", None)
    program = ROOT / "tests" / "support" / "kernels" / "triton_compiler.py"
    command = [sys.executable, str(program), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert max(int(line.split()[-2]) for line in lines) <= MOST_SHARED.get(
        capability, MOST_ELSEWHERE
    )
    if capability >= 80 and tuple(map(int, version("triton").split(".")[:2])) >= (3, 7):
        ours = [line for line in lines if line.startswith("veneer.")]
        assert not [line for line in ours if int(line.split()[-4]) > MOST_SPILLED]
    decoded = [line for line in lines if "triton_nf4._dequantize" in line]
    assert decoded and all("loads 4, stores 16" in line for line in decoded), (
        decoded
    )  # eight nibbles a lane
    made = {line.partition("(")[0].split(".")[-2] for line in lines}
    liger = {"cross_entropy", "geglu", "rms_norm", "rope", "swiglu"}
    assert made == {*KERNELS} - {"triton_numbers"} | (liger if find_spec("liger_kernel") else set())
