"""The forwards of a step: one for rows that keep their bits whatever is beside them, one for all
other rows.

A LoRA of linear layers adds its updates to the base's product row by row, so rows of the base and
of such LoRAs are what they are alone, to the bit. Other contents change how a whole forward is
computed: a prefix sends it through the model's own code, a trained norm or a bottleneck through
torch's. They share a forward of their own, and a step that has both kinds of rows reads the weights
twice. Where no bits are promised (decoding/direct.py has no forward by parts, or no compiled
updates) one forward computes all rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from veneer.adapters.placement.acting import Acting, in_step
from veneer.adapters.placement.attachment import Attachment
from veneer.decoding.direct import Way
from veneer.decoding.forward import PagedForward
from veneer.decoding.schedule.adapters import (
    AdapterSource,
    Updating,
    changes_rows_alone,
    mix_of,
    prefixes,
    updating,
)
from veneer.decoding.schedule.blocks import BlockManager, Identity
from veneer.decoding.schedule.step_plan import StepPlan
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.segments import UpdateCache
from veneer.models.frozen_base import FrozenBase

Computed = tuple[Sequence[int], Tensor]
"""Numbers of spans in their plan, and (spans, V): what follows the last token of each."""


class Lane:
    """One of a step's forwards, with what acted in its last step and what was prepared for it."""

    def __init__(self, base: FrozenBase, adapters: AdapterSource, forward: PagedForward) -> None:
        self.forward = forward
        self.acting: tuple[Any, Acting] | None = None
        self._base, self._adapters = base, adapters
        self._prepared: UpdateCache | None = None
        self._known: dict[Attachment, Updating] = {}

    def logits(self, plan: StepPlan) -> Tensor:
        step = self.forward.rows(plan)
        acting = self._acting_of(plan, step.filler)
        with self._base.routing.held(acting if step.kept is None else acting.keeping(step.kept)):
            return self.forward.logits(plan, step, acting)

    def forget(self) -> None:
        """Drops everything that was prepared."""
        self.acting = self._prepared = None
        self._known.clear()

    def let_go(self, attached: Collection[Attachment]) -> None:
        """Drops references to all adapters but these."""
        if self.acting is not None:
            layers = [layer for adapter in attached for layer in adapter.beside.values()]
            self._prepared, self.acting = self.acting[1].plan.following(layers), None
        self._known = {
            adapter: self._known[adapter] for adapter in attached if adapter in self._known
        }
        self.forward.let_go(attached)

    def _acting_of(self, plan: StepPlan, filler: int) -> Acting:
        """The same value, with what it prepared, for as long as the same adapters have the same
        numbers of rows."""
        parts = [
            (count, self._adapters.applied(each) if each else ()) for each, count in plan.parts
        ]
        if self.acting is None or self.acting[0] != (parts, filler):
            base = self._base
            self.acting = (parts, filler), in_step(parts, self._prepared).padded(filler)
            self._prepared = self.acting[1].plan
            if few_rows.takes_updates(1, base.dtype, base.device):
                self._prepared.mix = mix_of(self.acting[1].parts, self._updating, base.dtype)
        return self.acting[1]

    def _updating(self, adapter: Attachment) -> Updating:
        """What it is as a table; laid out once, for as long as it is here or an answer uses it."""
        if adapter.laid_out is not None:
            known: Updating = adapter.laid_out
            return known
        if (found := self._known.get(adapter)) is None:
            assert self._prepared is not None
            found = self._known[adapter] = updating(adapter, self._prepared, self._base.dtype)
        return found


class Lanes:
    """The forwards of each step over one set of blocks."""

    def __init__(
        self, base: FrozenBase, blocks: BlockManager, adapters: AdapterSource, way: Way
    ) -> None:
        self._adapters, self._way = adapters, way
        again = way.again if (by_parts := way.not_by_parts is None) else None
        first = PagedForward(base.device, blocks, way.logits, filled=not by_parts, again=again)
        second = PagedForward(base.device, blocks, way.logits, filled=not by_parts, keys=first.keys)
        self.exact, self.others = Lane(base, adapters, first), Lane(base, adapters, second)
        self._splits = by_parts and few_rows.takes_updates(1, base.dtype, base.device)
        self._rows_alone: dict[Attachment, bool] = {}

    def logits(self, plan: StepPlan) -> list[Computed]:
        """The logits of all spans, each in one of the forwards. Prefixes are written and blocks
        copied before."""
        for front in plan.fronts:
            (prefix,) = prefixes(self._adapters.applied(front.adapter))
            self.exact.forward.write(front, prefix)
        others = {identity for identity, _ in plan.parts if not self._is_exact(identity)}
        apart = [n for n, span in enumerate(plan.spans) if span.sequence.request.adapter in others]
        if not apart:
            return [(range(len(plan.spans)), self.exact.logits(plan))]
        computed: list[Computed] = []
        exact = sorted({*range(len(plan.spans))} - {*apart})
        for lane, numbers in ((self.exact, exact), (self.others, apart)):
            if numbers:
                # Blocks are copied once, before the first forward writes into them.
                copies = () if computed else plan.copies
                part = replace(plan, spans=tuple(plan.spans[n] for n in numbers), copies=copies)
                computed.append((numbers, lane.logits(part)))
        return computed

    def forget(self) -> None:
        """Drops everything that was prepared."""
        self._rows_alone.clear()
        for lane in (self.exact, self.others):
            lane.forget()

    def let_go(self, held: Collection[Identity]) -> None:
        """Drops references to all adapters but those of these identities."""
        attached = [adapter for identity in held for adapter, _ in self._adapters.applied(identity)]
        self._rows_alone = {
            each: self._rows_alone[each] for each in attached if each in self._rows_alone
        }
        for lane in (self.exact, self.others):
            lane.let_go(attached)
        self._way.let_go()

    def _is_exact(self, identity: Identity) -> bool:
        """Whether rows of these adapters go with the base's. All do where forwards are not
        split."""
        return not (self._splits and identity) or all(
            self._changes_rows_alone(adapter) for adapter, _ in self._adapters.applied(identity)
        )

    def _changes_rows_alone(self, adapter: Attachment) -> bool:
        if adapter not in self._rows_alone:
            self._rows_alone[adapter] = changes_rows_alone(adapter)
        return self._rows_alone[adapter]
