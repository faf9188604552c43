"""Remembers what was found about a loaded model, under a hash of all its values
(files/remembered.py).

A proof on a model itself (execution/proofs/model.py, decoding/proof.py) reads all weights, most of
them several times. Hashing them takes as long as reading them twice. So a base is hashed once, when
it is loaded, and a result of an earlier process is used if the bytes, the class and the config are
the same. It is used only while the model holds these values: if a value is changed, trained or
exchanged, the proof runs again. Only for dense weights of transformers' own classes on the CPU:
elsewhere results may differ in their bits from run to run, or the values cannot all be seen.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
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

Result = TypeVar("Result")

MOST_BYTES = 2**30
"""A larger base is not hashed for proofs alone: the first process would wait longer than later ones
gain."""


@dataclass(frozen=True)
class ValueSnapshot:
    """A model's values as they were loaded.

    key      what a key holds besides the values
    digest   waits for the hash of the values, and returns it
    tensors  each tensor with its address and version when the hashing began
    """

    key: Mapping[str, Any]
    digest: Callable[[], str]
    tensors: Sequence[tuple[Tensor, tuple[int, int]]]

    def matches(self, model: nn.Module) -> bool:
        """Whether the model still holds these tensors, and none was written since."""
        current = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        return all(
            id(tensor) in current and _state(tensor) == state for tensor, state in self.tensors
        )


def can_be_remembered(model: PreTrainedModel) -> bool:
    """Whether this process remembers results, and a key can hold all that a result about this model
    depends on."""
    if not (is_on() and is_known(type(model)) and is_known(type(model.config))):
        return False
    return {parameter.device.type for parameter in model.parameters()} == {"cpu"} and not any(
        isinstance(module, PackedModule) for module in model.modules()
    )


def snapshot_values(model: PreTrainedModel, hashes: ByteHashes | None = None) -> None:
    """Takes the snapshot of a base that was just loaded. Other threads hash it meanwhile.

    hashes: of its tensors, if their hashing has begun already
    """
    size = sum(parameter.nbytes for parameter in model.parameters())
    if not can_be_remembered(model) or size > MOST_BYTES:
        return
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    states = [(tensor, _state(tensor)) for tensor in tensors.values()]
    key = {**class_key(model), "threads": torch.get_num_threads()}
    record_of(model).keep(ValueSnapshot(key, begin_digest(tensors, hashes), states))


def remember_by_values(
    kind: str,
    model: nn.Module,
    value_type: Any,
    make: Callable[[], Result],
    is_valid: Callable[[Result], bool] = lambda _: True,
) -> Result:
    """Returns what an earlier process found for a model with the same values, else make().

    No adapter may act on the model. kind, value_type, is_valid: as for `remember`.
    """
    snapshot = record_of(model).known(ValueSnapshot)
    if snapshot is None or not snapshot.matches(model):
        return make()
    key = {**snapshot.key, "values": snapshot.digest()}
    return remember(kind, key, value_type, make, is_valid)


def snapshot_digest(model: nn.Module) -> tuple[str, frozenset[int]] | None:
    """Returns the digest of the snapshot and the ids of its tensors; None if the model has none, or
    its values have changed."""
    snapshot = record_of(model).known(ValueSnapshot)
    if snapshot is None or not snapshot.matches(model):
        return None
    return snapshot.digest(), frozenset(id(tensor) for tensor, _ in snapshot.tensors)


def class_key(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "class": [
            f"{kind.__module__}.{kind.__qualname__}" for kind in (type(model), type(model.config))
        ],
        "config": model.config.to_dict(),
        "attention": attention_of(model.config),
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 over names, types, shapes and the SHA-256 of every tensor's bytes."""
    return begin_digest(tensors)()


def begin_digest(
    tensors: Mapping[str, Tensor], hashes: ByteHashes | None = None
) -> Callable[[], str]:
    """Begins to compute the digest; returns a function that waits for it."""
    hashes = hashes or ByteHashes(tensors.values())
    descriptions = {
        name: f"{name} {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in sorted(tensors.items())
    }

    @cache
    def done() -> str:
        lines = (
            f"{description} {hashes.digest_of(tensors[name])}\n"
            for name, description in descriptions.items()
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    return done


def _state(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), version_of(tensor)
