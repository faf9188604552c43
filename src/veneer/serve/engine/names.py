"""Which names are models: the base under its own name, and every adapter that the library has at
the moment.

    smollm2-135m            the base
    tickets                 the newest version of an adapter;  tickets@2, tickets@best: that one
    smollm2-135m:tickets    the same, as SGLang's clients write it

All names are resolved here. The base's name always means the base: an adapter that has the same
name is listed, and chosen, as BASE:NAME alone.

/v1/load_lora_adapter adds an alias: a further name of an adapter in the library. It comes before an
adapter that is published under the same name later. /v1/unload_lora_adapter takes a name away: an
alias, or an adapter with all its versions, which the server hides until it is loaded again. Files
stay. Nothing here is a path.
"""

import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from veneer.decoding.schedule.block_names import Identity
from veneer.errors import ConfigError, UnknownNameError, VeneerError, hide_path
from veneer.library.entry import Entry
from veneer.library.library import Library
from veneer.library.names import is_name, is_reference, nearest
from veneer.library.residents.residents import Residents
from veneer.serve.limits import MAX_ALIASES
from veneer.serve.refusals import Refusal, unknown_adapter, unknown_model

AUTO = "auto"
"""The model name that leaves the choice of an adapter to the server (chooser.py)."""
NOT_AUTO = (
    "{0}: auto is no model by itself: the server chooses an adapter for each answer. Name a model"
    " here; an adapter called auto is {1}:auto."
)
NO_ADAPTER = "{0!r} is the base, not an adapter. An adapter of that name is {0}:{0}."
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


@dataclass(frozen=True)
class ServedModel:
    """The model of a request.

    name: as the request has it. adapters: name and content of each adapter; empty for the base.
    """

    name: str
    identity: Identity
    adapters: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> str:
        return "-".join(content[:8] for content, _ in self.identity) or "base"


