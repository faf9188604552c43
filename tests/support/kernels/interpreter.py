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
