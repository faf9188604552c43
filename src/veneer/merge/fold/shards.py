"""Writing safetensors files of a model one tensor at a time: names, shapes and types are known
before the values.

    model.safetensors    or    model-00001-of-00003.safetensors ... and model.safetensors.index.json

The largest thing in memory is the tensor that is being written. Layout as transformers'
save_pretrained. Source: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MAX_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor stands: file, first byte in it, shape and type."""

    file: str
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ShardWriter:
    """`write` each planned tensor once, in any order; leaving the block checks that none is
    missing."""

    def __init__(
        self, folder: Path, planned: Mapping[str, Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """planned: name -> a tensor of the right shape and type, on the meta device."""
        self.folder = folder
        self.places: dict[str, TensorLocation] = {}
        self.files: dict[str, BinaryIO] = {}
        shards: list[dict[str, Tensor]] = [{}]
        filled = 0
        for name, tensor in planned.items():
            size = tensor_bytes(tensor)
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = tensor
            filled += size
        names = [
            f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
        ]
        for file, shard in zip(
            names if len(shards) > 1 else ["model.safetensors"], shards, strict=True
        ):
            self._begin(file, shard)
        self.missing = set(self.places)
        self.total_bytes = sum(tensor_bytes(tensor) for tensor in planned.values())

    def _begin(self, file: str, shard: Mapping[str, Tensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begins, position = {}, 0
        # wide types first keeps every tensor aligned to its own size
        for name, tensor in sorted(
            shard.items(), key=lambda item: (-item[1].element_size(), item[0])
        ):
            end = position + tensor_bytes(tensor)
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            begins[name], position = position, end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (8 * math.ceil(len(text) / 8) - len(text))
        handle = (self.folder / file).open("wb")
        self.files[file] = handle
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, begin in begins.items():
            self.places[name] = TensorLocation(
                file, 8 + len(text) + begin, tuple(shard[name].shape), shard[name].dtype
            )

    def write(self, name: str, tensor: Tensor) -> None:
        place = self.places[name]
        assert (tuple(tensor.shape), tensor.dtype) == (place.shape, place.dtype), name
        self.missing.remove(name)
        handle = self.files[place.file]
        handle.seek(place.begin)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        handle.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for handle in self.files.values():
            handle.close()
        if kind is not None:
            return
        assert not self.missing, f"never written: {sorted(self.missing)[:4]}"
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {name: place.file for name, place in sorted(self.places.items())},
            }
            (self.folder / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
