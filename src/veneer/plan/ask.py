"""Answers one question about a run's cost, for `veneer plan` and the library's `plan`.

A PlanQuestion says what to plan. Its PlanAnswer holds rows of plain data, notes on where the
figures come from, and advice if requested. Only a config is downloaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from veneer.bases.loading.blueprint import Blueprint, named_size
from veneer.data.batching import shared_prompt
from veneer.errors import ConfigError
from veneer.plan.advise import Advice, TaskKind, TuningTask, advise
from veneer.plan.choice import Choice
from veneer.plan.estimate import Device
from veneer.plan.fit import fits
from veneer.plan.machine import Machine, named_gpu, this_machine
from veneer.plan.planner import Planner
from veneer.plan.simulation.remembered import remember_idle_bytes
from veneer.plan.spread import HOP_SECONDS
from veneer.plan.table import PlanRow, all_methods, plan_row
from veneer.plan.workload import Workload
from veneer.wording import percent

MOST_TOKENS = 2**22
"""Most tokens of a planned micro-batch: its rows are made, and no machine runs a larger one."""


@dataclass(frozen=True)
class PlanQuestion:
    """Says what to plan. bases: one, or several for a matrix. gpu: a GPU's name; None: this
    machine.

    memory: bytes; None: the machine's. link: bytes a second between processes; None: sending takes
    no time in the plan.
    """

    bases: Sequence[str]
    choice: Choice
    workload: Workload = field(default_factory=Workload)
    compare: bool = False
    memory: int | None = None
    gpu: str | None = None
    link: float | None = None
    price_per_hour: float | None = None
    kind: TaskKind | None = None
    variants: int = 1
    merge: bool = False


@dataclass(frozen=True)
class PlanAnswer:
    machine: Machine
    memory: int
    rows: list[PlanRow]
    notes: list[str]
    faults: list[str] = field(default_factory=list)
    """Methods that do not fit a base, and why."""
    advice: Advice | None = None

    def to_dict(self) -> dict[str, Any]:
        advice = self.advice
        return {
            "machine": self.machine.name,
            "memory_bytes": self.memory,
            "plans": [row.to_dict() for row in self.rows],
            "notes": self.notes,
            "faults": self.faults,
            "advice": (
                None
                if advice is None
                else {
                    "method": advice.choice.label,
                    "settings": advice.choice.method.model_dump(mode="json"),
                    "quantize": advice.choice.quantize,
                    "learning_rate": advice.learning_rate,
                    "reasons": advice.reasons,
                    "fits": advice.fits,
                }
            ),
        }


def answer_question(
    question: PlanQuestion,
    tell: Callable[[int, int], None] = lambda done, total: None,
    *,
    idle_bytes: int | None = None,
) -> PlanAnswer:
    """Answers a question. tell: receives (plans made, plans to make) if there are several.
    idle_bytes: memory of the process before the base is loaded; None: as measured before.

    Raises SourceError for a base that is not found, ConfigError if nothing fits a base.
    """
    choice = question.choice
    if (tokens := choice.rows_at_once * choice.length) > MOST_TOKENS:
        raise ConfigError(
            f"{choice.rows_at_once:,} rows of {choice.length:,} tokens at once are not planned:"
            f" {tokens:,} tokens, at most {MOST_TOKENS:,}",
            next_step="Give a smaller --micro-batch, --batch or --length.",
        )
    blueprints = [named_size(base) or _blueprint_of(base) for base in question.bases]
    idle_bytes = idle_bytes_of(question) if idle_bytes is None else idle_bytes
    planners = [_planner(blueprint, question, idle_bytes) for blueprint in blueprints]
    choices = (
        all_methods(question.choice) if question.compare or len(planners) > 1 else [question.choice]
    )
    machine = _machine(planners[0], choices[0], question)
    memory = question.memory or machine.memory_bytes
    rows: list[PlanRow] = []
    faults: list[str] = []
    for planner in planners:
        max_length = planner.facts.positions
        for requested in choices:
            if (total := len(planners) * len(choices)) > 1:
                tell(len(rows) + len(faults), total)
            choice = replace(
                requested, length=min(requested.length, max_length or requested.length)
            )  # as in a run
            try:
                rows.append(
                    plan_row(
                        planner,
                        choice,
                        machine,
                        memory_bytes=memory or None,
                        search=len(planners) == 1,
                        price_per_hour=question.price_per_hour,
                    )
                )
            except ConfigError as fault:
                faults.append(f"{planner.blueprint.source}, {choice.label}: {fault.headline}")
    if not rows:
        raise ConfigError("nothing of this can be planned", faults)
    return PlanAnswer(
        machine,
        memory,
        rows,
        _notes(machine, planners[0], question),
        faults,
        _advice(planners[0], rows, question, memory),
    )


def _blueprint_of(base: str) -> Blueprint:
    """Reads the base's config, by way of transformers."""
    from veneer.bases.loading.from_config import blueprint

    return blueprint(base)


