"""Finds the type that a base's weights are stored in, from the headers of its files."""

from collections import Counter
from pathlib import Path

import torch

from veneer.bases.compute import DTYPES, HeldAs
from veneer.errors import SourceError
from veneer.files.strict_tensors import TYPES

_STORED = {name: TYPES[name] for name in ("F32", "BF16", "F16")}


def stored_type(
    folder: Path,
    stored: Counter[str],
    packed_format: tuple[str, torch.dtype] | None,
    requested: HeldAs,
) -> torch.dtype:
    """Returns the stored type of the weights.

    For 4-bit weights it is the type that they were quantised from. For unsupported types, such as
    F64, it is the requested one.
    """
    if packed_format is not None:
        return packed_format[1]
    if requested in DTYPES and not any(name in _STORED for name, _ in stored.most_common(1)):
        return DTYPES[requested]
    return most_common_dtype(folder, stored)


def most_common_dtype(folder: Path, counts: Counter[str]) -> torch.dtype:
    """Returns the dtype of most stored values: some checkpoints keep a few float32 weights among
    bf16."""
    name = counts.most_common(1)[0][0] if counts else "no weights"
    if name not in _STORED:
        raise SourceError(
            f"the weights in {folder} are stored as {name}",
            next_step="Choose a version of the model in bf16, f16 or f32.",
        )
    return _STORED[name]
