"""Rows of a plan: what a choice needs, how long it takes, and what would make it fit, as plain
data.

Units: bytes, seconds, tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

from veneer.adapters.config import METHODS
from veneer.bases.compute import DtypeName
from veneer.plan.choice import Choice
from veneer.plan.estimate import Estimate
from veneer.plan.fit import (
    LeastMemory,
    Remedy,
    find_remedy,
    fits,
    largest_batch,
    largest_length,
    nearest,
)
from veneer.plan.machine import Machine
from veneer.plan.planner import Planner
from veneer.plan.simulation.step_counts import DryRun
from veneer.plan.spread import StepTime, StepTraffic
from veneer.training.config import SHORT_FORMS


@dataclass(frozen=True)
class PlanRow:
    """Holds the plan of one choice. base: as named. dtype: type of the base's weights.

    estimate: of the largest micro-batch. run: the dry run of the usual one. time: of a step, by
    part. sent: by each process in a step. link: bytes a second between processes. fits: None
    without a known memory. largest_batch: rows of `choice.length` at once, 0 if the choice does not
    fit. largest_length: tokens that fit, of a single row that is too long. remedy: None if it fits
    or nothing helps. nearest: the least memory, if nothing helps.
    """

    base: str
    choice: Choice
    dtype: DtypeName
    estimate: Estimate
    run: DryRun
    flops_per_token: float
    time: StepTime
    sent: StepTraffic
    link: float | None
    tokens_per_step: int
    steps: int | None
    price_per_hour: float | None
    fits: bool | None = None
    largest_batch: int | None = None
    largest_length: int | None = None
    remedy: Remedy | None = None
    nearest: LeastMemory | None = None

    @property
    def step_seconds(self) -> float:
        return self.time.seconds

    @property
    def efficiency(self) -> float | None:
        """Returns the efficiency of several processes, if their link is known."""
        return self.time.efficiency if self.choice.processes > 1 and self.link is not None else None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def run_seconds(self) -> float | None:
        return None if self.steps is None else self.steps * self.step_seconds

    @property
    def cost(self) -> float | None:
        if self.price_per_hour is None or self.run_seconds is None:
            return None
        return self.price_per_hour * self.run_seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        choice, estimate, run, remedy = self.choice, self.estimate, self.run, self.remedy
        return {
            "base": self.base,
            "method": choice.label,
            "settings": choice.method.model_dump(mode="json"),
            "quantize": choice.quantize,
            "dtype": self.dtype,
            "batch": choice.batch,
            "micro_batch": choice.micro_batch,
            "length": choice.length,
            "checkpointing": choice.checkpointing,
            "shard": choice.shard,
            "reduce": choice.reduce,
            "new_tokens": choice.new_tokens,
            "processes": choice.processes,
            "peak_memory_bytes": estimate.peak_bytes,
            "needed_memory_bytes": estimate.needed_bytes,
            "peak_phase": estimate.phase,
            "parts": estimate.parts,
            "phases": estimate.phases,
            "trainable_parameters": run.trainable_parameters,
            "total_parameters": run.total_parameters,
            "file_bytes": run.file_bytes,
            "flops_per_token": self.flops_per_token,
            "step_seconds": self.step_seconds,
            "step_parts": vars(self.time),
            "sent_bytes_per_step": {"gradient": self.sent.gradient, "layers": self.sent.layers},
            "link_bytes_per_second": self.link,
            "efficiency": self.efficiency,
            "tokens_per_second": self.tokens_per_second,
            "steps": self.steps,
            "run_seconds": self.run_seconds,
            "cost": self.cost,
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "largest_length": self.largest_length,
            "changes": None if remedy is None else [change.setting for change in remedy.changes],
            "changed_needed_memory_bytes": None if remedy is None else remedy.needed_bytes,
            "changed_time_ratio": None if remedy is None else remedy.time_ratio,
            "least_needed_memory_bytes": None
            if self.nearest is None
            else self.nearest.needed_bytes,
        }


def plan_row(
    planner: Planner,
    choice: Choice,
    machine: Machine,
    *,
    memory_bytes: int | None = None,
    search: bool = True,
    price_per_hour: float | None = None,
) -> PlanRow:
    """Plans one choice. search: also find the largest batch, or the changes that make it fit."""
    usual_rows = planner.workload.epoch(choice).usual
    run = planner.step_run(choice)
    tokens = sum(len(row.ids) for row in usual_rows)
    row = PlanRow(
        base=planner.blueprint.source,
        choice=choice,
        dtype=planner.compute(choice).name,
        estimate=planner.estimate(choice),
        run=run,
        flops_per_token=run.work.flops / tokens,
        time=planner.step_time(choice, machine),
        sent=planner.sent(choice),
        link=machine.link,
        tokens_per_step=tokens * choice.batch // choice.rows_at_once,
        steps=planner.workload.total_steps(choice),
        price_per_hour=price_per_hour,
    )
    if memory_bytes is None:
        return row
    does_fit = fits(planner, choice, memory_bytes)
    row = replace(row, fits=does_fit)
    if not search:
        return row
    if does_fit:
        return replace(row, largest_batch=largest_batch(planner, choice, memory_bytes))
    remedy = find_remedy(
        planner, choice, memory_bytes, lambda c: planner.step_time(c, machine).seconds
    )
    single = choice.rows_at_once == 1
    return replace(
        row,
        largest_batch=0,
        largest_length=largest_length(planner, choice, memory_bytes) if single else None,
        remedy=remedy,
        nearest=nearest(planner, choice) if remedy is None else None,
    )


def all_methods(choice: Choice) -> list[Choice]:
    """Returns every method at its defaults, with the other settings of `choice`, LoRA over 4 bits
    included.

    Full fine-tuning has no new tokens.
    """
    choices = []
    for name, config_class in METHODS.items():
        method = choice.method if choice.method.name == name else config_class(name=name)
        allowed = replace(choice, new_tokens=0) if method.trains_base else choice
        choices.append(replace(allowed, method=method, quantize=None))
        choices += [
            replace(choice, method=method, quantize=quantize)
            for method_name, quantize in SHORT_FORMS.values()
            if method_name == name
        ]
    return sorted(choices, key=lambda c: c.method.trains_base)
