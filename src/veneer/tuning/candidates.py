"""The settings that `veneer tune` tries: the plan's advice, and a short list around it.

batch 2 and 8  x  the advised rank, and one learning rate by the base's width
batch 2 and 8  x  four times the advised rank
batch 2 and 8  x  that rate, and B at four times A's (LoRA+), falling linearly
batch 2 and 8  x  a quarter of that rate, and B at four times A's, falling linearly

Each of the last two learnt more than LoRA with one rate on one base (docs/recipes.md). Which of
them suits a base is not known before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapters.config import LoRA
from veneer.objectives.config import AnyObjective
from veneer.quant.config import Quantize
from veneer.training.config import RunConfig
from veneer.tuning.parts import PartFiles

BATCHES = (2, 8)
RANK_FACTOR = 4
RATIO = 4.0
"""LoRA+: the learning rate of B divided by that of A."""
RATE_FACTORS = (1.0, 0.25)
"""A's rate of settings with this ratio, as a multiple of the one by width."""
EVALUATIONS = 6
"""Evaluations of a run to its end, besides those at rungs."""
PATIENCE = 3
MOST_WARMUP = 0.03


@dataclass(frozen=True)
class Candidate:
    learning_rate: float
    lr_ratio: float
    rank: int
    batch: int

    @property
    def name(self) -> str:
        ratio = "" if self.lr_ratio == 1.0 else f"_ratio-{self.lr_ratio:g}"
        return f"rate-{self.learning_rate:g}{ratio}_rank-{self.rank}_batch-{self.batch}"

    @property
    def schedule(self) -> str:
        return "cosine" if self.lr_ratio == 1.0 else "linear"

    def __str__(self) -> str:
        ratio = "" if self.lr_ratio == 1.0 else f"LoRA+ ratio {self.lr_ratio:g}, "
        return f"learning rate {self.learning_rate:g}, {ratio}rank {self.rank}, batch {self.batch}"


@dataclass(frozen=True)
class AdvisedSettings:
    """Holds the plan's advice for these rows and this machine.

    objective      the objective of all runs
    method         always LoRA
    learning_rate  the one of A and B, by the base's width
    """

    objective: AnyObjective
    method: LoRA
    learning_rate: float
    quantize: Quantize | None
    reasons: Sequence[str]


def candidates(advised: AdvisedSettings) -> list[Candidate]:
    """Returns the list, the advice itself first."""

    rate, rank = advised.learning_rate, advised.method.rank
    points = [(rate, 1.0, rank), (rate, 1.0, RANK_FACTOR * rank)]
    points += [(float(f"{factor * rate:.2g}"), RATIO, rank) for factor in RATE_FACTORS]
    return [Candidate(*point, batch) for point in points for batch in reversed(BATCHES)]


def run_config(
    candidate: Candidate,
    advised: AdvisedSettings,
    *,
    base: str,
    files: PartFiles,
    out: Path,
    steps: int,
    seed: int,
    warmup: float = MOST_WARMUP,
) -> RunConfig:
    """Returns the settings of a candidate's run, in a folder of its own below `out`."""
    method = advised.method
    alpha = method.alpha * candidate.rank / method.rank
    fields: Mapping[str, Any] = {
        "base": base,
        "data": {"train": str(files.train), "validation": str(files.search)},
        "objective": advised.objective,
        "method": method.model_copy(
            update={"rank": candidate.rank, "alpha": alpha, "lr_ratio": candidate.lr_ratio}
        ),
        "quantize": advised.quantize,
        "learning_rate": candidate.learning_rate,
        "schedule": candidate.schedule,
        "batch": candidate.batch,
        "steps": steps,
        "warmup": warmup,
        "evaluate_every": max(1, steps // EVALUATIONS),
        "patience": PATIENCE,
        "keep": 1,
        "show_answers": False,
        "seed": seed,
        "out": str(out / candidate.name),
    }
    return RunConfig.of(fields)
