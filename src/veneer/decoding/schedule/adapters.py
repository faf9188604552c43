"""Adapters of an engine, by their contents. The decoding thread asks for them and never waits.

FixedAdapters                    adapters that stay attached to the base
library/residents/residents.py   adapters of a library, in memory while they are needed
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch

from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.methods.expert_stack import STACKS, stack_key
from veneer.adapters.methods.experts import AdaptedExperts
from veneer.adapters.methods.lora import LoRALayer
from veneer.adapters.methods.prefix_layer import PrefixLayer
from veneer.adapters.placement.acting import Applied, BatchPart, check_together
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.wrapping import key_of
from veneer.decoding.schedule.block_names import Identity
from veneer.errors import ConfigError
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.mixes import AdapterMix, FactorTable, MixEntry
from veneer.kernels.dense.segments import UpdateCache


class AdapterSource(Protocol):
    """Where an engine gets its adapters. Each step asks once for each adapter that a sequence waits
    for, in order. A ready adapter stays until the step ends. A held one stays until it has been
    released as often as it was held. The base alone is never asked for.
    """

    def expect(self, identity: Identity) -> None:
        """Announces a request with an adapter. Raises a VeneerError if it can never run."""

    def ready(self, identity: Identity) -> int | None:
        """Returns the tokens of its trained prefix (0 without one), or None if it is not ready yet.
        Raises a VeneerError if it never will be."""

    def take_removed(self) -> Collection[str]:
        """Called after the last `ready` of a step. Returns content hashes of adapters that were
        removed; the cached keys and values of these can be dropped."""

    def hold(self, identity: Identity) -> None:
        """Holds a ready adapter for a sequence that starts."""

    def release(self, identity: Identity) -> None:
        """Releases an adapter once, after a sequence ended or was preempted."""

    def applied(self, identity: Identity) -> Applied:
        """Returns the attached adapters of a held identity."""


class FixedAdapters:
    """Adapters that stay attached to the base."""

    def __init__(self, applied: Mapping[Identity, Applied]) -> None:
        self._applied = dict(applied)
        self._places = {identity: prefix_length(adapters) for identity, adapters in applied.items()}

    def expect(self, identity: Identity) -> None:
        self.ready(identity)

    def ready(self, identity: Identity) -> int:
        if identity not in self._places:
            raise ConfigError(f"adapter {identity} is not attached", next_step="Name one that is.")
        return self._places[identity]

    def take_removed(self) -> Collection[str]:
        return ()

    def hold(self, identity: Identity) -> None: ...

    def release(self, identity: Identity) -> None: ...

    def applied(self, identity: Identity) -> Applied:
        return self._applied[identity]


def prefixes(applied: Applied) -> list[PrefixLayer]:
    layers = [layer for attachment, _ in applied for layer in attachment.layers.values()]
    return [layer for layer in layers if isinstance(layer, PrefixLayer)]


LaidOutAdapter = tuple[FactorTable | None, frozenset[str]]
"""An adapter's plain LoRA layers as a table (None: it has none), and the keys of its other
layers."""


def _plain_loras(adapter: Attachment) -> tuple[dict[str, LoRALayer], frozenset[str]]:
    """Returns an adapter's plain LoRA layers by key, also those of experts, and the keys of its
    other layers."""
    linear, experts = key_of(AdaptedLinear, ""), key_of(AdaptedExperts, "")
    layers: dict[str, LoRALayer] = {}
    others = {*adapter.replaced}
    for key, layer in adapter.wrapper_layers.items():
        if key in adapter.replaced:
            continue
        if key.startswith(linear) and isinstance(layer, LoRALayer) and layer.offset is None:
            layers[key] = layer
        elif key.startswith(experts) and layer.keys() <= {*STACKS}:
            layers |= {stack_key(key, name): own for name, own in layer.items()}
        else:
            others.add(key)
    return layers, frozenset(others)


def changes_rows_alone(adapter: Attachment) -> bool:
    """Whether an adapter has nothing but LoRA on linear layers, which leaves the bits of all other
    rows of a forward unchanged."""
    return not _plain_loras(adapter)[1]


def lay_out_factors(adapter: Attachment, plan: UpdateCache, dtype: torch.dtype) -> LaidOutAdapter:
    """Lays out an adapter's factors in this type. plan: caches the layouts."""
    layers, others = _plain_loras(adapter)
    table = (
        plan.table(layers, dtype, [layer.scaling for layer in layers.values()]) if layers else None
    )
    return table, others


def lay_out(adapter: Attachment, dtype: torch.dtype, device: torch.device, most_bytes: int) -> int:
    """Lays out an adapter that does not change, once for all its answers. Returns the bytes it
    takes; 0 if nothing was laid out, or it would take more than most_bytes."""
    if not few_rows.takes_updates(1, dtype, device):
        return 0
    laid_out = lay_out_factors(adapter, UpdateCache(), dtype)
    bytes_needed = 0 if laid_out[0] is None else laid_out[0].bytes
    if bytes_needed > most_bytes:
        return 0
    adapter.laid_out = laid_out
    return bytes_needed


def mix_of(
    parts: Sequence[BatchPart], of: Callable[[Attachment], LaidOutAdapter], dtype: torch.dtype
) -> AdapterMix:
    """Returns the updates of all parts."""
    entries: list[MixEntry] = []
    other_keys: set[str] = set()
    start = 0
    for part in parts:
        rows = slice(start, start := start + (part.rows or 0))
        for adapter, weight in part.adapters:
            table, more_keys = of(adapter)
            other_keys |= more_keys
            entries += (
                [(rows, table, weight)] if table is not None and rows.start < rows.stop else []
            )
    return AdapterMix(entries, dtype, other_keys)


def prefix_length(applied: Applied) -> int:
    """Returns the length of the trained prefix, 0 without one. Raises ConfigError if the adapters
    cannot act together."""
    check_together(applied)
    return sum(prefix.tokens for prefix in prefixes(applied))
