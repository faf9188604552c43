"""The compiled kernels for processors that are not here: all of them compile, and link to a
library. Where Debian's qemu-user and its compiler for ARM are installed, kernels run as ARM
computes them.
"""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[3] / "src" / "veneer" / "kernels" / "native"
TARGETS = ["aarch64-linux-gnu", "aarch64-macos"]
FLAGS = [
    "-std=gnu11",
    "-O1",
    "-ffp-contract=off",
    "-Wno-unknown-pragmas",
    *(f"-I{folder}" for folder in sorted({path.parent for path in NATIVE.rglob("*.h")})),
]
CALLED = ("-Dalways_inline=", "-Werror=psabi")
"""As functions, on which gcc spends a tenth of the time, loops compute the same."""
SOURCES = sorted(map(str, NATIVE.rglob("*.c")))
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
ON_ARM = Path(__file__).parent / "on_arm"
"""One program for each kernel: it compares what ARM computes with plain C, at odd shapes."""
PROGRAMS = sorted(path.stem for path in ON_ARM.glob("*.c"))


@pytest.mark.skipif(
    find_spec("ziglang") is None,
    reason="ziglang is not installed: a C compiler for every processor",
)
@pytest.mark.parametrize("target", TARGETS)
def test_the_kernels_compile_and_link_for(target, tmp_path):
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-fPIC", "-shared"]
    command = [*compiler, *FLAGS, *SOURCES, "-o", str(tmp_path / "native.so"), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert b"veneer_nf4_dequantize" in (tmp_path / "native.so").read_bytes()


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The paths of the kernels, compiled for ARM."""
    if not (shutil.which(CROSS) and shutil.which(EMULATOR)):
        pytest.skip(f"needs {CROSS} and {EMULATOR}: apt install gcc-aarch64-linux-gnu qemu-user")
    folder = tmp_path_factory.mktemp("arm")
    command = [CROSS, *FLAGS, *CALLED, "-c", *SOURCES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(folder.glob("*.o"))


@pytest.fixture(scope="module", params=PROGRAMS)
def program(request, objects):
    """The path of a program, linked with the kernels."""
    program = objects[0].with_name(request.param)
    source = ON_ARM / f"{request.param}.c"
    command = [CROSS, *FLAGS, *CALLED, "-static", source, *objects, "-o", program, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


@pytest.mark.parametrize("processor", ["cortex-a72", "max"])
def test_kernels_on_arm(processor, program):
    run = subprocess.run([EMULATOR, "-cpu", processor, program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith(f"NEON 1, BFDOT {int(processor == 'max')}\n")
