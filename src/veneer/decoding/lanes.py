"""The two forwards of a step: one for rows that must keep their bits, one for all other rows.

A LoRA of linear layers adds its updates row by row, so rows of the base and of such LoRAs have the
same bits as alone. Other adapters change how a whole forward is computed: a prefix uses the model's
own code, a trained norm or a bottleneck uses torch's. Their rows share a second forward, and a step
with both kinds of rows reads the weights twice. One forward computes all rows if no bits are
promised (execution/decode_step.py has no forward by parts, or no compiled updates).

Where layers pass states from token to token (execution/states.py), a forward has texts of equal
length: single tokens of all answers, then chunks of prompts.
"""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from veneer.adapters.placement.acting import Acting, in_step
from veneer.adapters.placement.attachment import Attachment
from veneer.decoding.forward import PagedForward, equal_spans, part_of
from veneer.decoding.schedule.adapters import (
    AdapterSource,
    LaidOutAdapter,
    changes_rows_alone,
    lay_out_factors,
    mix_of,
    prefixes,
)
from veneer.decoding.schedule.block_names import Identity
from veneer.decoding.schedule.blocks import BlockManager
from veneer.decoding.schedule.step_plan import StepPlan
from veneer.execution.decode_step import DecodeStep
from veneer.execution.states import StateSlots
from veneer.kernels.dense import few_rows
from veneer.kernels.dense.segments import UpdateCache
from veneer.models.frozen_base import FrozenBase

Computed = tuple[Sequence[int], Tensor]
"""Numbers of spans in their plan, and their logits (rows, V)."""


class Lane:
    """One of a step's forwards, with what acted in its last step and the cache of its updates."""

    def __init__(self, base: FrozenBase, adapters: AdapterSource, forward: PagedForward) -> None:
        self.forward = forward
        self.acting: tuple[Any, Acting] | None = None
        self._base, self._adapters = base, adapters
        self._cache: UpdateCache | None = None
        self._laid_out: dict[Attachment, LaidOutAdapter] = {}

    def logits(self, plan: StepPlan) -> Tensor:
        step = self.forward.rows(plan)
        acting = self._acting_of(plan, step.filler)
        with self._base.routing.held(acting if step.kept is None else acting.keeping(step.kept)):
            return self.forward.logits(plan, step, acting)

    def forget(self) -> None:
        """Clears all caches."""
        self.acting = self._cache = None
        self._laid_out.clear()

    def let_go(self, attached: Collection[Attachment]) -> None:
        """Drops references to all adapters but these."""
        if self.acting is not None:
            layers = [layer for adapter in attached for layer in adapter.wrapper_layers.values()]
            self._cache, self.acting = self.acting[1].plan.following(layers), None
        self._laid_out = {
            adapter: self._laid_out[adapter] for adapter in attached if adapter in self._laid_out
        }
        self.forward.let_go(attached)

    def _acting_of(self, plan: StepPlan, filler: int) -> Acting:
        """Returns which adapters act on which rows of a plan. The value and its caches are reused
        while the same adapters have the same numbers of rows."""
        parts = [
            (count, self._adapters.applied(identity) if identity else ())
            for identity, count in plan.parts
        ]
        if self.acting is None or self.acting[0] != (parts, filler):
            base = self._base
            self.acting = (parts, filler), in_step(parts, self._cache).padded(filler)
            self._cache = self.acting[1].plan
            if few_rows.takes_updates(1, base.dtype, base.device):
                self._cache.mix = mix_of(self.acting[1].parts, self._laid_out_adapter, base.dtype)
        return self.acting[1]

    def _laid_out_adapter(self, adapter: Attachment) -> LaidOutAdapter:
        """Returns the adapter's factors, laid out once while it is loaded or an answer uses it."""
        if adapter.laid_out is not None:
            return adapter.laid_out
        if (laid := self._laid_out.get(adapter)) is None:
            assert self._cache is not None
            laid = self._laid_out[adapter] = lay_out_factors(adapter, self._cache, self._base.dtype)
        return laid


