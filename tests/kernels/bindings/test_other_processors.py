"""The compiled kernels for processors that are not here: all of them compile, and link to a
library."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[3] / "src" / "veneer" / "kernels" / "native"
TARGETS = ["aarch64-linux-gnu", "aarch64-macos"]


@pytest.mark.skipif(
    find_spec("ziglang") is None,
    reason="ziglang is not installed: a C compiler for every processor",
)
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_compile_and_link_for(target, tmp_path):
    compiler = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        target,
        "-O1",
        "-fPIC",
        "-ffp-contract=off",
    ]
    sources = sorted(map(str, NATIVE.rglob("*.c")))
    command = [
        *compiler,
        "-shared",
        "-Wno-unknown-pragmas",
        *(f"-I{folder}" for folder in {path.parent for path in NATIVE.rglob("*.h")}),
        *sources,
        "-o",
        str(tmp_path / "native.so"),
        "-lm",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert b"veneer_nf4_dequantize" in (tmp_path / "native.so").read_bytes()
