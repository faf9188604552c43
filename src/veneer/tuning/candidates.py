"""The settings that `veneer tune` tries: the plan's advice, and a short list around it.

batch 2 and 8  x  half the advised learning rate, the advised one, twice the advised one
batch 2 and 8  x  four times the advised rank, at the advised learning rate
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
RATE_FACTORS = (1.0, 0.5, 2.0)
RANK_FACTOR = 4
EVALUATIONS = 6
"""Evaluations of a run to its end, besides those at rungs."""
PATIENCE = 3
MOST_WARMUP = 0.03


@dataclass(frozen=True)
class Candidate:
    learning_rate: float
    rank: int
    batch: int

    @property
    def name(self) -> str:
        return f"rate-{self.learning_rate:g}_rank-{self.rank}_batch-{self.batch}"

    def __str__(self) -> str:
        return f"learning rate {self.learning_rate:g}, rank {self.rank}, batch {self.batch}"


@dataclass(frozen=True)
class AdvisedSettings:
    """Holds the plan's advice for these rows and this machine.

    objective   the objective of all runs
    method      always LoRA
    """

    objective: AnyObjective
    method: LoRA
    learning_rate: float
    quantize: Quantize | None
    reasons: Sequence[str]


def candidates(advised: AdvisedSettings) -> list[Candidate]:
    """Returns the list, the advice itself first."""

    def rounded(factor: float) -> float:
        return float(f"{factor * advised.learning_rate:.2g}")

    rank = advised.method.rank
    points = [(factor, rank) for factor in RATE_FACTORS] + [(1.0, RANK_FACTOR * rank)]
    return [
        Candidate(rounded(factor), point_rank, batch)
        for factor, point_rank in points
        for batch in reversed(BATCHES)
    ]


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
        "method": method.model_copy(update={"rank": candidate.rank, "alpha": alpha}),
        "quantize": advised.quantize,
        "learning_rate": candidate.learning_rate,
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
