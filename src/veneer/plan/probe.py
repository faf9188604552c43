"""Forecasts of a run on its real rows: before every run, and to make a run fit a memory.

Units: bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from veneer.bases.compute import NAMES
from veneer.bases.loading.blueprint import Blueprint
from veneer.bases.loading.from_config import blueprint
from veneer.data.examples import Example
from veneer.data.load import DataSet
from veneer.errors import DoesNotFitError
from veneer.objectives.config import TeacherBase
from veneer.plan.choice import Choice
from veneer.plan.estimate import Device
from veneer.plan.fit import find_remedy, nearest
from veneer.plan.joint import job_memory
from veneer.plan.machine import doubt_rates
from veneer.plan.planner import Planner
from veneer.plan.simulation.teacher_weights import PlannedTeachers
from veneer.plan.workload import Workload
from veneer.quant.weight import PackedSize
from veneer.training.announce import RunForecast
from veneer.training.config import RunConfig
from veneer.training.output.records import process_memory_bytes
from veneer.wording import size


def fit_config(
    config: RunConfig, data: DataSet, memory_bytes: int, processes: int = 1
) -> tuple[RunConfig, list[str]]:
    """Returns the settings changed to fit into the memory, and a line for each change.

    Raises DoesNotFitError if nothing helps. Times are compared by FLOP, which suffices to order
    changes.
    """
    on_cuda = config.device == "auto" and torch.cuda.is_available()
    planner = Planner(
        blueprint(config.base),
        Workload.of(config, data),
        device="cuda" if on_cuda else _planned_device(config.device),
        idle_bytes=process_memory_bytes(),
    )
    choice = Choice.of(config, processes)
    needed = planner.estimate(choice).needed_bytes
    if needed <= memory_bytes:
        return config, [f"fits as it is: {size(needed)} of {size(memory_bytes)}"]

    def flops(changed: Choice) -> float:
        return planner.step_run(changed).work.flops * changed.batch / changed.rows_at_once

    remedy = find_remedy(planner, choice, memory_bytes, flops)
    if remedy is None:
        raise DoesNotFitError(
            f"{config.base} with {choice.label} needs {size(needed)}, {size(memory_bytes)} are"
            " there, and no change suffices",
            [f"it still needs {nearest(planner, choice)}"],
            next_step="Take a smaller base: veneer plan --models A,B shows what fits.",
        )
    values = config.model_dump() | {
        "method": remedy.choice.method.model_dump(),
        "quantize": remedy.choice.quantize,
        "dtype": remedy.choice.dtype,
        "micro_batch": remedy.choice.micro_batch,
        "length": remedy.choice.length,
        "checkpointing": remedy.choice.checkpointing,
        "offload": remedy.choice.offload,
        "shard": remedy.choice.shard,
    }
    lines = [f"{change.setting}: {change.says}" for change in remedy.changes]
    lines.append(
        f"needs {size(remedy.needed_bytes)} instead of {size(needed)}; {remedy.time_ratio:.2f}"
        " times the arithmetic"
    )
    return RunConfig.model_validate(values), lines


class Forecast:
    """Forecasts runs for training/run.py, and learns from them how fast this machine is."""

    def __init__(self) -> None:
        self._counted: dict[str, tuple[float, torch.dtype, str]] = {}

    def __call__(
        self,
        config: RunConfig,
        model_config: PreTrainedConfig,
        dtype: torch.dtype,
        data: DataSet,
        *,
        largest: Sequence[Sequence[Example]],
        idle_bytes: int,
        device: str,
        processes: int,
        packed: tuple[PackedSize, ...] = (),
    ) -> RunForecast:
        """Forecasts a run.

        largest: micro-batches of the run that may be the largest; empty: those of the rows.
        idle_bytes: memory before the base was loaded. packed: packed weights of the base.
        """
        planner = Planner(
            Blueprint(config.base, model_config, dtype, packed=packed),
            Workload.of(config, data, largest),
            device=_planned_device(device),
            idle_bytes=idle_bytes,
        )
        choice = replace(Choice.of(config, processes), dtype=NAMES[dtype])
        index, estimate = planner.largest_estimate(choice)
        tokens = sum(len(row.ids) for row in planner.largest(choice)[index])
        if processes == 1 and tokens:
            self._counted[config.out] = estimate.run.work.flops / tokens, dtype, device
        traffic = planner.sent(choice)
        memory = job_memory(estimate, config.objective.teacher_base)
        return RunForecast(memory, index, traffic.gradient, traffic.layers)

    def compare(self, out: str, summary: Mapping[str, Any]) -> None:
        """Compares the rates that plans use with the speed of the run in folder `out`."""
        flops_per_token, dtype, device = self._counted.pop(out, (0.0, torch.float32, "cpu"))
        doubt_rates(flops_per_token * (summary["tokens_per_second"] or 0.0), dtype, device)

    def teacher_bytes(self, teacher: TeacherBase, device: str) -> int:
        """Counts the bytes of a teacher's weights, before they are loaded."""
        weights = PlannedTeachers(_planned_device(device)).weights(teacher)
        return weights.total - weights.packing[0]


forecast = Forecast()


def _planned_device(device: str) -> Device:
    return "cuda" if device.startswith("cuda") else "cpu"
