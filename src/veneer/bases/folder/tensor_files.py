"""The tensors of safetensors files, each read when it is asked for and kept by nobody.

By plain reads, not by mapping the file: mapped pages count as this process's memory for as long as
the file is open, and the point of reading one by one is that they do not add up. safetensors itself
opens each file first: it refuses headers that are longer than their file, and ranges that overlap,
leave holes or do not fit a shape.
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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `tensor[...]` reads it. start: byte in the file."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        """Raises SourceError for a type that is not read."""
        if self.kind not in TYPES:
            raise SourceError(
                f"{self.path} holds values of type {self.kind}, which are not read",
                next_step="Take a version of the model in bf16, f16 or f32.",
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

    # What transformers asks of a slice of a file.
    def get_dtype(self) -> str:
        return self.kind

    def get_shape(self) -> list[int]:
        return list(self.shape)


def stored_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Name -> tensor, of all files. Raises CorruptFileError for those that are truncated or no
    safetensors."""
    found: dict[str, StoredTensor] = {}
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
            if name != "__metadata__":
                start = 8 + length + entry["data_offsets"][0]
                found[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), start)
    if faults:
        raise CorruptFileError(
            f"weights in {files[0].parent} cannot be read", faults, NEXT_DOWNLOAD
        )
    return found


def counted(tensors: Mapping[str, StoredTensor]) -> Counter[str]:
    """Number of values per safetensors dtype name."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.kind] += math.prod(tensor.shape)
    return counts
