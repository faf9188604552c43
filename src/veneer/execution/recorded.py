"""Replays the layers of a decoding step by one call into C, once they have been computed in Python.

Steps differ in the number of rows, the input of the first layer, the blocks of each sequence, and
the adapters of each row. These are replaced before every replay. If compiled functions compute all
the rest of a step (kernels/tape/step_tape.py), the rest is the same calls over the same memory,
whatever the requests are: a prompt, tokens of answers, the base alone, or any mix of adapters that
update linear layers (kernels/dense/mixes.py). So the second such step is recorded, and later steps
are replayed.

A recording reads the weights where they were, so a snapshot of the modules, parameters and hooks is
compared before each replay; while answers only grow by a token, every `UNCHECKED` steps. If
anything differs, the step is computed in Python and recorded again. Shapes: N rows of the step, D
width, E head size.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from veneer.execution.ends import Ends
from veneer.execution.paged import PagedKeys, PagedStep
from veneer.execution.states import StateName, StateSlots, StepStates
from veneer.kernels.attention.paged import KeyValueBlocks
from veneer.kernels.bindings import dense_calls, paged_calls, state_calls
from veneer.kernels.dense.mixes import AdapterMix
from veneer.kernels.packed.nf4 import FUSED_ROWS
from veneer.kernels.tape.step_tape import RowMemory, StepTape, record_step
from veneer.private.torch import buffers_of, children_of, has_hooks, hooks_of, parameters_of

Inputs = Sequence[Tensor]
"""The input of the first layer, (N, D), and cosines and sines, (N, E), of each kind of layer."""
Layers = Callable[[Inputs, PagedStep], Tensor]
"""Computes all layers: (N, D)."""

LEAST_ROOM = 64
"""Smallest number of rows that a recording has memory for."""
UNCHECKED = 16
"""Steps of single tokens between two comparisons with the snapshot, each of which takes as long as
a small kernel."""


class RecordedSteps:
    """The recorded steps of one model. One thread at a time replays; others compute in Python."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: list[_RecordedStep] = []
        self._snapshot: Snapshot | None = None
        self._seen = self._declined = False
        self._unchecked = 0  # steps before the next comparison with the snapshot

    @contextmanager
    def leased(self) -> Iterator[bool]:
        """Within the block results of `compute` stay valid. False: another thread has the lease."""
        free = self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()

    @property
    def have_any_rows(self) -> bool:
        """Whether the layers of a step are recorded, from one row on."""
        return any(step.least == 1 for step in self._steps)

    def check_next(self) -> None:
        """Has the next replay compare the snapshots."""
        self._unchecked = 0

    def drop_references(self) -> None:
        """Drops references to adapters, except those of a step that another thread computes."""
        with self.leased() as free:
            for step in self._steps if free else ():
                step.drop_references()

    def logits(self, ids: Sequence[int], paged_step: PagedStep) -> Tensor | None:
        """Replays a whole step, embedding and head included: (N, V). Only within `leased`. Returns
        None if no recording fits this step or a snapshot does not match."""
        mix, snapshot = paged_step.mix, self._snapshot
        if mix is None or mix.others or snapshot is None:
            return None
        for step in self._steps:
            ends = step.ends
            if step.takes(len(ids)) and ends is not None and mix.keys.isdisjoint(ends.keys):
                if step.lacks(mix, frozenset()) or not self._match(snapshot, ends.snapshot):
                    return None
                return step.logits(ids, paged_step)
        return None

    def compute(
        self,
        inputs: Inputs,
        paged_step: PagedStep,
        layers: Layers,
        modules: Callable[[], Sequence[nn.Module]],
        outside: Set[str],
        find_ends: Callable[[], RecordedEnds | None] = lambda: None,
    ) -> Tensor:
        """Returns what `layers` gives, (N, D), to the bit: replayed if a recording fits. The values
        are valid until the next step. Only within `leased`.

        modules    all modules that `layers` may call, adapters' modules included
        outside    keys of adapters' layers that `layers` does not pass
        find_ends  the embedding and the head, if they can be recorded too
        """
        mix, rows, self._unchecked = paged_step.mix, len(inputs[0]), 0
        if mix is None or not mix.others <= outside or paged_step.spans.rows != rows:
            return layers(inputs, paged_step)
        if self._snapshot is not None and not self._snapshot.matches():
            self._steps, self._snapshot, self._declined = [], None, False
        if self._declined or any(step.lacks(mix, outside) for step in self._steps):
            return layers(inputs, paged_step)
        for step in self._steps:
            if step.takes(rows):
                states = step.replay(inputs, paged_step)
                return layers(inputs, paged_step) if states is None else states
        self._seen, seen = True, self._seen
        # An engine makes its blocks in its first step. In the memory of a recording, replayed calls
        # would write over them.
        if not seen or not paged_step.keys.layers or any(map(has_hooks, called := modules())):
            return layers(inputs, paged_step)
        self._snapshot = self._snapshot or Snapshot(called)
        return self._record(inputs, paged_step, layers, find_ends)

    def _match(self, *snapshots: Snapshot) -> bool:
        """True if the snapshots still match; compared every UNCHECKED steps."""
        if self._unchecked > 0:
            self._unchecked -= 1
            return True
        match = all(snapshot.matches() for snapshot in snapshots)
        self._unchecked = UNCHECKED - 1 if match else 0
        return match

    def _record(
        self,
        inputs: Inputs,
        paged_step: PagedStep,
        layers: Layers,
        find_ends: Callable[[], RecordedEnds | None],
    ) -> Tensor:
        """Computes a step by `layers` and records its calls."""
        rows, most = len(inputs[0]), LEAST_ROOM
        while most < rows:
            most *= 2
        memory = RowMemory(rows, most)
        copies = [memory.empty(tensor.dtype, *tensor.shape) for tensor in inputs]
        for copy, tensor in zip(copies, inputs, strict=True):
            copy.copy_(tensor)
        # Cached properties, computed here so that the recording does not contain their calls.
        _ = paged_step.spans.checked, paged_step.mix and paged_step.mix.listed
        with record_step(memory) as tape:
            states = layers(copies, paged_step)
        tape.check_memory([*copies, states])
        if tape.unsupported_call is None:
            step = _RecordedStep(tape, copies, states, paged_step, find_ends())
            self._steps = [*(old for old in self._steps if not step.replaces(old)), step]
        self._declined = tape.unsupported_call is not None
        return states


