"""The layers of a step, computed in Python once or twice and from then on by one call into C.

Steps differ in how many rows they have, in what the first layer takes, in whose blocks are which,
and in what the adapters add to which rows. All of that is handed over anew; where nothing of a step
but compiled functions computes (kernels/tape/step_tape.py), the rest is the same calls over the
same memory, whatever is asked: a prompt read, answers gone on with, the base alone or any mix of
adapters whose changes are updates of linear layers (kernels/dense/mixes.py). So the second such
step is recorded, and all later ones are made again. What was recorded reads the model's weights
where they stood, so it is asked whether modules, parameters and listeners are the same: at each
step, but where answers only go on by a token every `UNSEEN` steps; what was exchanged meanwhile is
held until then. Where something is not the same the step is computed as ever, and recorded anew.
Shapes: N rows of the step, D width, E head size.
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
from veneer.kernels.attention.paged import KeyValueBlocks
from veneer.kernels.bindings import dense_calls, paged_calls
from veneer.kernels.dense.mixes import AdapterMix
from veneer.kernels.packed.nf4 import FUSED_ROWS
from veneer.kernels.tape.step_tape import RowMemory, StepTape, record_step

Inputs = tuple[Tensor, Tensor, Tensor]
"""What the first layer takes, (N, D), and cosines and sines, (N, E)."""
Rest = Callable[[Inputs, PagedStep], Tensor]
"""The layers: (N, D)."""

LEAST_ROOM = 64
"""Rows that a recording has space for at least; more where a step has more."""
UNSEEN = 16
"""Steps for which answers may go on over what was exchanged under them: a look takes as long as a
small kernel."""


class Steps:
    """Of one model. One thread at a time has them, the others compute in Python meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[_Recorded] = []
        self._standing: Standing | None = None
        self._seen = self._declined = False
        self._unseen = 0  # steps before all is looked at again

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """Within, what `computed` gives stays as it is. False: another thread has them."""
        free = self._lock.acquire(blocking=False)
        try:
            yield free
        finally:
            if free:
                self._lock.release()

    def let_go(self) -> None:
        """No adapter is held from here until the next step, but by a step of another thread."""
        with self.taken() as free:
            for each in self._kept if free else ():
                each.let_go()

    def whole(self, ids: Sequence[int], laid: PagedStep) -> Tensor | None:
        """(N, V) of single tokens, embedding and head too, by one call; only within `taken`. None:
        nothing was recorded that gives this step, or not all of it stands as it stood."""
        mix, standing = laid.mix, self._standing
        if mix is None or mix.others or standing is None:
            return None
        for each in self._kept:
            if (
                each.takes(len(ids))
                and each.ends is not None
                and mix.keys.isdisjoint(each.ends.beside)
            ):
                if each.lacks(mix, frozenset()) or not self._stand(standing, each.ends.standing):
                    return None
                return each.whole(ids, laid)
        return None

    def computed(
        self,
        inputs: Inputs,
        laid: PagedStep,
        rest: Rest,
        modules: Callable[[], Sequence[nn.Module]],
        beside: Set[str],
        around: Callable[[], Around | None] = lambda: None,
    ) -> Tensor:
        """(N, D) as `rest` gives it, to the bit. The values are good until the next step; only
        within `taken`.

        modules: all that may be called for it, those of the adapters beside them too. beside: keys
        of adapters' layers at which `rest` does not come by. around: what stands before and behind,
        where that is recorded too.
        """
        mix, rows, self._unseen = laid.mix, len(inputs[0]), 0
        if mix is None or not mix.others <= beside or laid.spans.rows != rows:
            return rest(inputs, laid)
        if self._standing is not None and not self._standing.stands():
            self._kept, self._standing, self._declined = [], None, False
        if self._declined or any(each.lacks(mix, beside) for each in self._kept):
            return rest(inputs, laid)
        for each in self._kept:
            if each.takes(rows):
                found = each.again(inputs, laid)
                return rest(inputs, laid) if found is None else found
        self._seen, seen = True, self._seen
        # An engine makes its blocks in its first step: in the room of a recording, calls that are
        # made again would write over them.
        if not seen or not laid.keys.layers or _listened_to(called := modules()):
            return rest(inputs, laid)
        self._standing = self._standing or Standing(called)
        return self._recorded(inputs, laid, rest, around)

    def _stand(self, *those: Standing) -> bool:
        """Whether all of them do, as far as was looked."""
        if self._unseen > 0:
            self._unseen -= 1
            return True
        self._unseen = UNSEEN - 1
        return all(each.stands() for each in those)

    def _recorded(
        self, inputs: Inputs, laid: PagedStep, rest: Rest, around: Callable[[], Around | None]
    ) -> Tensor:
        rows, most = len(inputs[0]), LEAST_ROOM
        while most < rows:
            most *= 2
        memory = RowMemory(rows, most)
        own = [memory.empty(each.dtype, *each.shape) for each in inputs]
        for mine, each in zip(own, inputs, strict=True):
            mine.copy_(each)
        _ = laid.spans.checked, laid.mix and laid.mix.listed  # which compute
        with record_step(memory) as tape:
            states = rest((own[0], own[1], own[2]), laid)
        tape.check_memory([*own, states])
        if tape.unsupported_call is None:
            new = _Recorded(tape, own, states, laid, around())
            self._kept = [*(each for each in self._kept if not new.replaces(each)), new]
        self._declined = tape.unsupported_call is not None
        return states


