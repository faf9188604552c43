"""Checkpoints: everything a resumed run needs to continue bit for bit, written atomically.

    checkpoints/000120/   state.safetensors (values and moments), state.json (position, best so far,
                          ...), MANIFEST.json (sizes and SHA-256, written last)

The newest valid checkpoint is used; a damaged one is reported and skipped. Pruning never removes
the newest valid one or the best, and verifies bytes before it removes others.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.errors import CorruptFileError
from veneer.files.atomic import MANIFEST, atomic_folder, verify_manifest, write_manifest
from veneer.files.strict_json import json_text, read_json


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{step:06d}"


@dataclass(frozen=True)
class SplitTensor:
    """Describes a one-dimensional float32 tensor that no process holds whole.

    pieces: yields (offset, values) from all processes; each of them must iterate over all pieces.
    """

    size: int
    pieces: Callable[[], Iterator[tuple[int, Tensor]]]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size,)

    @property
    def nbytes(self) -> int:
        return 4 * self.size


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Tensor | SplitTensor], state: dict[str, Any]
) -> Path:
    """Writes checkpoints/NNNNNN. Raises DoesNotFitError on a full disk; earlier checkpoints stay
    intact.
    """
    path = checkpoint_path(folder, step)
    size = sum(t.nbytes for t in tensors.values())
    with atomic_folder(path, replace=True, needed_bytes=size + 2**16) as partial:
        write_tensors(partial / "state.safetensors", tensors)
        (partial / "state.json").write_text(json_text(state), encoding="utf-8")
        write_manifest(partial)
    return path


def send_pieces(tensors: Mapping[str, Tensor | SplitTensor]) -> None:
    """Takes part in saving on processes other than the leader, by sending their pieces."""
    for tensor in tensors.values():
        for _ in tensor.pieces() if isinstance(tensor, SplitTensor) else ():
            pass


def write_tensors(path: Path, tensors: Mapping[str, Tensor | SplitTensor]) -> None:
    """Writes as safetensors' save_file does; split tensors piece by piece."""
    whole_tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }
    split_tensors = {
        name: tensor for name, tensor in tensors.items() if isinstance(tensor, SplitTensor)
    }
    if not split_tensors:
        save_file(whole_tensors, path)
        return
    assert all(tensor.dtype == torch.float32 for tensor in whole_tensors.values())
    header, offsets, end = dict[str, Any](), dict[str, int](), 0
    for name in sorted(tensors):
        offsets[name], end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name in tensors:
            for start, piece in (
                split_tensors[name].pieces()
                if name in split_tensors
                else [(0, whole_tensors[name].view(-1))]
            ):
                file.seek(8 + len(text) + offsets[name] + 4 * start)
                file.write(piece.detach().cpu().contiguous().numpy().data)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns (memory-mapped tensors, state). CorruptFileError lists what is wrong."""
    if faults := verify_manifest(path):
        raise CorruptFileError(f"checkpoint {path} is damaged", faults)
    return load_file(path / "state.safetensors"), read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's state.json. Earlier versions wrote a model's answer unchanged, even a
    NUL.
    """
    return read_json(path / "state.json", repair=True)


def load_values(path: Path) -> Tensor:
    """Reads the trained values of a checkpoint. CorruptFileError lists what is wrong."""
    if faults := verify_manifest(path):
        raise CorruptFileError(f"checkpoint {path} is damaged", faults)
    with safe_open(path / "state.safetensors", framework="pt") as file:
        return file.get_tensor("values")


def tensor_hash(values: Tensor) -> str:
    """Returns the SHA-256 of a tensor's bytes, in hex."""
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().data).hexdigest()


def numbers(folder: Path) -> list[int]:
    """Lists the steps of the checkpoints in the folder, valid or not, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.is_dir() and path.name.isdigit())


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest intact checkpoint, and the faults of newer ones."""
    faults: list[str] = []
    for step in reversed(numbers(folder)):
        path = checkpoint_path(folder, step)
        if not (path_faults := verify_manifest(path)):
            return path, faults
        faults += [f"{path.name}: {fault}" for fault in path_faults]
    return None, faults


def prune(folder: Path, *, keep: int, best: int | None) -> None:
    """Removes checkpoints older than the newest `keep` intact ones, except the best.

    Also removes what an interrupted removal left. Hashes decide what is intact: a damaged
    checkpoint does not count, so none is removed that could be needed.
    """
    intact = 0
    for step in reversed(numbers(folder)):
        path = checkpoint_path(folder, step)
        if intact >= max(keep, 1):
            if step != best:
                _remove(path)
        elif not verify_manifest(path):
            intact += 1
        elif step != best and not (path / MANIFEST).is_file():
            _remove(path)


def _remove(path: Path) -> None:
    """Removes the manifest first, so that an interrupted removal leaves no checkpoint."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)