def idle_bytes_of(question: PlanQuestion) -> int:
    """Returns the memory of a process before the base is loaded; 0 on a GPU, where it does not
    count, so that training is not imported to measure it."""
    return remember_idle_bytes() if _device(question) == "cpu" else 0


def _device(question: PlanQuestion) -> Device:
    return "cpu" if question.gpu is None and not torch.cuda.is_available() else "cuda"


def _planner(blueprint: Blueprint, question: PlanQuestion, idle_bytes: int) -> Planner:
    device = _device(question)
    return Planner(blueprint, question.workload, device=device, idle_bytes=idle_bytes)


def _machine(planner: Planner, choice: Choice, question: PlanQuestion) -> Machine:
    if question.gpu is not None:
        return replace(named_gpu(question.gpu), link=question.link)
    usual_step = planner.step_run(choice)
    machine = this_machine(
        usual_step.work, planner.dtype(choice), "cuda" if planner.device == "cuda" else "cpu"
    )
    return replace(machine, link=question.link)


def _advice(
    planner: Planner, rows: Sequence[PlanRow], question: PlanQuestion, memory: int
) -> Advice | None:
    if question.kind is None:
        return None
    from veneer.models.frozen_base import hidden_size

    examples = list(question.workload.rows)
    task = TuningTask(
        kind=question.kind,
        rows=question.workload.num_rows or None,
        tokens=sum(len(example.ids) for example in examples) or None,
        variants=question.variants,
        merge=question.merge,
        parameters=rows[0].run.total_parameters,
        hidden_size=hidden_size(planner.blueprint.config),
        fixed_instruction=len(examples) > 1
        and shared_prompt(examples) >= 32
        and question.variants == 1,
    )
    plain_choice = replace(question.choice, quantize=None)
    return advise(
        task, plain_choice, lambda choice: planner.takes(choice) and fits(planner, choice, memory)
    )


def _load_words(machine: Machine) -> str:
    if not machine.is_busy:
        return ""
    return (
        f" while other programs were at work: {percent(machine.got, 1.0)} of the processors were"
        " left, and a run alone is faster. They are measured again by the next plan"
    )


def _notes(machine: Machine, planner: Planner, question: PlanQuestion) -> list[str]:
    rows = (
        "the largest and the median batch of the data"
        if planner.workload.rows
        else "rows of one length"
    )
    memory = (
        "Memory: the training step itself, simulated without data, with "
        + rows
        + (
            "; what the process and its allocator add is measured (CPU)."
            if planner.device == "cpu"
            else (
                "; 5% for the allocator and 0.6 GB for the CUDA context are added: general figures,"
                " not measured here."
            )
        )
    )
    time = (
        f"Time: rates of this machine, measured on {machine.measured.isoformat()} at the step's own"
        f" shapes{_load_words(machine)}."
        if machine.measured is not None
        else (
            f"Time: published figures of the {machine.name}, half of its product rate assumed: not"
            " measured."
        )
    )
    line = planner.compute(question.choice).line
    notes = [memory, *([] if line is None else [f"Weights: {line}."]), time]
    if question.choice.processes > 1:
        sends = (
            f"{HOP_SECONDS * 1e6:.0f} µs from one to the next assumed"
            if question.link is not None
            else "what they send takes no time here: --link says how fast it goes"
        )
        notes.append(
            "Processes: memory is each one's, on a machine of its own like this one; computed,"
            f" {sends}."
        )
    return notes