class Snapshot:
    """Snapshot of what a recording depends on: modules, their tensors and addresses, no hooks.

    modules  compared whole
    parents  of these only their children are compared
    """

    def __init__(self, modules: Sequence[nn.Module], parents: Sequence[nn.Module] = ()) -> None:
        children = [children_of(module) for module in (*parents, *modules) if children_of(module)]
        self._children, self._children_then = children, [dict(names) for names in children]
        self._hooks = [hooks for module in modules for hooks in hooks_of(module)]
        self._last_hook_id = -1
        tables: list[dict[str, Any]] = [
            table for module in modules for table in (parameters_of(module), buffers_of(module))
        ]
        entries = [
            (table, name)
            for table in tables
            for name, tensor in table.items()
            if tensor is not None
        ]
        self._tables, self._names = [table for table, _ in entries], [name for _, name in entries]
        self._tensors = [table[name] for table, name in entries]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        # Held, because C reads there.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]

    def matches(self) -> bool:
        """True if modules, tensors and addresses are the same and no module has a hook."""
        return (
            self._has_no_hooks()
            and all(map(eq, self._children, self._children_then))
            and all(map(is_, map(dict.get, self._tables, self._names), self._tensors))
            and all(map(eq, map(Tensor.data_ptr, self._tensors), self._addresses))
        )

    def _has_no_hooks(self) -> bool:
        """Looks at the hooks again only after torch has numbered a new hook anywhere."""
        last_id = RemovableHandle.next_id
        if self._last_hook_id != last_id:
            self._last_hook_id = -1 if any(self._hooks) else last_id
        return self._last_hook_id == last_id


@dataclass(frozen=True)
class RecordedEnds:
    """The embedding and the head of a recorded step.

    snapshot  what they read
    keys      the adapters' layers that may act on them
    """

    ends: Ends
    snapshot: Snapshot
    keys: frozenset[str]


