"""Memory of adapters, and which to evict: the least recently used, never one that must stay.

Knows nothing of where or when adapters are loaded (pool.py, residents.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from veneer.adapters.methods.lora import LoRALayer
from veneer.adapters.placement.attachment import Attachment
from veneer.errors import CorruptFileError
from veneer.formats.adapter import StoredAdapter, read_adapter
from veneer.private.torch import raise_versions

Key = TypeVar("Key")
HELD_ITEM_BYTES = 4
"""Bytes of a loaded value: float32, whatever type its file has."""


@dataclass(kw_only=True, eq=False)
class MemoryEntry:
    """Counts what an adapter takes. used: number of its last use; the lowest is evicted first."""

    bytes: int = 0
    used: int = 0
    pinned: bool = False


def room_for(
    needed: int,
    entries: Iterable[tuple[Key, MemoryEntry]],
    free: int,
    may_evict: Callable[[Key], bool],
) -> list[Key] | None:
    """Chooses entries to evict so that `needed` bytes fit, as few as possible; None if impossible.

    free: bytes that are free already.
    """
    evicted: list[Key] = []
    for key, entry in sorted(entries, key=lambda pair: pair[1].used):
        if free >= needed:
            break
        if not entry.pinned and may_evict(key):
            evicted.append(key)
            free += entry.bytes
    return evicted if free >= needed else None


def bytes_of(attachment: Attachment) -> int:
    """Counts the bytes of an attachment's tensors."""
    return sum(p.nbytes for p in attachment.parameters().values())


@torch.no_grad()
def hold_as(attachment: Attachment, dtype: torch.dtype) -> None:
    """Casts LoRA's factors to the type they are multiplied in, for an adapter that only answers.

    Otherwise they would be cast at every call. Methods that compute with factors in float32 first,
    such as DoRA's norms, keep them.
    """
    for layer in attachment.layers.values():
        if (
            type(layer) is LoRALayer
            and layer.kind == "linear"
            and layer.offset is None
            and layer.start is None
        ):
            layer.A.data, layer.B.data = layer.A.data.to(dtype), layer.B.data.to(dtype)
            raise_versions((layer.A, layer.B))


def bytes_needed(stored: StoredAdapter) -> int:
    """Counts the most bytes that the tensors take beside a base."""
    return sum(
        tensor.numel() * max(tensor.element_size(), HELD_ITEM_BYTES)
        for tensor in stored.tensors.values()
    )


def read_version(folder: Path, reference: str, content_hash: str) -> StoredAdapter:
    """Reads a version of a library. CorruptFileError: it is not what was added."""
    stored = read_adapter(folder)
    if stored.content_hash != content_hash:
        raise CorruptFileError(
            f"{reference} is not what was added",
            [f"content {stored.content_hash[:12]}…, the library says {content_hash[:12]}…"],
            f"See: veneer adapters verify {reference}",
        )
    return stored
