"""Triton for tests: on a GPU where there is one, else its interpreter, on the CPU; the importing
file is left out where there is neither."""

import os
import sys
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("Triton is not installed (it comes with torch for CUDA)", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip(
            "Triton was loaded without its interpreter: run this file alone",
            allow_module_level=True,
        )
    os.environ["TRITON_INTERPRET"] = "1"  # before its first import

    import numpy as np
    import triton.language as tl
    from triton.language.extra import libdevice
    from triton.runtime import interpreter

    # What liger-kernel's kernels need and the interpreter lacks: numbers that know their type, and
    # functions of CUDA's library.
    _convert = interpreter._implicit_cvt

    def _as_tensor(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return _convert(argument)

    interpreter._implicit_cvt = _as_tensor
    libdevice.rsqrt = lambda x: 1.0 / tl.sqrt(x)
    libdevice.tanh = lambda x: 2.0 * tl.sigmoid(2.0 * x) - 1.0
