"""What the loop needs of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from veneer.adapters.placement.routing import Routing
from veneer.data.batching import Rows
from veneer.data.examples import Example
from veneer.data.load import SetSize
from veneer.data.longest import largest_micro_batches, plans_of_run
from veneer.data.mixture import Mixture
from veneer.models.step import ComputePaths, parts_of
from veneer.training.config import RunConfig
from veneer.training.optimizer.buffer import FlatValues
from veneer.training.output.sample import Sample


@dataclass
class TrainingInputs:
    """learning_rate: peak; evaluate_every and save_every: steps."""

    model: PreTrainedModel
    paths: ComputePaths
    routing: Routing
    flat: FlatValues
    train: Sequence[Example]
    validation: Sequence[Example]
    config: RunConfig
    learning_rate: float
    steps: int
    out: Path
    sample: Sample | None
    mixture: Mixture | None = None
    together: bool = False
    """All processes compute at the same time, each its micro-batch: they gather the base's layers
    for one another."""
    held: Sequence[SetSize] = ()
    """The sets that validation consists of, one behind the other; none or one: it is not told
    apart."""
    largest: Sequence[Sequence[int]] = ()
    """Numbers of the examples of each micro-batch that is tried before step 1; empty: those of
    find_largest."""

    def find_largest(self) -> list[list[int]]:
        """The micro-batches of all steps that may take the most memory (data/longest.py)."""
        config, rows = self.config, Rows.of(self.train)
        plans = plans_of_run(
            rows,
            batch=config.batch,
            seed=config.seed,
            order=config.order,
            mixture=self.mixture,
            steps=self.steps,
        )
        return largest_micro_batches(
            self.train,
            rows,
            plans,
            micro_batch=config.rows_at_once,
            packed=self.paths.packed,
            share_prompt=config.share_prompt,
            divide=lambda part: parts_of(self.model, self.paths, self.train, [part]),
        )

    @property
    def evaluate_every(self) -> int:
        return self.config.evaluate_every or max(1, math.ceil(self.steps / 5))
