"""The compiled kernels for processors that are not here: all of them compile, and link to a
library. Where Debian's qemu-user and its compiler for ARM are installed, products of a few rows run
as ARM computes them.
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
USED = {"few_rows", "few_rows_tiles", "parallel", "features"}
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

# Products of 1 to 13 rows, of widths that fill no register, and what plain C gives: float32 equals
# it to a rounding of each sum, bf16 to one of the result.
PROGRAM = """
#include "few_rows.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
struct few_rows_part { const void *w, *bias; void *y; int64_t outs, narrow; };
struct few_rows { const void *x; const struct few_rows_part *parts; int64_t count, rows, width,
                  apart; int type; };
int veneer_few_rows(const struct few_rows *call, int most);
int veneer_has_bfdot(void);
static float drawn(void) { return (float)rand() / RAND_MAX - 0.5f; }
static float value(const void *at, int64_t i, int type) {
    return type == FEW_FP32 ? ((const float *)at)[i]
                            : float_of_bits((uint32_t)((const uint16_t *)at)[i] << 16);
}
static void *values(int64_t count, int type) {
    float *at = malloc(4 * count);
    for (int64_t i = 0; i < count; i++)
        if (type == FEW_FP32) at[i] = drawn();
        else ((uint16_t *)at)[i] = bf16_of_float(drawn());
    return at;
}
int main(void) {
    int bad = 0, cases = 0;
    for (int type = 0; type < 2; type++)
        for (int most = 2; most < 5; most += 2)
            for (int64_t rows = 1; rows < 14; rows += 3)
                for (int64_t width = 61; width < 140; width += 37) {
                    const int64_t outs = 11;
                    void *x = values(rows * width, type), *w = values(outs * width, type),
                         *bias = values(outs, type), *y = malloc(4 * rows * outs);
                    struct few_rows_part part = {w, bias, y, outs, 0};
                    struct few_rows call = {x, &part, 1, rows, width, width, type};
                    bad += veneer_few_rows(&call, most) != 0;
                    for (int64_t m = 0; m < rows; m++)
                        for (int64_t o = 0; o < outs; o++, cases++) {
                            double sum = value(bias, o, type), size = fabs(sum);
                            for (int64_t k = 0; k < width; k++) {
                                double one = (double)value(x, m * width + k, type) *
                                             value(w, o * width + k, type);
                                sum += one, size += fabs(one);
                            }
                            const double off = fabs(value(y, m * outs + o, type) - sum);
                            bad += !(off <= size * 1e-6 + (type ? fabs(sum) / 256 : 0));
                        }
                    free(x), free(w), free(bias), free(y);
                }
    printf("%d of %d wrong, BFDOT %d\\n", bad, cases, veneer_has_bfdot());
    return bad != 0;
}
"""


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
def program(tmp_path_factory):
    """The path of the program, compiled for ARM."""
    if not (shutil.which(CROSS) and shutil.which(EMULATOR)):
        pytest.skip(f"needs {CROSS} and {EMULATOR}: apt install gcc-aarch64-linux-gnu qemu-user")
    folder = tmp_path_factory.mktemp("arm")
    (folder / "program.c").write_text(PROGRAM)
    program = folder / "program"
    used = [path for path in SOURCES if Path(path).stem in USED]
    command = [CROSS, *FLAGS, *CALLED, "-static", folder / "program.c", *used, "-o", program, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return program


@pytest.mark.parametrize("processor", ["cortex-a72", "max"])
def test_products_of_a_few_rows_on_arm(processor, program):
    run = subprocess.run([EMULATOR, "-cpu", processor, program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith(f"BFDOT {int(processor == 'max')}\n")
