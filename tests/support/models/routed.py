"""A model with its paths and routing as one value, and the loss of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from veneer.adapters.placement.acting import Acting, Applied, in_turn
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import Batch
from veneer.models.step import ComputePaths, RoutedModel, predictions


@dataclass(frozen=True)
class Routed:
    """Holds a model that was loaded without a base."""

    model: PreTrainedModel
    paths: ComputePaths
    routing: Routing = field(default_factory=Routing)


def batch_loss(base: RoutedModel, batch: Batch, *, total: float) -> Tensor:
    """Returns the summed cross-entropy (nats) of the trained tokens, divided by `total`."""
    return predictions(base, batch).cross_entropy(total)


def acting_on(batch: Batch, adapters: Sequence[Applied]) -> Acting:
    """Returns what acts on a batch: the given adapters on each group's rows, the last on filler."""
    filler = batch.ids.numel() - sum(batch.group_rows)
    return in_turn(list(zip(batch.group_rows, adapters, strict=True))).padded(filler)
