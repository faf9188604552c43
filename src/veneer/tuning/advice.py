"""What the plan advises for a set of rows, and what the runs of `veneer tune` will need."""

from dataclasses import dataclass

from pydantic import TypeAdapter

from veneer.adapters.config import LoRA
from veneer.data.load import DataSet
from veneer.errors import ConfigError, DoesNotFitError
from veneer.evaluation.preferences import are_preferences
from veneer.files.memory import memory
from veneer.objectives.config import OBJECTIVES, AnyObjective
from veneer.plan.ask import PlanQuestion, answer_question
from veneer.plan.choice import Choice
from veneer.plan.workload import Workload
from veneer.training.config import RunConfig
from veneer.tuning.candidates import AdvisedSettings, candidates
from veneer.wording import size

ALPHA_OF_RANK = 2
VALUE_BYTES = 16
"""Bytes of a trained value with its gradient and moments."""


OBJECTIVE_NAMES = tuple(
    name
    for name, objective in OBJECTIVES.items()
    if objective.measures and not objective.has_teacher
)
"""Objectives that the command can search and judge, without further settings."""


def choose_objective(name: str | None, data: DataSet) -> AnyObjective:
    """Returns the objective of this name with its defaults; by default the one of the rows. Raises
    ConfigError for an objective that cannot be judged here."""
    if name is None:
        name = "dpo" if are_preferences(data.train) else "answers"
    if name not in OBJECTIVE_NAMES:
        raise ConfigError(
            f"tune has no objective {name}",
            [f"objectives: {', '.join(OBJECTIVE_NAMES)}"],
            "For other objectives: veneer train, then veneer evaluate.",
        )
    objective: AnyObjective = TypeAdapter(AnyObjective).validate_python({"name": name})
    return objective


@dataclass(frozen=True)
class Outlook:
    """The advice, and the memory that all candidates need. free: None if unknown"""

    advised: AdvisedSettings
    memory_bytes: int
    free: int | None

    @property
    def memory_line(self) -> str:
        free = "" if self.free is None else f", {size(self.free)} free"
        return f"about {size(self.memory_bytes)} (plan){free}"


def ask_plan(base: str, data: DataSet, objective: AnyObjective) -> Outlook:
    """Asks the plan for a start. Raises DoesNotFitError if LoRA does not fit on this machine."""
    config = RunConfig.of({"base": base, "data": "rows", "out": "planned", "objective": objective})
    question = PlanQuestion([base], Choice.of(config), Workload.of(config, data), kind="task")
    answer = answer_question(question)
    assert answer.advice is not None
    advice, reasons = answer.advice, list(answer.advice.reasons)
    if not advice.fits:
        raise DoesNotFitError(
            f"{base} does not fit into the memory of this machine, even in 4 bits",
            next_step=f"See what would fit: veneer plan --base {base} --compare",
        )
    rank = advice.choice.method.update_rank
    if rank is None:
        reasons.append(f"The search is over settings of LoRA, not of {advice.choice.method.name}.")
        rank = LoRA().rank
    method = LoRA(rank=rank, alpha=ALPHA_OF_RANK * rank)
    rate = method.rate_by_width(base_width(base)) * objective.share_of_rate
    advised = AdvisedSettings(objective, method, rate, advice.choice.quantize, reasons)
    row = answer.rows[0]
    planned_rank = row.choice.method.update_rank or rank
    values = row.run.trainable_parameters / planned_rank
    more_ranks = sum(candidate.rank for candidate in candidates(advised)) - planned_rank
    needed = row.estimate.peak_bytes + round(VALUE_BYTES * values * max(more_ranks, 0))
    return Outlook(advised, needed, memory().get("MemAvailable"))


def base_width(base: str) -> int:
    """Returns the hidden size of a base, from its config alone."""
    from veneer.bases.loading.without_weights import load_skeleton
    from veneer.models.frozen_base import hidden_size

    return hidden_size(load_skeleton(base).model.config)
