"""Which rows may share a forward: those that fit its budget and are computed in the same way."""

from collections.abc import Sequence

from veneer.execution.train_step import fits_one_node
from veneer.training.inputs import ForwardInputs


class ForwardRoom:
    """The room of one forward, which micro-batches of several adapters may share.

    budget     most tokens, unless a single micro-batch has more; None: no limit
    one_node   whether decoder layers are computed as one node. That takes adapters that allow it on
               all rows, so adapters that do not allow it have forwards of their own
    lengths    tokens of each example in the forward
    """

    def __init__(self, budget: int | None, *, one_node: bool) -> None:
        self.budget, self.one_node = budget, one_node
        self.lengths: list[int] = []
        self._fits_one_node = False

    def admit(self, forward: ForwardInputs, lengths: Sequence[int]) -> bool:
        """Adds examples of these lengths. Returns False if they may not be computed with those in
        here."""
        all_lengths = [*self.lengths, *lengths]
        fits = self.one_node and all(fits_one_node(adapter) for adapter, _ in forward.adapters)
        if self.lengths:
            if self.budget is not None and sum(all_lengths) > self.budget:
                return False
            if fits is not self._fits_one_node:
                return False
            if len(forward.paths.groups_of_lengths(all_lengths)) != 1:
                return False
        self.lengths, self._fits_one_node = all_lengths, fits
        return True
