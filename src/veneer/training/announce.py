"""The start record of a run: what trains, by which paths, and the memory that it should need.

It is written to metrics.jsonl and shown before step 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from veneer.bases.identity.weight_table import packed_sizes, weight_line
from veneer.data.examples import Example
from veneer.data.load import DataSet
from veneer.errors import ConfigError, VeneerError
from veneer.execution.facts.decoder_layer import unknown_layers
from veneer.execution.train_step import replacements
from veneer.formats.adapter import adapter_file_bytes
from veneer.linear import num_parameters
from veneer.models.own_head import head_line
from veneer.objectives.config import TeacherBase
from veneer.quant.weight import PackedSize
from veneer.training.budget import JobMemory
from veneer.training.config import RunConfig
from veneer.training.coordination import shard_lines
from veneer.training.output.screen import Screen
from veneer.training.prepare import PreparedRun
from veneer.training.processes.world import World
from veneer.wording import percent, size

UNPLANNED = (RuntimeError, NotImplementedError, TypeError)
"""Errors of a model whose code looks at values, which a plan does not have."""


@dataclass(frozen=True)
class RunForecast:
    """Predicts, for each process, its memory and the bytes it sends in a step.

    largest: index of the micro-batch that needs the most memory, of those that may be the largest.
    gradient, layers: bytes sent in a step, for the gradient and for sharded layers.
    """

    memory: JobMemory
    largest: int
    gradient: int
    layers: int


class RunPlanner(Protocol):
    """Forecasts a run on this data (plan/probe.py), from the base's config and dtype, and the bytes
    of a teacher's base that is not loaded yet."""

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
        packed: tuple[PackedSize, ...],
    ) -> RunForecast: ...

    def teacher_bytes(self, teacher: TeacherBase, device: str) -> int: ...


def forecast_run(
    run: PreparedRun, planner: RunPlanner | None, screen: Screen, world: World
) -> RunForecast | None:
    """Forecasts a run; returns None without a planner, and for a model that cannot be planned."""
    if planner is None:
        return None
    try:
        return planner(
            run.config,
            run.base.model.config,
            run.base.dtype,
            run.data,
            largest=[[run.inputs.longest_train[i] for i in part] for part in run.inputs.largest],
            idle_bytes=run.idle_bytes,
            device=str(run.base.device),
            processes=world.size,
            packed=packed_sizes(run.base.model),
        )
    except ConfigError as fault:  # the model's code looks at values; it can train all the same
        screen.message(f"no plan of its memory: {fault.headline}")
    except UNPLANNED as fault:
        screen.message(f"no plan of its memory: {type(fault).__name__}: {str(fault)[:80]}")
    return None


def teacher_bytes(planner: RunPlanner, teacher: TeacherBase, device: str) -> int:
    """Counts the bytes of a teacher's base; returns 0 for a base that cannot be read or planned,
    whose job fails or has no forecast."""
    try:
        return planner.teacher_bytes(teacher, device)
    except (VeneerError, *UNPLANNED):
        return 0


def start_record(
    run: PreparedRun, forecast: RunForecast | None, world: World, *, planned: int | None
) -> dict[str, Any]:
    """Returns the start record, with `paths`: lines that say how steps are computed.

    planned: bytes of the peak, of all runs in this process
    """
    base, data, attachment = run.base, run.data, run.attachment
    return {
        "kind": "start",
        "base": run.config.base,
        "method": run.config.method.name,
        "objective": run.config.objective.name,
        "optimizer": run.config.optimizer,
        "trainable_parameters": sum(p.numel() for p in run.inputs.flat.parameters.values()),
        "total_parameters": num_parameters(base.model),
        "modules_adapted": None if attachment is None else attachment.adapted,
        "modules_total": None if attachment is None else attachment.adaptable,
        "adapter_bytes": None if attachment is None else adapter_file_bytes(attachment, base.model),
        "train_rows": data.report.rows,
        "validation_rows": data.report.validation_rows,
        "steps": run.inputs.steps,
        "starts_from": None if run.adapter is None else run.adapter.starts_from,
        "idle_memory_bytes": run.idle_bytes,
        "paths": [
            *_base_lines(run),
            *_data_lines(data),
            *_objective_lines(run),
            *_adapter_lines(run),
            *_process_lines(run, forecast, world),
        ],
        "planned_memory_bytes": planned,
        **run.inputs.objective.row_facts,
    }


def _base_lines(run: PreparedRun) -> list[str]:
    base, paths = run.base, run.base.paths
    lines = [] if base.compute.line is None else [base.compute.line]
    lines += paths.lines
    lines += [] if run.adapter is None else run.adapter.lines
    if run.adapter is None and (head := run.config.objective.head) is not None:
        lines.append(head_line(head))
    if base.quantize is not None:
        lines.append(weight_line(base.model))
    if run.config.share_prompt and paths.packed:
        lines.append("the prompt that a batch's rows share is computed once")
    return lines


def _data_lines(data: DataSet) -> list[str]:
    lines = []
    if data.train and data.train[-1].kind == "teacher":
        lines.append(f"a teacher reads {data.report.rows:,} rows too, behind its own prompt")
    elif (examples := len(data.train)) > data.report.rows:
        compared = data.train[0].kind != "answer"
        lines.append(
            f"{examples:,} answers of {data.report.rows:,} rows"
            if compared
            else f"{examples:,} examples of {data.report.rows:,} rows: earlier answers as they were"
            " answered"
        )
    if data.mixture is not None:
        draws = data.mixture.draws
        shares = [
            f"{rows.name} {draw:,.0f} of {rows.rows:,} rows ({percent(draw, sum(draws))})"
            for rows, draw in zip(data.sets, draws, strict=True)
        ]
        lines.append(f"an epoch takes {', '.join(shares)}")
    if data.in_files is not None:
        lines.append(data.in_files)
    return lines


def _objective_lines(run: PreparedRun) -> list[str]:
    line = run.inputs.teacher.line
    lines = [] if line is None else [line]
    own_answers = run.config.objective.own_answers_config
    if own_answers is None:
        return lines
    return [
        *lines,
        f"{percent(own_answers.share, 1)} of a step's rows are learned on answers that the adapter"
        f" writes itself, {own_answers.tokens} tokens at most",
    ]


def _adapter_lines(run: PreparedRun) -> list[str]:
    if run.attachment is None or run.attachment.score is not None:
        return []
    if run.attachment.config.folds:
        return [f"{run.config.method.name} can be merged into the base"]
    return [f"{run.config.method.name} cannot be merged: it stays beside the base"]


def _process_lines(run: PreparedRun, forecast: RunForecast | None, world: World) -> list[str]:
    lines = []
    if fused_modules := len(replacements(run.base.model)):
        lines.append(f"{fused_modules} modules fused")
    lines += unknown_layers(run.base.model)
    if world.size > 1:
        lines.append(f"{world.size} processes, each with micro-batches of its own")
        lines += shard_lines(run.base, run.inputs.flat)
        if forecast is not None:
            lines.append(forecast_line(forecast))
    elif run.config.shard:
        lines.append("shard: one process holds the whole base")
    return lines


def forecast_line(forecast: RunForecast) -> str:
    layers = f" and {size(forecast.layers)} of layers" if forecast.layers else ""
    return (
        f"planned: each holds {size(forecast.memory.peak)} and sends {size(forecast.gradient)} of"
        f" gradient{layers} a step"
    )
