"""Reads tensors of safetensors files one by one on demand, without keeping them.

Files are read, not mapped: mapped pages count as this process's memory while the file is open, and
reading one by one is meant to keep memory small. safetensors opens each file first and refuses
headers that are longer than their file, and ranges that overlap, leave holes or do not fit a shape.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from veneer.bases.folder.faults import NEXT_DOWNLOAD
from veneer.errors import CorruptFileError, SourceError
from veneer.files.strict_tensors import TYPES


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `tensor[...]` reads it. start: first byte in the file"""

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Returns the torch type. Raises SourceError for a type that is not supported."""
        if self.kind not in TYPES:
            raise SourceError(
                f"{self.path} holds values of type {self.kind}, which are not supported",
                next_step="Choose a version of the model in bf16, f16 or f32.",
            )
        return TYPES[self.kind]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        raw = torch.empty(self.bytes, dtype=torch.uint8)
        if self.bytes:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                view = memoryview(raw.numpy().data)
                while view:  # one read ends at 2 GiB
                    if not (count := file.readinto(view)):
                        raise OSError(f"{self.path} ends early")
                    view = view[count:]
        return raw.view(self.dtype).view(self.shape)

    # transformers calls these on slices of files.
    def get_dtype(self) -> str:
        return self.kind

    def get_shape(self) -> list[int]:
        return list(self.shape)


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Returns the tensors of all files by name. Raises CorruptFileError for truncated or invalid
    files, and for a tensor that two of them hold."""
    tensors: dict[str, StoredTensor] = {}
    faults = []
    for path in files:
        try:
            with safe_open(path, framework="pt"), path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError) as fault:
            faults.append(f"{path.name}: {str(fault)[:200]}")
            continue
        for name, entry in header.items():
            if name in tensors:
                faults.append(f"{name} is in {tensors[name].path.name} and in {path.name}")
            elif name != "__metadata__":
                start = 8 + length + entry["data_offsets"][0]
                tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start)
    if faults:
        raise CorruptFileError(
            f"weights in {files[0].parent} cannot be read", faults[:8], NEXT_DOWNLOAD
        )
    return tensors


def count_values_by_type(tensors: Mapping[str, StoredTensor]) -> Counter[str]:
    """Counts the values of each safetensors dtype."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.kind] += math.prod(tensor.shape)
    return counts
