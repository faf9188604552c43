"""The type that a base's weights are stored in, from the headers of its files alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from veneer.bases.compute import DTYPES, HeldAs
from veneer.errors import SourceError

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def stored_type(
    folder: Path, stored: Counter[str], held: tuple[str, torch.dtype] | None, asked: HeldAs
) -> torch.dtype:
    """Of a folder that holds its weights in 4 bits, the type that they were quantised from.

    Of types that are none of ours, such as F64, what is asked for.
    """
    if held is not None:
        return held[1]
    if asked in DTYPES and not any(name in _STORED for name, _ in stored.most_common(1)):
        return DTYPES[asked]
    return most_common_dtype(folder, stored)


def most_common_dtype(folder: Path, counts: Counter[str]) -> torch.dtype:
    """The dtype of most stored values: some checkpoints keep a few float32 weights among bf16
    ones."""
    name = counts.most_common(1)[0][0] if counts else "no weights"
    if name not in _STORED:
        raise SourceError(
            f"the weights in {folder} are stored as {name}",
            next_step="Take a version of the model in bf16, f16 or f32.",
        )
    return _STORED[name]