class Standing:
    """What a recording reads, as it stood."""

    def __init__(self, modules: Sequence[nn.Module], around: Sequence[nn.Module] = ()) -> None:
        """around: of these only what stands in them is looked at."""
        children = [each._modules for each in (*around, *modules) if each._modules]
        self._children, self._stood = children, [dict(each) for each in children]
        self._listeners = [
            hooks for each in modules for hooks in (each._forward_hooks, each._forward_pre_hooks)
        ]
        self._heard = -1
        holders: list[dict[str, Any]] = [
            kind for each in modules for kind in (each._parameters, each._buffers)
        ]
        places = [
            (kind, name) for kind in holders for name, tensor in kind.items() if tensor is not None
        ]
        self._kinds, self._names = [kind for kind, _ in places], [name for _, name in places]
        self._tensors = [kind[name] for kind, name in places]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        self._storages = [
            tensor.untyped_storage() for tensor in self._tensors
        ]  # held: C reads there

    def stands(self) -> bool:
        """Whether all of it stands where it stood, and nobody listens."""
        return (
            self._nobody_listens()
            and all(map(eq, self._children, self._stood))
            and all(map(is_, map(dict.get, self._kinds, self._names), self._tensors))
            and all(map(eq, map(Tensor.data_ptr, self._tensors), self._addresses))
        )

    def _nobody_listens(self) -> bool:
        """Looked at again once someone has begun to listen anywhere: torch numbers them."""
        numbered = RemovableHandle.next_id
        if self._heard != numbered:
            self._heard = -1 if any(self._listeners) else numbered
        return self._heard == numbered


@dataclass(frozen=True)
class Around:
    """ends: what stands around the layers. standing: what of it is read. beside: keys of what may
    act there."""

    ends: Ends
    standing: Standing
    beside: frozenset[str]


