"""Every kernel in Triton becomes machine code of GPUs that are not here: what its interpreter lets pass, a compiler
refuses."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_SHARED = 99 * 1024
"""Bytes that a block of threads has on the smallest of these GPUs, those for consumers (86, 89, 120)."""
KERNELS = sorted(path.stem for path in (ROOT / "src" / "veneer" / "kernels").glob("triton_*.py"))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (it comes with torch for CUDA)")
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_kernel_is_compiled_for(capability, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "triton_compiler.py"), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(int(line.split()[-2]) for line in done.stdout.splitlines()) <= MOST_SHARED
    decoded = [line for line in done.stdout.splitlines() if "triton_nf4._dequantize" in line]
    assert decoded and all("loads 4, stores 16" in line for line in decoded), decoded  # eight nibbles a lane
    made = {line.split(".")[2] for line in done.stdout.splitlines()}
    assert made == set(KERNELS) - {"triton_numbers"}
