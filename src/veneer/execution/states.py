"""States that layers pass from token to token: windows of short convolutions, state spaces, the
matrices of linear attention.

A layer has a state if transformers' own cache holds one for it. The states of a text lie in one
slot, which holds them for all layers. A step reads the slots of its texts and writes new states
into free ones; the engine takes these over when the step is complete. So a slot that holds a state
never changes: a step that fails leaves all states as they were, and the choices of a request share
the slot of their prompt.

A forward gets the states of its texts as a cache of transformers' own kind. Shapes: S slots, B
texts of a forward, T tokens of each.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from veneer.kernels.decoding.state_step import SlotStates
from veneer.model_record import record_of

StateName = tuple[int, str, int]
"""A layer's number, the kind of its state, and which of the layer's states it is."""
WINDOW, MATRIX = KINDS = ("conv_states", "recurrent_states")
ZEROS = 0
"""The slot of texts that begin."""


@dataclass(frozen=True)
class StateLayers:
    """The states of a model's layers.

    states  the state of one text without tokens, (1, ...), by name; empty: no layer has one
    """

    states: Mapping[StateName, Tensor]

    def bytes_of(self, texts: int) -> int:
        """Returns the bytes of the slots for so many texts."""
        return _slots(texts) * self._slot_bytes

    def texts_in(self, room_bytes: int) -> int:
        """Returns the most texts whose slots take no more bytes."""
        return max(0, (room_bytes // self._slot_bytes - _slots(0)) // 2)

    @property
    def _slot_bytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())


def _slots(texts: int) -> int:
    """Returns the number of slots for so many texts: one for each, one for what a step writes for
    it, and the slot of texts that begin."""
    return 2 * texts + 1


def state_layers(model: PreTrainedModel) -> StateLayers:
    """Returns the states of a model's layers, found by a forward of one token. To be called first
    while no adapter acts on the model."""
    return record_of(model).part(StateLayers, lambda: _find_states(model))


def has_states(model: PreTrainedModel) -> bool:
    """Whether a layer of the model passes a state from token to token."""
    cache = DynamicCache(config=model.config)
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


@torch.no_grad()
def _find_states(model: PreTrainedModel) -> StateLayers:
    cache: Any = DynamicCache(config=model.config)
    states: dict[StateName, Tensor] = {}
    if has_states(model):
        call: Any = model
        ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        call(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
        for number, layer in enumerate(cache.layers):
            for kind in KINDS:
                for which, state in getattr(layer, kind, {}).items():
                    if state is not None:
                        states[number, kind, which] = torch.zeros_like(state)
    return StateLayers(states)


def layers_without_keys(config: PreTrainedConfig) -> set[int]:
    """Returns the numbers of the layers without attention: they have a state, or nothing."""
    layers: list[Any] = DynamicCache(config=config).layers
    without = LinearAttentionLayer, DummyLayer
    return {n for n, layer in enumerate(layers) if type(layer) in without}


def cache_argument(model: nn.Module) -> str:
    """Returns the name of the cache of a forward, of a model or a layer, which differs between
    versions of transformers."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "cache_params") if name in names), "past_key_values")


class StateSlots:
    """The states of all texts of an engine, which are known by numbers.

    texts  most texts at a time
    """

    def __init__(self, layers: StateLayers, texts: int) -> None:
        self.count = _slots(texts)
        # Not filled: the system gives a page when it is written, and low slots are taken first.
        self.stored = {
            name: state.new_empty(self.count, *state.shape[1:])
            for name, state in layers.states.items()
        }
        for stored in self.stored.values():
            stored[ZEROS] = 0
        self._free = list(range(self.count - 1, ZEROS, -1))
        self._slot_of: dict[int, int] = {}
        self._written: dict[int, int] = {}

    def begin(self, texts: Sequence[tuple[int, int]]) -> "StepStates":
        """Returns the states of a forward over texts: (number, tokens that its state has read)."""
        read = [self._slot_of[number] if tokens else ZEROS for number, tokens in texts]
        written = [self._free.pop() for _ in texts]
        self._written |= {number: slot for (number, _), slot in zip(texts, written, strict=True)}
        return StepStates(self, read, written)

    def finish(self, copies: Mapping[int, Sequence[int]] = MappingProxyType({})) -> None:
        """Takes over what the step wrote. copies: texts that continue from another text's state."""
        for number, slot in self._written.items():
            for owner in (number, *copies.get(number, ())):
                self._slot_of[owner] = slot
        self._written.clear()
        self._free_unused()

    def undo(self) -> None:
        """Forgets what the step wrote."""
        self._written.clear()
        self._free_unused()

    def keep(self, numbers: Collection[int]) -> None:
        """Drops the states of all other texts."""
        self._slot_of = {n: slot for n, slot in self._slot_of.items() if n in numbers}
        self._free_unused()

    def _free_unused(self) -> None:
        used = {ZEROS, *self._slot_of.values(), *self._written.values()}
        self._free = [slot for slot in range(self.count - 1, ZEROS, -1) if slot not in used]


class StepStates:
    """The states of the B texts of one forward, which all have the same number of tokens.

    read, written  slots of each text, before and after the forward
    cache          the states as a cache of transformers' own kind, for one forward
    """

    def __init__(self, slots: StateSlots, read: Sequence[int], written: Sequence[int]) -> None:
        self.slots, self.texts = slots, len(read)
        self.read, self.written = torch.tensor(read), torch.tensor(written)
        self._layers = _StateLayers(self)
        self.cache: Cache = _StateCache(self._layers)

    def state(self, name: StateName) -> SlotStates:
        """Returns a state for a kernel, which reads and writes the slots itself."""
        return SlotStates(self.slots.stored[name], self.read, self.written)

    def store(self) -> None:
        """Writes the states of the layers that used the cache in the forward."""
        for (number, kind, which), stored in self.slots.stored.items():
            if (layer := self._layers.used.get(number)) is not None:
                own: Any = layer
                stored[self.written] = getattr(own, kind)[which].to(stored.dtype)


class _StateLayers(Sequence[LinearAttentionLayer]):
    """The layers of a cache. The states of a layer are copied when it is asked for."""

    def __init__(self, states: StepStates) -> None:
        self.used: dict[int, _StateLayer] = {}
        self._states = states

    def __len__(self) -> int:
        return 1 + max((number for number, _, _ in self._states.slots.stored), default=-1)

    def __getitem__(self, number: Any) -> Any:
        if number not in self.used and number >= len(self):
            raise IndexError(number)
        if number not in self.used:
            layer = self.used[number] = _StateLayer()
            for (own, kind, which), stored in self._states.slots.stored.items():
                if own == number:
                    layer.take(kind, which, stored[self._states.read])
        return self.used[number]


class _StateCache(Cache):
    """Holds states only: keys and values are elsewhere (execution/paged.py), for any layer."""

    def __init__(self, layers: Sequence[LinearAttentionLayer]) -> None:
        super().__init__(layers=layers)  # type: ignore[arg-type]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class _StateLayer(LinearAttentionLayer):
    """The states of one layer, which have passed tokens before."""

    def take(self, kind: str, which: int, state: Tensor) -> None:
        own: Any = self
        getattr(own, kind)[which] = state
        getattr(own, f"is_{kind}_initialized")[which] = own.has_previous_state[which] = True
        if kind == "conv_states":
            own.conv_kernel_size[which] = state.shape[-1]
        own.dtype, own.device = state.dtype, state.device
