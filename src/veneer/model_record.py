"""The record of a loaded model: facts that were found once, and that live as long as the model.

Each folder defines the types of its own parts, mostly frozen dataclasses, and reads a part by its
type. A copy of a model begins with an empty record. What holds for every model of one structure is
kept with the structure (execution/proofs/structure.py).
"""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Part = TypeVar("Part")

_ATTRIBUTE = "_veneer_record"


class ModelRecord:
    """At most one value of each type. No value may hold the model, which holds the record."""

    def __init__(self) -> None:
        self._parts: dict[type, object] = {}

    def part(self, kind: type[Part], find: Callable[[], Part]) -> Part:
        """Returns the part of this type, found when it is first asked for."""
        known = self.known(kind)
        return self.keep(find()) if known is None else known

    def known(self, kind: type[Part]) -> Part | None:
        """Returns the part of this type; None if nobody has asked for it yet."""
        part = self._parts.get(kind)
        return part if isinstance(part, kind) else None

    def keep(self, part: Part) -> Part:
        """Puts a part into the place of the one of its type."""
        self._parts[type(part)] = part
        return part

    def __deepcopy__(self, memo: dict[int, object]) -> "ModelRecord":
        return ModelRecord()


def record_of(model: nn.Module) -> ModelRecord:
    """Returns the record of this model."""
    record = vars(model).setdefault(_ATTRIBUTE, ModelRecord())
    assert isinstance(record, ModelRecord)
    return record
