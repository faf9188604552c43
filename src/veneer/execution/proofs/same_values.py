"""What was found out about a model's own values, remembered under every byte of them
(files/remembered.py).

A proof on a model itself (execution/proofs/model.py, decoding/proof.py) reads all weights, most of
them several times; hashing them takes as long as two of these. So a loaded base is hashed once, and
what an earlier process found of the same bytes, class and config is taken. Only as long as the
model holds those very values: whoever changes one, trains it or exchanges a module's weight is
asked anew. On the CPU, over dense weights of transformers' own classes alone: elsewhere the bits
are not known to come again, or bytes lie where they are not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from veneer.bases.identity.byte_hashes import ByteHashes
from veneer.files.remembered import is_known, is_on, remember
from veneer.linear import PackedModule
from veneer.model_record import record_of
from veneer.private.torch import version_of
from veneer.private.transformers import attention_of

Found = TypeVar("Found")

MOST_BYTES = 2**30
"""A base beyond is not hashed for proofs alone: the first process would wait longer than later ones
gain."""


@dataclass(frozen=True)
class NotedValues:
    """around: what a key holds beside the values; hashed: their digest, once it is there; held:
    each tensor, where it lay and how often it had been written when that was begun."""

    around: Mapping[str, Any]
    hashed: Callable[[], str]
    held: Sequence[tuple[Tensor, tuple[int, int]]]

    def still(self, model: nn.Module) -> bool:
        there = {id(each) for each in (*model.parameters(), *model.buffers())}
        return all(id(each) in there and _state(each) == state for each, state in self.held)


def can_be_known(model: PreTrainedModel) -> bool:
    """Whether this process remembers and the key would say all that a finding of this model depends
    on."""
    if not (is_on() and is_known(type(model)) and is_known(type(model.config))):
        return False
    return {each.device.type for each in model.parameters()} == {"cpu"} and not any(
        isinstance(module, PackedModule) for module in model.modules()
    )


def take_note(model: PreTrainedModel, hashes: ByteHashes | None = None) -> None:
    """Of a base that was just loaded: from now on `same_values` knows it. Hashed by threads of its
    own meanwhile.

    hashes: of its tensors, where they were begun before
    """
    if not can_be_known(model) or sum(each.nbytes for each in model.parameters()) > MOST_BYTES:
        return
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    held = [(each, _state(each)) for each in named.values()]
    key = {**class_key(model), "threads": torch.get_num_threads()}
    record_of(model).keep(NotedValues(key, hashing(named, hashes), held))


def same_values(
    what: str,
    model: nn.Module,
    of: Any,
    make: Callable[[], Found],
    still: Callable[[Found], bool] = lambda _: True,
) -> Found:
    """make(), or what it gave an earlier process of a model of the same values, on which nothing
    acted then either.

    what, of, still: as in `remembered`.
    """
    values = record_of(model).known(NotedValues)
    if values is None or not values.still(model):
        return make()
    return remember(what, {**values.around, "values": values.hashed()}, of, make, still)


def noted(model: nn.Module) -> tuple[str, frozenset[int]] | None:
    """Digest of the values that were noted, and the ids of the tensors that hold them, as long as
    they do."""
    values = record_of(model).known(NotedValues)
    if values is None or not values.still(model):
        return None
    return values.hashed(), frozenset(id(each) for each, _ in values.held)


def class_key(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "class": [
            f"{each.__module__}.{each.__qualname__}" for each in (type(model), type(model.config))
        ],
        "config": model.config.to_dict(),
        "attention": attention_of(model.config),
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and the SHA-256 of every tensor's bytes."""
    return hashing(tensors)()


def hashing(tensors: Mapping[str, Tensor], hashes: ByteHashes | None = None) -> Callable[[], str]:
    """Begins with the digest; what is returned waits for it."""
    begun = hashes or ByteHashes(tensors.values())
    said = {
        name: f"{name} {each.dtype} {list(each.shape)}" for name, each in sorted(tensors.items())
    }

    @cache
    def done() -> str:
        return _joined(f"{line} {begun.digest_of(tensors[name])}\n" for name, line in said.items())

    return done


def _joined(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), version_of(tensor)