class Lanes:
    """The forwards of each step over one set of blocks."""

    def __init__(
        self,
        base: FrozenBase,
        blocks: BlockManager,
        adapters: AdapterSource,
        step: DecodeStep,
        states: StateSlots | None = None,
    ) -> None:
        self._adapters, self._step, self._states = adapters, step, states
        by_parts = step.not_by_parts is None
        replay = step.replay if by_parts else None
        run, filled = step.logits, not by_parts and states is None
        first = PagedForward(base.device, blocks, run, filled=filled, replay=replay, states=states)
        second = PagedForward(
            base.device, blocks, run, filled=filled, keys=first.keys, states=states
        )
        self.exact, self.mixed = Lane(base, adapters, first), Lane(base, adapters, second)
        self._splits = by_parts and few_rows.takes_updates(1, base.dtype, base.device)
        self._rows_alone: dict[Attachment, bool] = {}

    def logits(self, plan: StepPlan) -> list[Computed]:
        """Writes prefixes, copies blocks, and computes the logits of all spans, each in one of the
        two forwards."""
        for prefix_write in plan.prefix_writes:
            (prefix,) = prefixes(self._adapters.applied(prefix_write.adapter))
            self.exact.forward.write(prefix_write, prefix)
        other_identities = {identity for identity, _ in plan.parts if not self._is_exact(identity)}
        if not other_identities and self._states is None:
            return [(range(len(plan.spans)), self.exact.logits(plan))]
        computed: list[Computed] = []
        everything = [[*range(len(plan.spans))]]
        for together in everything if self._states is None else equal_spans(plan):
            others = [n for n in together if plan.spans[n].adapter in other_identities]
            exact = sorted({*together} - {*others})
            for lane, numbers in ((self.exact, exact), (self.mixed, others)):
                if numbers:
                    part = part_of(plan, numbers, is_first=not computed)
                    computed.append((numbers, lane.logits(part)))
        return computed

    def finish(self, plan: StepPlan) -> None:
        """Takes over the states that the plan's forwards wrote."""
        if self._states is not None:
            copies = {
                span.sequence.number: [choice.number for choice in span.draws]
                for span in plan.spans
            }
            self._states.finish(copies)

    def keep_states(self, numbers: Collection[int]) -> None:
        """Drops the states of all answers but these."""
        if self._states is not None:
            self._states.keep(numbers)

    def forget(self) -> None:
        """Clears all caches, and what a step wrote that was not finished."""
        if self._states is not None:
            self._states.undo()
        self._rows_alone.clear()
        for lane in (self.exact, self.mixed):
            lane.forget()

    def let_go(self, held: Collection[Identity]) -> None:
        """Drops references to all adapters but those of these identities."""
        attached = [adapter for identity in held for adapter, _ in self._adapters.applied(identity)]
        self._rows_alone = {
            adapter: self._rows_alone[adapter]
            for adapter in attached
            if adapter in self._rows_alone
        }
        for lane in (self.exact, self.mixed):
            lane.let_go(attached)
        self._step.drop_references()

    def keeps_bits(self, identity: Identity) -> bool:
        """Whether rows of these adapters have the same bits in whatever step they are computed.
        Where layers pass states on they do not: other code computes chunks than single tokens."""
        if self._states is not None:
            return False
        return self._splits and self._step.is_recorded and self._is_exact(identity)

    def _is_exact(self, identity: Identity) -> bool:
        """Whether rows of these adapters share the base's forward. All do if forwards are not
        split."""
        return not (self._splits and identity) or all(
            self._changes_rows_alone(adapter) for adapter, _ in self._adapters.applied(identity)
        )

    def _changes_rows_alone(self, adapter: Attachment) -> bool:
        if adapter not in self._rows_alone:
            self._rows_alone[adapter] = changes_rows_alone(adapter)
        return self._rows_alone[adapter]
