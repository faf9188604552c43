"""Checkpoints: everything that makes a resumed run continue bit for bit, whole on disk or not there
at all.

    checkpoints/000120/   state.safetensors (values and moments), state.json (position, best so far,
                          ...), MANIFEST.json (sizes and SHA-256, written last)

The newest valid one is used; one that is damaged is reported and skipped. Pruning never touches the
newest valid one or the best, and looks at the bytes before it removes another.
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
    """A float32 tensor of one dimension that no process holds whole. pieces: (where it begins, its
    values), from all processes: each of them goes through all of it."""

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
    """Write checkpoints/NNNNNN; DoesNotFitError if the disk is full, with every earlier checkpoint
    intact."""
    path = checkpoint_path(folder, step)
    size = sum(t.nbytes for t in tensors.values())
    with atomic_folder(path, replace=True, needed_bytes=size + 2**16) as partial:
        _write(partial / "state.safetensors", tensors)
        (partial / "state.json").write_text(json_text(state), encoding="utf-8")
        write_manifest(partial)
    return path


def pass_by(tensors: Mapping[str, Tensor | SplitTensor]) -> None:
    """What the others do while the leader saves these: they give their pieces."""
    for each in tensors.values():
        for _ in each.pieces() if isinstance(each, SplitTensor) else ():
            pass


def _write(path: Path, tensors: Mapping[str, Tensor | SplitTensor]) -> None:
    """As safetensors' save_file writes them; what is scattered piece by piece."""
    whole = {
        name: each.detach().cpu().contiguous()
        for name, each in tensors.items()
        if isinstance(each, Tensor)
    }
    scattered = {name: each for name, each in tensors.items() if isinstance(each, SplitTensor)}
    if not scattered:
        save_file(whole, path)
        return
    assert all(each.dtype == torch.float32 for each in whole.values())
    header, begins, end = dict[str, Any](), dict[str, int](), 0
    for name in sorted(tensors):
        begins[name], end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name in tensors:
            for start, piece in (
                scattered[name].pieces() if name in scattered else [(0, whole[name].view(-1))]
            ):
                file.seek(8 + len(text) + begins[name] + 4 * start)
                file.write(piece.detach().cpu().contiguous().numpy().data)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, mapped into memory as they are read; state). CorruptFileError lists what is
    wrong."""
    if faults := verify_manifest(path):
        raise CorruptFileError(f"checkpoint {path} is damaged", faults)
    return load_file(path / "state.safetensors"), read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """The checkpoint's state.json. Earlier versions wrote what a model answered as it was, a NUL
    with it."""
    return read_json(path / "state.json", mend=True)


def load_values(path: Path) -> Tensor:
    """The trained values of a checkpoint; CorruptFileError lists what is wrong."""
    if faults := verify_manifest(path):
        raise CorruptFileError(f"checkpoint {path} is damaged", faults)
    with safe_open(path / "state.safetensors", framework="pt") as file:
        return file.get_tensor("values")


def tensor_hash(values: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hex."""
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().data).hexdigest()


def numbers(folder: Path) -> list[int]:
    """Steps of the checkpoints in the folder, valid or not, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if path.is_dir() and path.name.isdigit())


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones."""
    faults: list[str] = []
    for step in reversed(numbers(folder)):
        path = checkpoint_path(folder, step)
        if not (found := verify_manifest(path)):
            return path, faults
        faults += [f"{path.name}: {fault}" for fault in found]
    return None, faults


def prune(folder: Path, *, keep: int, best: int | None) -> None:
    """Remove what lies before the newest `keep` that are whole, but the best; and what a removal
    left half-way.

    Whole is what the hashes say, read anew: a damaged one does not count, so nothing goes that
    could be needed.
    """
    whole = 0
    for step in reversed(numbers(folder)):
        path = checkpoint_path(folder, step)
        if whole >= max(keep, 1):
            if step != best:
                _remove(path)
        elif not verify_manifest(path):
            whole += 1
        elif step != best and not (path / MANIFEST).is_file():
            _remove(path)


def _remove(path: Path) -> None:
    """The manifest first: what is removed half-way is no checkpoint any more."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)