class ModelNames:
    """Finds, lists, adds and removes the names of models. Thread-safe; reads files."""

    def __init__(
        self,
        base_name: str,
        library: Library,
        adapters: Residents,
        *,
        created: int = 0,
        positions: int | None = None,
    ) -> None:
        self.base_name = base_name
        self._library, self._adapters = library, adapters
        self._created, self._positions = created, positions
        self._aliases: dict[str, str] = {}
        self._hidden: set[str] = set()
        self._has_auto = False
        self._lock = threading.Lock()

    def reserve_auto(self) -> None:
        """Makes AUTO the name of no model. ConfigError: the base has this name."""
        if self.base_name == AUTO:
            raise ConfigError(
                f"--auto: the base is called {AUTO!r} too", [], "Give it another name with --name."
            )
        self._has_auto = True

    def model(self, name: str, weighted: tuple[tuple[str, float], ...] = ()) -> ServedModel:
        """Finds the model of a request. Refusal: 404. VeneerError: an adapter cannot be used."""
        if not weighted:
            return self._find(name, 1.0)
        if name != self.base_name:
            raise Refusal(400, "adapters: model must be the base then.", "adapters")
        models = [self._find(adapter, weight) for adapter, weight in weighted]
        identity = tuple(entry for model in models for entry in model.identity)
        if len({content for content, _ in identity}) < len(weighted):
            raise Refusal(400, "adapters: each is another one, and none is the base.", "adapters")
        return ServedModel(
            name, identity, tuple(pair for model in models for pair in model.adapters)
        )

    def _find(self, name: str, weight: float) -> ServedModel:
        if name == self.base_name:
            return ServedModel(name, ())
        reference = self.reference(name)
        try:
            identity = self._adapters.resolve(reference, weight)
        except UnknownNameError:
            raise self._unknown(name) from None
        adapter = self.listed_name(reference.partition("@")[0])
        return ServedModel(name, identity, tuple((adapter, content) for content, _ in identity))

    def listed_name(self, adapter: str) -> str:
        """Returns the name under which an adapter is listed: BASE:NAME where its own name means
        something else."""
        is_taken = adapter == self.base_name or (self._has_auto and adapter == AUTO)
        return f"{self.base_name}:{adapter}" if is_taken else adapter

    def reference(self, name: str) -> str:
        """Returns the reference in the library. Refusal: 404, for missing and for unloaded names
        alike, and for the base."""
        self._refuse_auto(name, "model")
        if name == self.base_name:
            raise Refusal(404, NO_ADAPTER.format(name), "model", "adapter_not_found")
        adapter = self._without_base(name)
        with self._lock:
            reference = self._aliases.get(adapter, adapter)
            hidden = adapter not in self._aliases and adapter.partition("@")[0] in self._hidden
        if hidden or not is_reference(reference):
            raise self._unknown(name)
        return reference

    def _refuse_auto(self, name: str, param: str) -> None:
        """Raises Refusal 400 if the name is AUTO, which is chosen for answers alone."""
        if self._has_auto and name == AUTO:
            raise Refusal(400, NOT_AUTO.format(param, self.base_name), param)

    def _unknown(self, name: str) -> Refusal:
        """Makes a 404 that suggests a close name. Reads no file of an adapter."""
        with self._lock:
            hidden, aliases = set(self._hidden), sorted(self._aliases)
        adapters = [*aliases, *(name for name in self._library.all_names() if name not in hidden)]
        known = [self.base_name, *map(self.listed_name, adapters)]
        return unknown_model(name, nearest(name[:80], known[:MAX_COMPARED]))

    def _without_base(self, name: str) -> str:
        return name.removeprefix(f"{self.base_name}:")

    def entry(self, name: str) -> Entry:
        """Returns the library's entry. Refusal: 404."""
        try:
            return self._library.get(self.reference(name))
        except ConfigError:
            raise self._unknown(name) from None

    # cards

    def cards(self) -> list[dict[str, Any]]:
        """Lists the base, then the adapters that fit it. A request for another gets the reason."""
        return [self._base_card(), *(self._card(name, entry) for name, entry in self.entries())]

    def card(self, name: str) -> dict[str, Any]:
        """Returns the card of a model. Raises Refusal 404 for an unknown one."""
        return self._base_card() if name == self.base_name else self._card(name, self.entry(name))

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Yields the name and the entry of every adapter that is served and fits the base."""
        with self._lock:
            hidden, aliases = set(self._hidden), dict(self._aliases)
        for entry in self._library.entries():
            if entry.name in hidden or entry.name in aliases:
                continue
            if self._adapters.fits(entry):
                yield self.listed_name(entry.name), entry
        for name, reference in sorted(aliases.items()):
            try:
                yield self.listed_name(name), self._library.get(reference)
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
            **self._base_card(),
            "id": name,
            "created": int(datetime.fromisoformat(version.added).timestamp()),
            "root": entry.reference,
            "parent": self.base_name,
            "version": version.facts.content_hash,
            "method": version.facts.method,
            "bytes": version.facts.bytes,
        }

    # Adding and removing names, as vLLM does

    def check(self, name: str, reference: str, *, in_place: bool) -> None:
        """Checks that the name may mean the adapter. Refusal: 400, 404, 409."""
        if not is_reference(reference):
            raise Refusal(400, NO_PATH, "lora_path")
        adapter = self._adapter_name(name)
        if adapter == self.base_name != reference:
            raise Refusal(400, BASE_STAYS.format(adapter), "lora_name")
        try:
            with hide_path(self._library.folder, "the library"):
                self._library.get(reference)
        except ConfigError as fault:
            raise unknown_adapter(fault) from None
        if reference != adapter and self._library.has(adapter):
            raise Refusal(
                409,
                f"The library has an adapter {adapter!r} of its own.",
                "lora_name",
                "already_loaded",
            )
        with self._lock:
            self._check_alias(adapter, reference, in_place=in_place)

    def _adapter_name(self, name: str) -> str:
        """Removes the base's name in front. Refusal: it names the base or a version, or is not a
        valid name."""
        self._refuse_auto(name, "lora_name")
        adapter = self._without_base(name)
        if name == self.base_name:
            raise Refusal(400, BASE_STAYS.format(name), "lora_name")
        if not is_name(adapter):
            raise Refusal(
                400,
                VERSION.format(adapter.partition("@")[0]) if is_reference(adapter) else NO_NAME,
                "lora_name",
            )
        return adapter

    def _check_alias(self, alias: str, reference: str, *, in_place: bool) -> None:
        """Checks that the alias is free. The caller holds the lock. Refusal: 409."""
        before = self._aliases.get(alias)
        if before not in (None, reference) and not in_place:
            raise Refusal(409, ALREADY.format(alias), "lora_name", "already_loaded")
        if before is None and reference != alias and len(self._aliases) >= MAX_ALIASES:
            raise Refusal(
                409, f"{MAX_ALIASES:,} names have been added, which is the limit.", "lora_name"
            )

    def add(self, name: str, reference: str, *, in_place: bool = False) -> str:
        """Adds the name. Returns what vLLM answers. Refusal: 409, as `check` says."""
        adapter = self._without_base(name)
        with self._lock:
            self._check_alias(adapter, reference, in_place=in_place)
            self._hidden.discard(adapter)
            if reference == adapter:  # the library's own adapter, in place of an alias of that name
                self._aliases.pop(adapter, None)
            else:
                self._aliases[adapter] = reference
        return LOADED.format(name)

    def remove(self, name: str) -> str:
        """Removes a name: an alias alone, or an adapter with all its versions. Returns what vLLM
        answers.

        Refusal: 400, or 404 if the name means nothing.
        """
        adapter = self._adapter_name(name)
        with self._lock:
            was_alias = self._aliases.pop(adapter, None) is not None
        if not was_alias:
            self.entry(name)
            with self._lock:
                self._hidden.add(adapter)
                used = set(self._aliases.values())
            with suppress(VeneerError):  # removed from the library since
                self._adapters.unload(adapter, keep=used)
        return UNLOADED.format(name)
