"""Replay: rows on which an adapter stays close to the base, beside any objective.

Each step takes some rows of a set of their own and adds the mean KL(base || adapter) over their
trained tokens, times a weight, to the loss. They are further micro-batches of the step, and the
base is their teacher. Which rows a step takes follows from (seed, step), so a resumed run takes the
same.

No row and no micro-batch has more tokens than the run's longest row, so replay does not raise the
memory of a step.
Source: Shenfeld et al. 2025, arXiv:2509.04259: forgetting follows this KL.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from veneer.adapters.preamble import Preamble
from veneer.data.batching import used_length
from veneer.data.config import DataConfig
from veneer.data.encoder import RowRules
from veneer.data.examples import Example
from veneer.data.files.on_disk import lengths_of
from veneer.data.load import load_data
from veneer.data.mixture import rows_in_cycles
from veneer.errors import DataError
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.objectives.replay import ReplayObjective
from veneer.training.config import RunConfig

_STREAM = 1 << 62
"""Keeps the order of replay rows apart from that of the run's own rows."""


@dataclass(frozen=True)
class Replay:
    """Holds the replay rows of a run.

    count         rows of a step
    rows_at_once  most rows of a micro-batch
    most_tokens   most tokens of a micro-batch of several rows
    fingerprint   of the rows' tokens
    """

    examples: Sequence[Example]
    objective: ReplayObjective
    count: int
    rows_at_once: int
    most_tokens: int
    seed: int
    fingerprint: str

    def micro_batches(self, step: int) -> list[list[int]]:
        """Returns the micro-batches of a step, as numbers of examples."""
        parts: list[list[int]] = []
        tokens = 0
        for number in self._of_step(step):
            length = used_length(self.examples[number])
            fits = parts and len(parts[-1]) < self.rows_at_once
            if fits and tokens + length <= self.most_tokens:
                parts[-1].append(number)
                tokens += length
            else:
                parts.append([number])
                tokens = length
        return parts

    def _of_step(self, step: int) -> list[int]:
        """Returns the rows of a step: every row is taken once before one is taken again."""
        start = step * self.count
        rows = rows_in_cycles(
            len(self.examples), start, start + self.count, seed=self.seed, stream=_STREAM
        )
        numbers: list[int] = rows.tolist()
        return numbers


def load_replay(
    config: RunConfig, base: FrozenBase, own: Sequence[Example], today: date
) -> Replay | None:
    """Loads the replay rows of a run, None if it has none. Raises DataError.

    own: the run's examples without those that a teacher reads, whose forward needs less memory
    """
    settings = config.replay
    if settings.rows is None:
        return None
    longest = int(lengths_of(own).max())
    rows = load_data(
        DataConfig(train=settings.rows, validation_share=0.0, long_rows="cut"),
        RowRules(longest, capacity_of(base), Preamble(variables=config.template.variables)),
        base.tokenizer,
        today=today,
        purpose="replayed",
    )
    if not rows.train:
        raise DataError(f"{settings.rows} holds no row to replay")
    return Replay(
        rows.train,
        ReplayObjective(settings.weight),
        settings.batch,
        config.rows_at_once,
        longest,
        config.seed,
        rows.fingerprint,
    )
