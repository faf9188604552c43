"""Counts memory and work of a program while it runs on tensors without storage.

Every operation is observed: a storage counts from its first appearance until nothing refers to it,
as with an allocator that does not round. Live bytes are kept by label (the activity in which they
appeared) and by phase, so the peak comes with its moment and its parts.

Questions that only real values could answer are decided here: which tokens a mixture's router sends
to which expert. They are spread evenly. Knows nothing of models or training.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from veneer.errors import ConfigError, VeneerError
from veneer.kernels.bindings.library import current_counts
from veneer.private.torch import (
    FLASH_BACKWARD,
    FLASH_FORWARD,
    GROUPED_PRODUCT,
    READ_VALUE,
    TO_COPY,
    UNIQUE,
    UNSAFE_VIEW,
    TorchDispatchMode,
    packet_of,
    storage_key,
)

META = torch.device("meta")
Parts = dict[str, int]
Shape = tuple[int, int, int]
Products = Annotated[
    Counter[Shape],
    PlainSerializer(lambda counted: [[*shape, flops] for shape, flops in counted.items()]),
    BeforeValidator(
        lambda entries: Counter(
            {(rows, inner, columns): flops for rows, inner, columns, flops in entries}
        )
    ),
]
"""Stored as a list, because JSON keys are strings."""


@dataclass
class Phase:
    """Counts a phase. peak_bytes: most live bytes; parts: these by label; end_bytes: live at its
    end.
    """

    name: str
    peak_bytes: int = 0
    parts: Parts = field(default_factory=dict)
    end_bytes: int = 0


@dataclass
class Work:
    """Counts what operations cost.

    products     (rows, inner, columns) -> FLOP; own: shapes that only our kernels compute
    moved_bytes  read and written by other operations;  host_bytes  copied by offload, both ways
    replayed_layers  layers whose calls are replayed (kernels/tape/layer_tape.py)
    """

    products: Products = field(default_factory=Counter)
    own: set[Shape] = field(default_factory=set)
    moved_bytes: int = 0
    operations: int = 0
    host_bytes: int = 0
    replayed_layers: int = 0

    @property
    def flops(self) -> int:
        return sum(self.products.values())

    @property
    def of_libraries(self) -> list[Shape]:
        """Lists the matrix products that a library computes."""
        return [shape for shape in self.products if all(shape) and shape not in self.own]


class MetaMode(TorchDispatchMode):
    """Runs programs on tensors without storage, without counting.

    experts: number of experts for the even spread; 1 without a mixture.
    """

    def __init__(self, *, experts: int = 1) -> None:
        super().__init__()
        self.experts = experts
        self.expert_rows = 0
        """Rows of an expert, if the program asks for them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False: torch would else disable its compiler around every operation."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs an operation, or returns its result without values."""
        out = self._without_values(func, args, kwargs)
        return func(*args, **kwargs) if out is None else out

    def _without_values(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers what depends on values: every expert gets an equal share of the tokens."""
        aten = torch.ops.aten
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return None
        if func is GROUPED_PRODUCT.default and args[0].dtype != torch.bfloat16:
            return _grouped_product(*args, **kwargs)
        if func is UNIQUE.default:
            return torch.arange(self.experts), None, None
        if func is TO_COPY.default and (kwargs.get("device") or META) != META:
            # A copy to a real device has no storage either.
            return func(*args, **{**kwargs, "device": META})
        if func is READ_VALUE.default and args[0].dtype == torch.bool:
            return True  # asked of masks: nothing is masked
        if func is aten.nonzero.default:
            rows = -(-args[0].numel() // self.experts)
            if self.experts > 1:
                self.expert_rows = max(self.expert_rows, rows)
            return torch.empty(rows, args[0].dim(), dtype=torch.int64, device=META)
        return None


class Tracker(MetaMode):
    """Counts tensors on `device` within its block."""

    def __init__(self, *, experts: int = 1, device: torch.device = META) -> None:
        super().__init__(experts=experts)
        self.device = device
        self.live: Counter[str] = Counter()
        self.phases: list[Phase] = []
        self.work = Work()
        self._seen: dict[int, tuple[str, int]] = {}
        self._label = "other"
        self._total = 0

    @contextmanager
    def phase(self, name: str, *, label: str) -> Iterator[Phase]:
        """Labels what appears within the block, and keeps the block's own peak."""
        previous_label = self._label
        self.enter(name, label=label)
        try:
            yield self.phases[-1]
        finally:
            self.phases[-1].end_bytes = self._total
            self._label = previous_label

    def enter(self, name: str, *, label: str) -> None:
        """Starts the next phase and ends the previous one."""
        if self.phases:
            self.phases[-1].end_bytes = self._total
        self._label = label
        self.phases.append(Phase(name))
        self._note_peak()

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor that was made elsewhere."""
        self._add(tensor)

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Gives a counted tensor another label."""
        key = storage_key(tensor)
        old_label, size = self._seen[key]
        self._seen[key] = label, size
        self.live[old_label] -= size
        self.live[label] += size

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = super().run(func, args, kwargs)
        for leaf in out if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        self._count_work(func, args, kwargs, out)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key in self._seen or tensor.device.type != self.device.type:
            return
        size = storage.nbytes()
        self._seen[key] = self._label, size
        self.live[self._label] += size
        self._total += size
        weakref.finalize(storage, self._free, key)
        if self.phases and self._total > self.phases[-1].peak_bytes:
            self._note_peak()

    def _note_peak(self) -> None:
        self.phases[-1].peak_bytes = self._total
        self.phases[-1].parts = {label: size for label, size in self.live.items() if size}

    def _free(self, key: int) -> None:
        label, size = self._seen.pop(key)
        self.live[label] -= size
        self._total -= size

    def _count_work(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        packet, counts = packet_of(func), current_counts()
        iterations = counts.iterations
        if packet in _COUNTED_BY_CALLER:
            self.work.operations += iterations
        elif packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
            shape = _shape(packet, args)
            if not counts.is_kernel:
                self.work.own.discard(shape)
            elif shape not in self.work.products:
                self.work.own.add(shape)
            self.work.products[shape] += flops * iterations
            self.work.operations += iterations
        elif not func.is_view and packet not in _FREE:
            self.work.operations += iterations
            self.work.moved_bytes += sum(t.nbytes for t in _tensors((args, out))) * iterations


@contextmanager
def without_values(name: str) -> Iterator[None]:
    """Raises ConfigError if the model `name` asks for real values within the block."""
    try:
        yield
    except VeneerError:
        raise
    except Exception as fault:  # models fail in many ways
        raise ConfigError(
            f"{name} cannot be planned: its code looks at values, and a plan is made without any",
            [f"{type(fault).__name__}: {str(fault).strip()[:160]}"],
            "Train a few steps (veneer train --steps 5): the report shows what they hold and how"
            " long they take.",
        ) from fault


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yields tensors in an operation's arguments or results: nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _grouped_product(
    rows: Tensor,
    stacks: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: Any = None,
) -> Tensor | None:
    """Returns the result's shape of a grouped product, which torch refuses without storage except
    in bf16.

    rows (S, I) and stacks (E, I, O) -> (S, O), or the gradient of the stacks from (I, S) and (S,
    O).
    """
    if rows.dim() == 2 and stacks.dim() == 3:
        return rows.new_empty(rows.shape[0], stacks.shape[2])
    if rows.dim() == stacks.dim() == 2 and offs is not None:
        return rows.new_empty(offs.numel(), rows.shape[0], stacks.shape[1])
    return None


_COUNTED_BY_CALLER = {FLASH_FORWARD, FLASH_BACKWARD}
"""Operations whose products are counted by their caller (kernels/attention/flash.py)."""
_FREE = {
    torch.ops.aten.detach,
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.new_empty,
    UNSAFE_VIEW,
    torch.ops.aten.lift_fresh,
}
"""Operations that neither read nor write values."""


def _shape(packet: Any, args: tuple[Any, ...]) -> Shape:
    """Returns (rows, inner, columns) of a product; a batch counts as more rows. Zeros for
    others.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    if packet in (torch.ops.aten.addmm, torch.ops.aten.baddbmm):
        tensors = tensors[1:]
    if len(tensors) < 2 or tensors[0].dim() not in (2, 3) or tensors[1].dim() != tensors[0].dim():
        return 0, 0, 0
    left, right = tensors[0].shape, tensors[1].shape
    return int(torch.Size(left[:-1]).numel()), int(left[-1]), int(right[-1])
