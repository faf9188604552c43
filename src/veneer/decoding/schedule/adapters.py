"""What an engine asks of the adapters beside its base, by what they contain. The decoding thread
asks, and never waits.

Fixed    a few that are on the base and stay there
library/residents/residents.py   those of a library, in memory while they are needed
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch

from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.methods.lora import LoRALayer
from veneer.adapters.methods.prefix_layer import PrefixLayer
from veneer.adapters.placement.acting import Applied, BatchPart, check_together
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.wrapping import key_of
from veneer.decoding.schedule.blocks import Identity
from veneer.errors import ConfigError
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.mixes import AdapterMix, FactorTable, MixEntry
from veneer.kernels.dense.segments import UpdateCache


class AdapterSource(Protocol):
    """A round of asking is a step: each adapter that a sequence waits for is asked once, the first
    first. One that is ready stays until the round ends, one that is held until it is let go as many
    times. The base is never asked for.
    """

    def expect(self, identity: Identity) -> None:
        """A request with it is about to wait. Raises a VeneerError if it can never run."""

    def ready(self, identity: Identity) -> int | None:
        """Places of its trained prefix, 0 if it has none; None: not yet. Raises a VeneerError if it
        never will."""

    def settle(self) -> Collection[str]:
        """The round ends. Returns contents that went for good: nobody will look for their keys and
        values."""

    def hold(self, identity: Identity) -> None:
        """A sequence with this adapter, which was ready, has been given blocks."""

    def release(self, identity: Identity) -> None:
        """One that was held has ended, or went back to wait."""

    def applied(self, identity: Identity) -> Applied:
        """What it is on the base. Only of one that is held."""


class FixedAdapters:
    """What each identity is on the base."""

    def __init__(self, applied: Mapping[Identity, Applied]) -> None:
        self._applied = dict(applied)
        self._places = {identity: front_places(each) for identity, each in applied.items()}

    def expect(self, identity: Identity) -> None:
        self.ready(identity)

    def ready(self, identity: Identity) -> int:
        if identity not in self._places:
            raise ConfigError(
                f"no adapter {identity} is here", next_step="Name one that is on the base."
            )
        return self._places[identity]

    def settle(self) -> Collection[str]:
        return ()

    def hold(self, identity: Identity) -> None: ...

    def release(self, identity: Identity) -> None: ...

    def applied(self, identity: Identity) -> Applied:
        return self._applied[identity]


def prefixes(applied: Applied) -> list[PrefixLayer]:
    layers = [layer for attachment, _ in applied for layer in attachment.layers.values()]
    return [layer for layer in layers if isinstance(layer, PrefixLayer)]


Updating = tuple[FactorTable | None, frozenset[str]]
"""The layers to which an adapter adds updates alone, as a table, or None; the keys of all others
that it changes."""


def _updates(adapter: Attachment) -> tuple[dict[str, LoRALayer], frozenset[str]]:
    """The layers to which it adds updates alone, by their keys; the keys of all others that it
    changes."""
    linear = key_of(AdaptedLinear, "")
    layers = {
        key: layer
        for key, layer in adapter.beside.items()
        if key.startswith(linear) and isinstance(layer, LoRALayer) and layer.offset is None
        if key not in adapter.replaced
    }
    return layers, frozenset(adapter.beside.keys() | adapter.replaced.keys()) - layers.keys()


def changes_rows_alone(adapter: Attachment) -> bool:
    """Whether it is updates of linear layers alone, which leave the bits of other rows in a forward
    as they are."""
    return not _updates(adapter)[1]


def updating(adapter: Attachment, plan: UpdateCache, dtype: torch.dtype) -> Updating:
    """plan: where its factors are laid out, in this type."""
    layers, others = _updates(adapter)
    table = (
        plan.table(layers, dtype, [layer.scaling for layer in layers.values()]) if layers else None
    )
    return table, others


def lay_out(adapter: Attachment, dtype: torch.dtype, device: torch.device, most_bytes: int) -> int:
    """Of one whose values stay as they are: prepared once, and not anew with each answer that comes
    back to it. Returns the bytes it takes; 0: nothing is laid out there, or it would take more than
    most_bytes."""
    if not few_rows.takes_updates(1, dtype, device):
        return 0
    found = updating(adapter, UpdateCache(), dtype)
    needed = 0 if found[0] is None else found[0].bytes
    if needed > most_bytes:
        return 0
    adapter.laid_out = found
    return needed


def mix_of(
    parts: Sequence[BatchPart], of: Callable[[Attachment], Updating], dtype: torch.dtype
) -> AdapterMix:
    """The updates of parts that say their rows."""
    entries: list[MixEntry] = []
    others: set[str] = set()
    start = 0
    for part in parts:
        rows = slice(start, start := start + (part.rows or 0))
        for adapter, weight in part.adapters:
            table, more = of(adapter)
            others |= more
            entries += (
                [(rows, table, weight)] if table is not None and rows.start < rows.stop else []
            )
    return AdapterMix(entries, dtype, others)


def front_places(applied: Applied) -> int:
    """Places of the trained prefix, 0 without one. ConfigError: adapters that cannot act together
    with these weights."""
    check_together(applied)
    return sum(prefix.tokens for prefix in prefixes(applied))
