"""Which names are models: the base under its own, and every adapter of the library, as it is at this moment.

    smollm2-135m            the base
    tickets                 the newest version of an adapter;  tickets@2, tickets@best: that one
    smollm2-135m:tickets    the same, as SGLang's clients write it

What /v1/load_lora_adapter adds are further names of adapters in the library, and what /v1/unload_lora_adapter takes
away is a name: files stay. Nothing here is a path.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from veneer.decoding.blocks import Identity
from veneer.errors import ConfigError, UnknownNameError, VeneerError
from veneer.library.library import Entry, Library
from veneer.library.names import is_name, is_reference
from veneer.serve.refusals import Refusal, unknown_adapter, unknown_model

MOST_ADDED = 1000
NO_PATH = "lora_path is the name of an adapter in this server's library (NAME, NAME@2), never a path or an address."
LOADED = "Success: LoRA adapter '{}' added successfully."
ALREADY = (
    "The lora adapter '{}' has already been loaded. "
    "If you want to load the adapter in place, set 'load_inplace' to True."
)
UNLOADED = "Success: LoRA adapter '{}' removed successfully."


class Adapters(Protocol):
    """What of library/residents.py is asked here. Both may raise a VeneerError."""

    def resolve(self, name: str, weight: float = 1.0) -> Identity: ...

    def unload(self, name: str) -> bool: ...


@dataclass(frozen=True)
class Model:
    """name: as it was asked for. adapters: name and content of each that acts; none: the base."""

    name: str
    identity: Identity
    adapters: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> str:
        return "-".join(content[:8] for content, _ in self.identity) or "base"


class Names:
    """base_name, base_digest: of the base and its fingerprint.

    Called from any thread; reads files.
    """

    def __init__(
        self,
        base_name: str,
        base_digest: str,
        library: Library,
        adapters: Adapters,
        *,
        created: int = 0,
        positions: int | None = None,
    ) -> None:
        self.base_name, self._digest = base_name, base_digest
        self._library, self._adapters = library, adapters
        self._created, self._positions = created, positions
        self._added: dict[str, str] = {}
        self._hidden: set[str] = set()
        self._lock = threading.Lock()

    def model(self, name: str, weighted: tuple[tuple[str, float], ...] = ()) -> Model:
        """What a request's `model` means, and its `adapters`. Refusal: 404. VeneerError: it cannot act."""
        if not weighted:
            return self._one(name, 1.0)
        if name != self.base_name:
            raise Refusal(400, "adapters: model must be the base then.", "adapters")
        parts = [self._one(each, weight) for each, weight in weighted]
        identity = tuple(part for each in parts for part in each.identity)
        if len({content for content, _ in identity}) < len(weighted):
            raise Refusal(400, "adapters: each is another one, and none is the base.", "adapters")
        return Model(name, identity, tuple(pair for each in parts for pair in each.adapters))

    def _one(self, name: str, weight: float) -> Model:
        if name == self.base_name:
            return Model(name, ())
        reference = self.reference(name)
        try:
            identity = self._adapters.resolve(reference, weight)
        except UnknownNameError:
            raise unknown_model(name) from None
        called = reference.partition("@")[0]
        return Model(name, identity, tuple((called, content) for content, _ in identity))

    def reference(self, name: str) -> str:
        """Of the library. Refusal: 404, the same for what is not there and for what was taken away."""
        own = name.removeprefix(f"{self.base_name}:")
        with self._lock:
            reference = self._added.get(own, own)
            hidden = own not in self._added and own.partition("@")[0] in self._hidden
        if hidden or not is_reference(reference):
            raise unknown_model(name)
        return reference

    def entry(self, name: str) -> Entry:
        """Of the library. Refusal: 404."""
        try:
            return self._library.get(self.reference(name))
        except ConfigError:
            raise unknown_model(name) from None

    # cards

    def cards(self) -> list[dict[str, Any]]:
        """The base first; adapters of another base are left out, though one that is asked for says so itself."""
        return [self._base_card(), *(self._card(name, entry) for name, entry in self._entries())]

    def card(self, name: str) -> dict[str, Any]:
        """Refusal: 404."""
        return self._base_card() if name == self.base_name else self._card(name, self.entry(name))

    def _entries(self) -> Iterator[tuple[str, Entry]]:
        with self._lock:
            hidden, added = set(self._hidden), dict(self._added)
        for entry in self._library.entries():
            if entry.name not in hidden and entry.version.facts.base_digest in (None, self._digest):
                yield f"{self.base_name}:{entry.name}" if entry.name == self.base_name else entry.name, entry
        for name, reference in sorted(added.items()):
            try:
                yield name, self._library.get(reference)
            except VeneerError:  # removed since
                continue

    def _base_card(self) -> dict[str, Any]:
        return {
            "id": self.base_name,
            "object": "model",
            "created": self._created,
            "owned_by": "veneer",
            "root": self.base_name,
            "parent": None,
            "max_model_len": self._positions,
            "permission": [],
        }

    def _card(self, name: str, entry: Entry) -> dict[str, Any]:
        version = entry.version
        return {
            "id": name,
            "object": "model",
            "created": int(datetime.fromisoformat(version.added).timestamp()),
            "owned_by": "veneer",
            "root": entry.reference,
            "parent": self.base_name,
            "max_model_len": self._positions,
            "permission": [],
            "version": version.facts.content_hash,
            "method": version.facts.method,
            "bytes": version.facts.bytes,
        }

    # vLLM's way of adding and removing

    def check(self, name: str, reference: str, *, in_place: bool) -> None:
        """Whether the name may mean the adapter. Refusal: 400, 404, 409."""
        if not is_reference(reference):
            raise Refusal(400, NO_PATH, "lora_path")
        if not is_name(name) or name == self.base_name:
            raise Refusal(400, "lora_name is no name for an adapter: a-z, 0-9, single . - _ between.", "lora_name")
        try:
            self._library.get(reference)
        except ConfigError as fault:
            raise unknown_adapter(fault) from None
        with self._lock:
            before, added = self._added.get(name), len(self._added)
        if reference != name and self._library.has(name):
            raise Refusal(409, f"The library has an adapter {name!r} of its own.", "lora_name", "already_loaded")
        if before not in (None, reference) and not in_place:
            raise Refusal(409, ALREADY.format(name), "lora_name", "already_loaded")
        if added >= MOST_ADDED:
            raise Refusal(409, f"{MOST_ADDED:,} names have been added, as many as may.", "lora_name")

    def add(self, name: str, reference: str) -> str:
        """The name means the adapter from now on. Returns what is said."""
        with self._lock:
            self._hidden.discard(name)
            if reference != name:
                self._added[name] = reference
        return LOADED.format(name)

    def remove(self, name: str) -> str:
        """The name means nothing any more, and the adapter may go. Returns what is said. Refusal: 404."""
        reference = self.reference(name)
        with self._lock:
            added = self._added.pop(name, None) is not None
        if not added:
            _ = self.entry(name)
            with self._lock:
                self._hidden.add(reference.partition("@")[0])
        with suppress(VeneerError):  # the library has it no more
            self._adapters.unload(reference)
        return UNLOADED.format(name)
