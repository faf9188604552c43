"""Recovers Llama 3's rotary scaling from a .gguf file's rope_freqs.weight, one divisor per
frequency."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from veneer.bases.gguf.header import undo_single_precision

Factors = np.ndarray[Any, Any]
_LOW, _HIGH = 1.0, 4.0
_ORIGINALS = (8192, 4096, 16384, 32768)
"""Context lengths of the released models, which the file does not name."""


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Factors:
    """Returns the divisors (head_dim / 2,) of rotary settings, by transformers' formula of
    rope_type llama3."""
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths, original = 2 * np.pi / frequencies, rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def llama3_scaling(factors: Factors, rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """Finds the settings of rope_type llama3 with these divisors; None if no released model has
    them."""
    if rope["rope_type"] != "default":
        return None
    for original in _ORIGINALS:
        scaling = {
            "rope_type": "llama3",
            "factor": undo_single_precision(float(factors.max())),
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": original,
        }
        if np.allclose(llama3_factors({**rope, **scaling}, 2 * len(factors)), factors, rtol=1e-4):
            return scaling
    return None