class _Recorded:
    """least, most: rows that it may have. ends: around the layers, of steps of single tokens."""

    def __init__(
        self,
        tape: StepTape,
        inputs: Sequence[Tensor],
        states: Tensor,
        laid: PagedStep,
        ends: Around | None,
    ) -> None:
        self._tape, self._inputs, self._states = tape, inputs, states
        self._attended = tape.structs("veneer_paged_attention")
        self._updated = tape.structs("veneer_few_rows_updated")
        self._like = [
            KeyValueBlocks(each.keys[:0].clone(), each.values[:0].clone())
            for each in laid.keys.layers.values()
        ]
        self._keys = frozenset(
            updates.key
            for one in self._updated
            for updates in one.kept[1]
            if updates is not None and updates.key
        )
        packed = any(one.kind < 0 for one in tape.structs("veneer_packed_rows"))
        self.least, self.most = (FUSED_ROWS + 1 if packed else 1), tape.memory.most_rows
        if not tape.has_any_rows:
            self.least = self.most = tape.memory.rows
        self._rows = tape.memory.rows
        self._down = torch.empty(0, dtype=states.dtype)
        self._mix: AdapterMix | None = None
        self._pages: weakref.ref[PagedKeys] | None = None
        self._spans: Any = None
        self.ends = ends if ends is not None and ends.ends.record(tape, inputs, states) else None

    def replaces(self, other: _Recorded) -> bool:
        return self.least <= other.least and other.most <= self.most

    def lacks(self, mix: AdapterMix, beside: Set[str]) -> bool:
        """Whether the mix changes a layer that these calls know no updates of."""
        return mix is not self._mix and not mix.keys - beside <= self._keys

    def takes(self, rows: int) -> bool:
        return self.least <= rows <= self.most

    def let_go(self) -> None:
        self._mix = None

    def again(self, inputs: Inputs, laid: PagedStep) -> Tensor | None:
        """None: the mix is more than one call takes."""
        rows = len(inputs[0])
        if not self._laid_out(rows, laid):
            return None
        for own, new in zip(self._inputs, inputs, strict=True):
            _first(own, rows).copy_(new)
        self._tape.replay()
        return _first(self._states, rows)

    def whole(self, ids: Sequence[int], laid: PagedStep) -> Tensor | None:
        """(N, V); None: the mix is more than one call takes, or a place lies too far."""
        assert self.ends is not None
        if (
            not self._laid_out(len(ids), laid)
            or (logits := self.ends.ends.take(ids, laid.spans)) is None
        ):
            return None
        self._tape.replay(enclosed=True)
        return logits

    def _laid_out(self, rows: int, laid: PagedStep) -> bool:
        """All that is handed over but the inputs. False: the mix is more than one call takes."""
        spans, mix = laid.spans.checked, laid.mix
        assert mix is not None
        if mix is not self._mix and not self._list(mix):
            return False
        if mix.rows > rows or spans.rows != rows or spans.blocks > laid.keys.num_blocks:
            raise ValueError(
                f"{rows} rows, of spans {spans.rows}, up to {mix.rows} updated, {spans.blocks}"
                " blocks"
            )
        if self._pages is None or laid.keys is not self._pages():
            self._lay(laid.keys)
        if rows != self._rows:
            self._tape.set_rows(rows)
            self._rows = rows
        if spans is not self._spans:
            for given in self._attended:
                paged_calls.point_at(given, spans)
            self._spans = spans
        return True

    def _list(self, mix: AdapterMix) -> bool:
        """The updates of this mix in place of those of another, which is let go."""
        self._mix = None
        room = dense_calls.update_by(self._updated, mix.listed, mix.dtype)
        if room is None:
            return False
        if room > len(self._down):
            self._down = torch.empty(2 * room, dtype=self._down.dtype)
        for given in self._updated:
            given.down = self._down.data_ptr()
        self._mix = mix
        return True

    def _lay(self, pages: PagedKeys) -> None:
        """The blocks of this engine in place of another's."""
        self._pages = None
        for number, (given, like) in enumerate(zip(self._attended, self._like, strict=True)):
            own = pages.like(number, like)
            paged_calls.lie_in(given, own.keys, own.values, like.keys.dtype)
        self._pages = weakref.ref(pages)


def _first(tensor: Tensor, rows: int) -> Tensor:
    """The first rows of what has space for them, though it was made with others."""
    return tensor.as_strided((rows, *tensor.shape[1:]), tensor.stride())


def _listened_to(modules: Sequence[nn.Module]) -> bool:
    return any(each._forward_hooks or each._forward_pre_hooks for each in modules)
