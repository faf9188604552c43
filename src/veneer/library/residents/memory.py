"""What adapters take in memory, and who goes where that is short: the least recently used, never
what has to stay.

Not known here: where they are kept, or when (pool.py, residents.py).
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

Key = TypeVar("Key")
HELD_ITEM_BYTES = 4
"""Of a trained value as it is loaded, float32 whatever its file has."""


@dataclass(kw_only=True, eq=False)
class MemoryEntry:
    """used: rises with every use of any; of those that may go, the lowest goes first."""

    bytes: int = 0
    used: int = 0
    pinned: bool = False


def room_for(
    needed: int, kept: Iterable[tuple[Key, MemoryEntry]], free: int, may_go: Callable[[Key], bool]
) -> list[Key] | None:
    """Who goes so that `needed` bytes fit into the free ones and theirs, no more of them than must.

    None: not even if all go that may.
    """
    going: list[Key] = []
    for key, each in sorted(kept, key=lambda pair: pair[1].used):
        if free >= needed:
            break
        if not each.pinned and may_go(key):
            going.append(key)
            free += each.bytes
    return going if free >= needed else None


def bytes_of(attachment: Attachment) -> int:
    """Of its tensors."""
    return sum(p.numel() * p.element_size() for p in attachment.parameters().values())


@torch.no_grad()
def hold_as(attachment: Attachment, dtype: torch.dtype) -> None:
    """For one that only answers: LoRA's factors in the type they are multiplied in, as they would
    be typed each time. What computes with them in float32 first, DoRA's norms say, stays as it
    is."""
    for layer in attachment.layers.values():
        if (
            type(layer) is LoRALayer
            and layer.kind == "linear"
            and layer.offset is None
            and layer.start is None
        ):
            layer.A.data, layer.B.data = layer.A.data.to(dtype), layer.B.data.to(dtype)


def bytes_needed(stored: StoredAdapter) -> int:
    """What its tensors take at most once they are beside a base."""
    return sum(
        tensor.numel() * max(tensor.element_size(), HELD_ITEM_BYTES)
        for tensor in stored.tensors.values()
    )


def read_version(folder: Path, reference: str, content_hash: str) -> StoredAdapter:
    """A version of a library, which is what was added. CorruptFileError: it is not."""
    stored = read_adapter(folder)
    if stored.content_hash != content_hash:
        raise CorruptFileError(
            f"{reference} is not what was added",
            [f"content {stored.content_hash[:12]}…, the library says {content_hash[:12]}…"],
            f"See: veneer adapters verify {reference}",
        )
    return stored
