"""Reads untrusted safetensors files strictly and within limits.

A file is refused before any tensor is read unless its header is exact: every offset is used, no
holes, no overlaps, no duplicate names, shape times item size equals the byte range, and the last
range ends where the file ends. Non-finite values are refused too, which the safetensors library
does not check. Nothing here unpickles.

Not known here: which tensors an adapter should have (formats/peft/tensors.py). Source:
https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from veneer.errors import CorruptFileError, SourceError, UnsafeFileError
from veneer.files.strict_json import FOREIGN, RESTORE, parse_json

MAX_HEADER_BYTES = 1_000_000
MAX_TENSORS = 10_000
MAX_DIMENSIONS = 8
MAX_NAME = 500

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of values by their names in a file."""
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types that an adapter's file may hold."""

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class TensorInfo:
    """An entry of a header: dtype in the format's spelling, bytes [begin, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads names, dtypes and shapes of a safetensors file, in the file's order of names.

    Raises SourceError (not found), UnsafeFileError (beyond the limits), CorruptFileError (all
    faults).
    """
    with _explain_read_errors(path), path.open("rb") as file:
        return _read_header(path, file)[0]


@contextmanager
def _explain_read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        raise SourceError(f"{path} cannot be read: {fault.strerror}") from fault


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, TensorInfo], bytes]:
    """Reads the header and checks it against the file's size. Returns it, and the bytes read so
    far."""
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CorruptFileError(
            f"{path} has {len(prefix)} bytes: too short for safetensors", [], RESTORE
        )
    (header_bytes,) = struct.unpack("<Q", prefix)
    if header_bytes > MAX_HEADER_BYTES:
        raise UnsafeFileError(
            f"{path} announces a header of {header_bytes:,} bytes; the limit is"
            f" {MAX_HEADER_BYTES:,}",
            [],
            FOREIGN,
        )
    text = file.read(header_bytes)
    if len(text) < header_bytes or not text.startswith(b"{"):
        raise CorruptFileError(f"{path} does not begin with a safetensors header", [], RESTORE)
    entries = parse_json(text, path, max_bytes=MAX_HEADER_BYTES)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CorruptFileError(f"{path}: __metadata__ is not a table of strings", [], RESTORE)
    if len(entries) > MAX_TENSORS:
        raise UnsafeFileError(
            f"{path} holds {len(entries):,} tensors; the limit is {MAX_TENSORS:,}", [], FOREIGN
        )
    return _check_layout(path, entries, file_bytes - 8 - header_bytes), prefix + text


def _check_layout(path: Path, entries: Mapping[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    """Checks that every entry is well formed and that together they cover the data without a
    gap."""
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
            kind = (
                "overlaps the one before it" if info.begin < position else "leaves a hole before it"
            )
            corrupt.append(f"{name}: begins at {info.begin}, expected {position}: {kind}")
        position = max(position, info.end)
    if not unsafe and not corrupt and position != data_bytes:
        corrupt.append(
            f"the tensors end at byte {position:,} of the data, the file at {data_bytes:,}"
        )
    if unsafe:
        raise UnsafeFileError(f"{path} is not an adapter's tensor file", unsafe + corrupt, FOREIGN)
    if corrupt:
        raise CorruptFileError(f"{path} is damaged", corrupt, RESTORE)
    return infos


def _entry_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "not {dtype, shape, data_offsets}"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FLOATS:
        return f"dtype {str(dtype)[:20]!r} is not one of {', '.join(FLOATS)}"
    if not _natural_numbers(shape) or len(shape) > MAX_DIMENSIONS:
        return f"shape {str(shape)[:80]} is not a list of up to {MAX_DIMENSIONS} sizes"
    if not _natural_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {str(offsets)[:80]} are not a begin and an end"
    if 0 in shape:
        return f"shape {shape} is empty: the values were not gathered when it was saved"
    if (expected := math.prod(shape) * TYPES[dtype].itemsize) != offsets[1] - offsets[0]:
        return (
            f"shape {shape} of {dtype} takes {expected} bytes, the range has"
            f" {offsets[1] - offsets[0]}"
        )
    return None


def _natural_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], str]:
    """Reads the tensors, and the SHA-256 of exactly the bytes they come from, in hex.

    The file is read once. The tensors are views of one buffer, which lives as long as any of them.
    """
    with _explain_read_errors(path), path.open("rb") as file:
        infos, head = _read_header(path, file)
        data = torch.empty(max((info.end for info in infos.values()), default=0), dtype=torch.uint8)
        raw: Any = data.numpy()  # its bytes
        if (num_read := file.readinto(raw)) != len(data) or file.read(1):
            raise CorruptFileError(
                f"{path} changed while it was read", [f"{num_read:,} bytes of it"], RESTORE
            )
    digest = hashlib.sha256(head)
    digest.update(raw)
    tensors = {
        name: _view_as(data[info.begin : info.end], TYPES[info.dtype]).view(info.shape)
        for name, info in infos.items()
    }
    if not _all_finite(data, infos):
        faults = [
            f"{name}: {int((~torch.isfinite(tensor)).sum()):,} of {tensor.numel():,} values are not"
            " finite"
            for name, tensor in tensors.items()
            if not torch.isfinite(tensor).all()
        ]
        raise CorruptFileError(
            f"{path} holds values that are not finite",
            faults,
            "The training that wrote it diverged, or the file was changed: take an earlier"
            " checkpoint.",
        )
    return tensors, digest.hexdigest()


def _view_as(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Views bytes as values; copies them if the offset is not a multiple of the value's size."""
    return (
        raw.view(dtype) if raw.storage_offset() % dtype.itemsize == 0 else raw.clone().view(dtype)
    )


def _all_finite(data: Tensor, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether all values are finite. Ranges of one type are checked together: a call per tensor
    costs more."""
    ranges: list[tuple[str, int, int]] = []
    for info in sorted(infos.values(), key=lambda info: info.begin):
        if ranges and ranges[-1][0] == info.dtype:
            ranges[-1] = (info.dtype, ranges[-1][1], info.end)
        else:
            ranges.append((info.dtype, info.begin, info.end))
    # The extremes are NaN if any value is, and computing them is ten times as fast as isfinite.
    extremes = (
        torch.aminmax(_view_as(data[begin:end], TYPES[dtype])) for dtype, begin, end in ranges
    )
    return all(math.isfinite(float(low)) and math.isfinite(float(high)) for low, high in extremes)


def file_start(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int], int]:
    """Returns what a file of these tensors begins with, as safetensors writes it: 8 bytes with the
    length of the header, and the header, padded to 8. Also returns where each tensor begins behind
    it, and how many bytes all take."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, position = dict[str, int](), 0
    # Wide types first keeps every tensor aligned to its own size.
    for name, tensor in sorted(
        tensors.items(), key=lambda item: (-item[1].element_size(), item[0])
    ):
        begins[name], end = position, position + tensor.nbytes
        header[name] = {
            "dtype": TYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, begins, position