class _RecordedStep:
    """One recorded step, replayed with `least` to `most` rows.

    ends  embedding and head of a step of single tokens, if they are recorded too
    """

    def __init__(
        self,
        tape: StepTape,
        inputs: Sequence[Tensor],
        states: Tensor,
        paged_step: PagedStep,
        ends: RecordedEnds | None,
    ) -> None:
        self._tape, self._inputs, self._states = tape, inputs, states
        self._attended = tape.structs("veneer_paged_attention")
        self._updated = tape.structs("veneer_few_rows_updated")
        self._experts = tape.structs("veneer_expert_product")
        self._like = [
            KeyValueBlocks(blocks.keys[:0].clone(), blocks.values[:0].clone())
            for blocks in paged_step.keys.layers.values()
        ]
        self._keys = frozenset(
            updates.key
            for call in (*self._updated, *self._experts)
            for updates in call.kept[1]
            if updates is not None and updates.key
        )
        packed = any(call.kind < 0 for call in tape.structs("veneer_packed_rows"))
        packed = packed or any(call.packed for call in self._experts)
        self.least, self.most = (FUSED_ROWS + 1 if packed else 1), tape.memory.most_rows
        if not tape.has_any_rows:
            self.least = self.most = tape.memory.rows
        self._rows = tape.memory.rows
        self._down = torch.empty(0, dtype=states.dtype)
        self._mix: AdapterMix | None = None
        self._pages: weakref.ref[PagedKeys] | None = None
        self._spans: Any = None
        self._slots: weakref.ref[StateSlots] | None = None
        self._places = torch.zeros(2, self.most, dtype=torch.int64)
        self._passed: list[tuple[Any, StateName, Tensor]] = []
        if paged_step.states is not None:
            stored = paged_step.states.slots.stored
            names = {states.data_ptr(): name for name, states in stored.items()}
            calls = [call for name in state_calls.FUNCTIONS for call in tape.structs(name)]
            self._passed = [
                (call, name := names[call.stored], stored[name][:0].clone()) for call in calls
            ]
        self.ends = ends if ends is not None and ends.ends.record(tape, inputs, states) else None

    def replaces(self, other: _RecordedStep) -> bool:
        """True if this step takes all numbers of rows that the other one takes."""
        return self.least <= other.least and other.most <= self.most

    def lacks(self, mix: AdapterMix, outside: Set[str]) -> bool:
        """True if the mix updates a layer for which these calls have no update."""
        return mix is not self._mix and not mix.keys - outside <= self._keys

    def takes(self, rows: int) -> bool:
        return self.least <= rows <= self.most

    def drop_references(self) -> None:
        self._mix = None

    def replay(self, inputs: Inputs, paged_step: PagedStep) -> Tensor | None:
        """Returns the states, (N, D); None if the mix has more updates than one call takes."""
        rows = len(inputs[0])
        if not self._prepare(rows, paged_step):
            return None
        for recorded, tensor in zip(self._inputs, inputs, strict=True):
            _first(recorded, rows).copy_(tensor)
        self._tape.replay()
        return _first(self._states, rows)

    def logits(self, ids: Sequence[int], paged_step: PagedStep) -> Tensor | None:
        """Returns the logits, (N, V); None if the mix has more updates than one call takes, or a
        position lies beyond the table of rotations."""
        assert self.ends is not None
        if not self._prepare(len(ids), paged_step):
            return None
        if (logits := self.ends.ends.take(ids, paged_step.spans)) is None:
            return None
        self._tape.replay(enclosed=True)
        return logits

    def _prepare(self, rows: int, paged_step: PagedStep) -> bool:
        """Points the recorded calls at this step's rows, blocks and updates. False if the mix has
        more updates than one call takes."""
        spans, mix = paged_step.spans.checked, paged_step.mix
        assert mix is not None
        if mix is not self._mix and not self._take_mix(mix):
            return False
        if mix.rows > rows or spans.rows != rows or spans.blocks > paged_step.keys.num_blocks:
            raise ValueError(
                f"{rows} rows, of spans {spans.rows}, up to {mix.rows} updated, {spans.blocks}"
                " blocks"
            )
        if self._pages is None or paged_step.keys is not self._pages():
            self._take_blocks(paged_step.keys)
        if paged_step.states is not None:
            self._take_states(paged_step.states)
        if rows != self._rows:
            self._tape.set_rows(rows)
            self._rows = rows
        if spans is not self._spans:
            for call in self._attended:
                paged_calls.point_at(call, spans)
            self._spans = spans
        return True

    def _take_mix(self, mix: AdapterMix) -> bool:
        """Replaces the updates of the last mix, and drops the reference to it."""
        self._mix = None
        room = dense_calls.update_by(self._updated, mix.listed, mix.dtype)
        of_experts = dense_calls.update_by(self._experts, mix.listed, mix.dtype)
        if room is None or of_experts is None:
            return False
        # An update of a row is one of each of its experts.
        room = max(room, of_experts * max((call.chosen for call in self._experts), default=0))
        if room > len(self._down):
            self._down = torch.empty(2 * room, dtype=self._down.dtype)
        for call in (*self._updated, *self._experts):
            call.down = self._down.data_ptr()
        self._mix = mix
        return True

    def _take_blocks(self, pages: PagedKeys) -> None:
        """Replaces the blocks of another engine by this one's."""
        self._pages = None
        for number, (call, like) in enumerate(zip(self._attended, self._like, strict=True)):
            blocks = pages.like(number, like)
            paged_calls.lie_in(call, blocks.keys, blocks.values, like.keys.dtype)
        self._pages = weakref.ref(pages)

    def _take_states(self, states: StepStates) -> None:
        """Replaces the slots of the last step, and all slots of another engine."""
        for places, own in zip(self._places, (states.read, states.written), strict=True):
            places[: len(own)].copy_(own)
        if self._slots is not None and states.slots is self._slots():
            return
        self._slots = None
        for call, name, like in self._passed:
            state_calls.point_at(call, states.slots.stored[name], like, *self._places)
        self._slots = weakref.ref(states.slots)


def _first(tensor: Tensor, rows: int) -> Tensor:
    """Returns the first rows of a tensor whose memory has space for them."""
    return tensor.as_strided((rows, *tensor.shape[1:]), tensor.stride())
