"""Reads tensor files that anyone may have written: safetensors, strictly, within limits.

A file is refused before a byte of its tensors is read unless its header is exactly what the format
allows: every offset accounted for, no holes, no overlaps, no duplicate names, shape times item size equal
to the byte range, the last range ending where the file ends. Non-finite values are refused too, which the
safetensors library does not check. Nothing here unpickles.

Not known here: which tensors an adapter should have (store/format.py).
Source: https://github.com/huggingface/safetensors#format
"""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.errors import CorruptFileError, SourceError, UnsafeFileError
from veneer.store.strict_json import FOREIGN, RESTORE, parse_json

MAX_HEADER_BYTES = 1_000_000
MAX_TENSORS = 10_000
MAX_DIMENSIONS = 8
MAX_NAME = 500

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header: dtype as the format spells it, bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a safetensors file, in the file's order of names.

    Raises SourceError (no such file), UnsafeFileError (beyond the limits), CorruptFileError (all faults).
    """
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CorruptFileError(
                    f"{path} has {len(prefix)} bytes: too short for safetensors", [], RESTORE
                )
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > MAX_HEADER_BYTES:
                raise UnsafeFileError(
                    f"{path} announces a header of {header_bytes:,} bytes; the limit is {MAX_HEADER_BYTES:,}",
                    [],
                    FOREIGN,
                )
            text = file.read(header_bytes)
    except OSError as fault:
        raise SourceError(f"{path} cannot be read: {fault.strerror}") from fault
    if len(text) < header_bytes or not text.startswith(b"{"):
        raise CorruptFileError(f"{path} does not begin with a safetensors header", [], RESTORE)
    entries = parse_json(text, path, max_bytes=MAX_HEADER_BYTES)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFileError(f"{path}: __metadata__ is not a table of strings", [], RESTORE)
    if len(entries) > MAX_TENSORS:
        raise UnsafeFileError(
            f"{path} holds {len(entries):,} tensors; the limit is {MAX_TENSORS:,}", [], FOREIGN
        )
    return _checked_layout(path, entries, file_bytes - 8 - header_bytes)


def _checked_layout(path: Path, entries: Mapping[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    """Every entry is well formed and together they tile the data without a gap."""
    infos: dict[str, TensorInfo] = {}
    unsafe: list[str] = []
    corrupt: list[str] = []
    for name, entry in entries.items():
        if len(name) > MAX_NAME or not _NAME.fullmatch(name):
            unsafe.append(f"{name[:80]!r} is not a name of a tensor")
        elif (fault := _entry_fault(entry)) is not None:
            (unsafe if fault.startswith("dtype") else corrupt).append(f"{name}: {fault}")
        else:
            begin, end = entry["data_offsets"]
            infos[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), begin, end)
    position = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            kind = "overlaps the one before it" if info.begin < position else "leaves a hole before it"
            corrupt.append(f"{name}: begins at {info.begin}, expected {position}: {kind}")
        position = max(position, info.end)
    if not unsafe and not corrupt and position != data_bytes:
        corrupt.append(f"the tensors end at byte {position:,} of the data, the file at {data_bytes:,}")
    if unsafe:
        raise UnsafeFileError(f"{path} is not an adapter's tensor file", unsafe + corrupt, FOREIGN)
    if corrupt:
        raise CorruptFileError(f"{path} is damaged", corrupt, RESTORE)
    return infos


def _entry_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "not {dtype, shape, data_offsets}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"dtype {str(dtype)[:20]!r} is not one of {', '.join(ITEM_BYTES)}"
    if not _natural_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        return f"shape {str(shape)[:80]} is not a list of up to {MAX_DIMENSIONS} sizes"
    if not _natural_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {str(offsets)[:80]} are not a begin and an end"
    if 0 in shape:
        return f"shape {shape} is empty: the values were not gathered when it was saved"
    if (expected := math.prod(shape) * ITEM_BYTES[dtype]) != offsets[1] - offsets[0]:
        return f"shape {shape} of {dtype} takes {expected} bytes, the range has {offsets[1] - offsets[0]}"
    return None


def _natural_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file, on the CPU, by name; all finite. Raises as read_header does."""
    infos = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            # clone: the mapped pages must not outlive the file, which may be replaced while we hold them
            tensors = {name: file.get_tensor(name).clone() for name in infos}
    except SafetensorError as fault:
        raise CorruptFileError(f"{path} cannot be read: {fault}", [], RESTORE) from fault
    faults = [
        f"{name}: {int((~torch.isfinite(tensor)).sum()):,} of {tensor.numel():,} values are not finite"
        for name, tensor in tensors.items()
        if not torch.isfinite(tensor).all()
    ]
    if faults:
        raise CorruptFileError(
            f"{path} holds values that are not finite",
            faults,
            "The training that wrote it diverged, or the file was changed: take an earlier checkpoint.",
        )
    return tensors
