"""Which names are models: the base under its own, and every adapter of the library, as it is at
this moment.

    smollm2-135m            the base
    tickets                 the newest version of an adapter;  tickets@2, tickets@best: that one
    smollm2-135m:tickets    the same, as SGLang's clients write it

/v1/load_lora_adapter adds an alias: a further name of an adapter in the library. It comes before an
adapter that is published under the same name later. /v1/unload_lora_adapter takes a name away: an
alias, or an adapter with all its versions, which the server hides until it is loaded again. Files
stay. Nothing here is a path.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from veneer.decoding.schedule.blocks import Identity
from veneer.errors import ConfigError, UnknownNameError, VeneerError, told_as
from veneer.library.library import Entry, Library
from veneer.library.names import is_name, is_reference, nearest
from veneer.serve.limits import MAX_ALIASES
from veneer.serve.refusals import Refusal, unknown_adapter, unknown_model

MAX_COMPARED = 1000
"""Names that an unknown one is compared with, for a hint."""
NO_PATH = (
    "lora_path is the name of an adapter in this server's library (NAME, NAME@2), never a path or"
    " an address."
)
LOADED = "Success: LoRA adapter '{}' added successfully."
ALREADY = (
    "The lora adapter '{}' has already been loaded. "
    "If you want to load the adapter in place, set 'load_inplace' to True."
)
NO_NAME = "lora_name is no name for an adapter: a-z, 0-9, single . - _ between."
VERSION = (
    "lora_name is a version of an adapter. Names are loaded and unloaded: {0!r}, with all its"
    " versions."
)
BASE_STAYS = (
    "lora_name is the base. {!r} is always served, and no adapter is loaded under its name."
)
UNLOADED = "Success: LoRA adapter '{}' removed successfully."


class ResidentAdapters(Protocol):
    """What of library/residents/residents.py is asked here. Both may raise a VeneerError."""

    def resolve(self, name: str, weight: float = 1.0) -> Identity: ...

    def fits(self, entry: Entry) -> bool: ...

    def unload(self, name: str, *, keep: Collection[str] = ()) -> bool: ...


@dataclass(frozen=True)
class ServedModel:
    """name: as it was asked for. adapters: name and content of each that acts; none: the base."""

    name: str
    identity: Identity
    adapters: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> str:
        return "-".join(content[:8] for content, _ in self.identity) or "base"


class ModelNames:
    """Called from any thread; reads files."""

    def __init__(
        self,
        base_name: str,
        library: Library,
        adapters: ResidentAdapters,
        *,
        created: int = 0,
        positions: int | None = None,
    ) -> None:
        self.base_name = base_name
        self._library, self._adapters = library, adapters
        self._created, self._positions = created, positions
        self._aliases: dict[str, str] = {}
        self._hidden: set[str] = set()
        self._lock = threading.Lock()

    def model(self, name: str, weighted: tuple[tuple[str, float], ...] = ()) -> ServedModel:
        """What a request's `model` means, and its `adapters`. Refusal: 404. VeneerError: it cannot
        act."""
        if not weighted:
            return self._one(name, 1.0)
        if name != self.base_name:
            raise Refusal(400, "adapters: model must be the base then.", "adapters")
        parts = [self._one(each, weight) for each, weight in weighted]
        identity = tuple(part for each in parts for part in each.identity)
        if len({content for content, _ in identity}) < len(weighted):
            raise Refusal(400, "adapters: each is another one, and none is the base.", "adapters")
        return ServedModel(name, identity, tuple(pair for each in parts for pair in each.adapters))

    def _one(self, name: str, weight: float) -> ServedModel:
        if name == self.base_name:
            return ServedModel(name, ())
        reference = self.reference(name)
        try:
            identity = self._adapters.resolve(reference, weight)
        except UnknownNameError:
            raise self._unknown(name) from None
        called = reference.partition("@")[0]
        return ServedModel(name, identity, tuple((called, content) for content, _ in identity))

    def reference(self, name: str) -> str:
        """Of the library. Refusal: 404, the same for what is not there and for what was taken
        away."""
        own = self._without_base(name)
        with self._lock:
            reference = self._aliases.get(own, own)
            hidden = own not in self._aliases and own.partition("@")[0] in self._hidden
        if hidden or not is_reference(reference):
            raise self._unknown(name)
        return reference

    def _unknown(self, name: str) -> Refusal:
        """404 with the name that was probably meant. It reads no file of an adapter."""
        with self._lock:
            hidden, aliases = set(self._hidden), sorted(self._aliases)
        known = [
            self.base_name,
            *aliases,
            *(each for each in self._library.all_names() if each not in hidden),
        ]
        return unknown_model(name, nearest(name[:80], known[:MAX_COMPARED]))

    def _without_base(self, name: str) -> str:
        return name.removeprefix(f"{self.base_name}:")

    def entry(self, name: str) -> Entry:
        """Of the library. Refusal: 404."""
        try:
            return self._library.get(self.reference(name))
        except ConfigError:
            raise self._unknown(name) from None

    # cards

    def cards(self) -> list[dict[str, Any]]:
        """The base first. Adapters that do not fit it are left out; whoever asks for one is told
        why."""
        return [self._base_card(), *(self._card(name, entry) for name, entry in self._entries())]

    def card(self, name: str) -> dict[str, Any]:
        """Refusal: 404."""
        return self._base_card() if name == self.base_name else self._card(name, self.entry(name))

    def _entries(self) -> Iterator[tuple[str, Entry]]:
        with self._lock:
            hidden, aliases = set(self._hidden), dict(self._aliases)
        for entry in self._library.entries():
            if entry.name in hidden or entry.name in aliases:
                continue
            if self._adapters.fits(entry):
                yield (
                    (
                        f"{self.base_name}:{entry.name}"
                        if entry.name == self.base_name
                        else entry.name
                    ),
                    entry,
                )
        for name, reference in sorted(aliases.items()):
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
        own = self._adapter_name(name)
        if own == self.base_name != reference:
            raise Refusal(400, BASE_STAYS.format(own), "lora_name")
        try:
            with told_as(self._library.folder, "the library"):
                self._library.get(reference)
        except ConfigError as fault:
            raise unknown_adapter(fault) from None
        if reference != own and self._library.has(own):
            raise Refusal(
                409,
                f"The library has an adapter {own!r} of its own.",
                "lora_name",
                "already_loaded",
            )
        with self._lock:
            self._check_alias(own, reference, in_place=in_place)

    def _adapter_name(self, name: str) -> str:
        """The name without the base's in front. Refusal: it names the base, a version, or cannot be
        a name."""
        own = self._without_base(name)
        if name == self.base_name:
            raise Refusal(400, BASE_STAYS.format(name), "lora_name")
        if not is_name(own):
            raise Refusal(
                400,
                VERSION.format(own.partition("@")[0]) if is_reference(own) else NO_NAME,
                "lora_name",
            )
        return own

    def _check_alias(self, own: str, reference: str, *, in_place: bool) -> None:
        """Whether the aliases leave room for this one. The lock is held. Refusal: 409."""
        before = self._aliases.get(own)
        if before not in (None, reference) and not in_place:
            raise Refusal(409, ALREADY.format(own), "lora_name", "already_loaded")
        if before is None and reference != own and len(self._aliases) >= MAX_ALIASES:
            raise Refusal(
                409, f"{MAX_ALIASES:,} names have been added, which is the limit.", "lora_name"
            )

    def add(self, name: str, reference: str, *, in_place: bool = False) -> str:
        """The name means the adapter from now on. Returns what vLLM answers. Refusal: 409, as
        `check` says."""
        own = self._without_base(name)
        with self._lock:
            self._check_alias(own, reference, in_place=in_place)
            self._hidden.discard(own)
            if reference == own:  # the library's own adapter, in place of an alias of that name
                self._aliases.pop(own, None)
            else:
                self._aliases[own] = reference
        return LOADED.format(name)

    def remove(self, name: str) -> str:
        """Takes the name away: an alias alone, or an adapter with all its versions. Returns what
        vLLM answers.

        Refusal: 400, or 404 if the name means nothing.
        """
        own = self._adapter_name(name)
        with self._lock:
            was_alias = self._aliases.pop(own, None) is not None
        if not was_alias:
            self.entry(name)
            with self._lock:
                self._hidden.add(own)
                used = set(self._aliases.values())
            with suppress(VeneerError):  # removed from the library since
                self._adapters.unload(own, keep=used)
        return UNLOADED.format(name)
