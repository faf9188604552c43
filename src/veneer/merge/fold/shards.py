"""Writing safetensors files of a model one tensor at a time: names, shapes and types are known
before the values.

    model.safetensors    or    model-00001-of-00003.safetensors ... and model.safetensors.index.json

The largest thing in memory is the tensor that is being written. Layout as transformers'
save_pretrained. Source: https://github.com/huggingface/safetensors#format.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from veneer.files.strict_tensors import file_start

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
            size = tensor.nbytes
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
        self.total_bytes = sum(tensor.nbytes for tensor in planned.values())

    def _begin(self, file: str, shard: Mapping[str, Tensor]) -> None:
        start, begins, _ = file_start(shard)
        handle = (self.folder / file).open("wb")
        self.files[file] = handle
        handle.write(start)
        for name, begin in begins.items():
            self.places[name] = TensorLocation(
                file, len(start) + begin, tuple(shard[name].shape), shard[name].dtype
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
