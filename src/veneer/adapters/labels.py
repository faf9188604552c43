"""Settings of a score head: what its outputs mean, and how they become probabilities.

    label       one of C labels: softmax over C outputs
    labels      any of C labels: a sigmoid for each output, compared with the label's threshold
    regression  one output, a number
    rerank      one output, a sigmoid: how well a document fits a query

Imports no torch, because settings and manifests name these types.
Shapes: N rows, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from veneer.files.strict_json import StoredModel

if TYPE_CHECKING:  # the help of commands reads this file
    import numpy as np
    from numpy.typing import NDArray

HeadKind = Literal["label", "labels", "regression", "rerank"]
THRESHOLD = 0.5
"""Probability from which one of several labels is chosen, unless a threshold is set."""
MOST_LABELS = 100_000


@dataclass(frozen=True)
class HeadSettings:
    """Says what the outputs of a score head mean.

    labels      name of each output; empty for regression and rerank, which have one output
    thresholds  label -> probability from which it is chosen, of several labels
    """

    kind: HeadKind
    labels: tuple[str, ...] = ()
    thresholds: tuple[tuple[str, float], ...] = ()

    @property
    def num_outputs(self) -> int:
        return len(self.labels) if self.names_outputs else 1

    @property
    def names_outputs(self) -> bool:
        """Whether its outputs are labels with names."""
        return self.kind in ("label", "labels")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Returns a name of each output, as transformers would show it."""
        return self.labels or tuple(f"LABEL_{number}" for number in range(self.num_outputs))

    def threshold(self, label: str) -> float:
        return dict(self.thresholds).get(label, THRESHOLD)


class StoredHead(StoredModel):
    """The settings of a score head in a file."""

    kind: HeadKind
    """One label, several labels, a number, or how well a document fits a query."""
    labels: list[str] = Field(default_factory=list)
    """Name of each output, in order; empty for one output."""
    thresholds: dict[str, float] = Field(default_factory=dict)
    """Probability from which one of several labels is chosen, where it is not 0.5."""

    @classmethod
    def of(cls, head: HeadSettings) -> StoredHead:
        return cls(kind=head.kind, labels=list(head.labels), thresholds=dict(head.thresholds))

    @property
    def settings(self) -> HeadSettings:
        return HeadSettings(self.kind, tuple(self.labels), tuple(sorted(self.thresholds.items())))


def probabilities(kind: HeadKind, outputs_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the probability of each output, (N, C); of regression the outputs themselves."""
    import numpy as np

    if kind == "regression":
        return outputs_NC
    if kind == "label":
        powers = np.exp(outputs_NC - outputs_NC.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)
    halves: NDArray[np.float64] = 0.5 * (1 + np.tanh(0.5 * outputs_NC))  # never overflows
    return halves
