"""The held-out rows of a run: computed set by set, so that each has a loss of its own beside that of all."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from transformers import PreTrainedModel

from veneer.data.batching import by_length
from veneer.data.examples import Example
from veneer.data.load import SetSize
from veneer.models.step import Paths, parts_of

Part = list[int]
"""Numbers of examples that are computed together."""


def parts_by_set(
    model: PreTrainedModel, paths: Paths, examples: Sequence[Example], sets: Sequence[SetSize], rows_at_once: int
) -> list[list[Part]]:
    """The parts of each set, which lie one behind the other; of all of them where there are not several."""
    return [
        list(
            parts_of(
                model,
                paths,
                examples,
                [[start + i for i in part] for part in by_length(examples[start:stop], rows_at_once)],
            )
        )
        for start, stop in _spans(examples, sets)
    ]


def mean_loss(examples: Sequence[Example], nats: Sequence[float]) -> float | None:
    """Nats per trained token, of those of all parts; None where nothing is held out."""
    return sum(nats) / sum(int(example.trained.sum()) for example in examples) if examples else None


def losses_by_set(
    examples: Sequence[Example], sets: Sequence[SetSize], planned: Sequence[Sequence[Part]], nats: Sequence[float]
) -> dict[str, float]:
    """Nats per trained token of each of several sets, from those of all parts in order."""
    if len(sets) < 2:
        return {}
    found, given = {}, iter(nats)
    for each, parts, (start, stop) in zip(sets, planned, _spans(examples, sets), strict=True):
        of_set = sum(next(given) for _ in parts)
        if tokens := sum(int(example.trained.sum()) for example in examples[start:stop]):
            found[each.name] = of_set / tokens
    return found


def _spans(examples: Sequence[Example], sets: Sequence[SetSize]) -> list[tuple[int, int]]:
    ends = list(accumulate(each.examples for each in sets)) if len(sets) > 1 else [len(examples)]
    return list(pairwise([0, *ends]))
