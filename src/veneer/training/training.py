"""One run, from its settings to its folder: base, data, method, loop, adapter, summary.

run.yaml  metrics.jsonl  checkpoints/  adapter/ (full fine-tuning: model/)  summary.json
          report.html
"""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.preamble import Preamble
from veneer.bases.identity.weight_table import packed_sizes, weight_line
from veneer.bases.quiet_transformers import quiet
from veneer.data.batching import Rows
from veneer.data.checks.check import refuse_beyond
from veneer.data.examples import Example
from veneer.data.files.writing import Record
from veneer.data.large import training_data
from veneer.data.load import DataSet
from veneer.data.template.new_tokens import bring, extended, room_with
from veneer.errors import ConfigError, fits_memory
from veneer.execution.train_step import fused, replacements, unknown_layers
from veneer.files.atomic import atomic_file, atomic_folder
from veneer.files.strict_json import json_text
from veneer.formats.adapter import adapter_file_bytes, manifest_for, write_adapter
from veneer.formats.manifest import Manifest, readable
from veneer.linear import num_parameters
from veneer.models.capacity import capacity_of
from veneer.models.checkpointing import checkpointed
from veneer.models.frozen_base import FrozenBase, hidden_size
from veneer.models.initial_values import FreshAdapter
from veneer.models.step import ComputePaths, refuse_untrainable
from veneer.quant.weight import PackedSize
from veneer.training.config import EPOCHS_UNSAID, RunConfig
from veneer.training.job import TrainingInputs
from veneer.training.loop import FEWER_VALUES, Loop
from veneer.training.optimizer.buffer import FlatParameters, FlatValues
from veneer.training.optimizer.heap import steady_heap
from veneer.training.output.loggers import open_loggers
from veneer.training.output.records import (
    NoRecords,
    Records,
    peak_memory_bytes,
    process_memory_bytes,
    reset_peak_memory,
)
from veneer.training.output.sample import sample_of
from veneer.training.output.screen import Screen
from veneer.training.processes.world import ALONE, World
from veneer.training.state.folder import given_rows, resume_point, settled, sweep, write_run_file
from veneer.training.state.origin import (
    HELD_OUT_BY,
    Origin,
    check_base,
    check_borders,
    check_masks,
    check_rows,
    check_settings,
    origin_of,
    with_rows_at_once,
)
from veneer.training.state.parents import begin_adapter, with_tokens
from veneer.training.state.place import held, refuse_unless_new
from veneer.training.state.progress import load_state
from veneer.training.together import agree, every_weight, in_parts, load_together, shard_lines
from veneer.wording import percent, size


@dataclass(frozen=True)
class RunForecast:
    """Of each process, bytes: what it should hold at most; what it sends in a step, of the gradient
    and of layers.

    largest: which of the micro-batches that may be the largest takes the most memory
    """

    peak: int
    largest: int
    gradient: int = 0
    layers: int = 0


class RunPlanner(Protocol):
    """What a run on this data should need (plan/probe.py). The config and the dtype are the
    base's."""

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


def run_training(
    config: RunConfig,
    *,
    resume: bool,
    screen: Screen,
    plan: RunPlanner | None = None,
    world: World = ALONE,
    rows: Mapping[str, Iterable[Record]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run to the end and return what summary.json holds. Every VeneerError leaves the last
    checkpoint whole.

    rows: files of rows to write into the folder first. world: the processes that compute it
    together, all with the same settings. The leader alone touches the folder.
    """
    out = Path(config.out)
    point, then = None, None
    with ExitStack() as stack:
        with world.together("at its folder"):
            if world.leads:
                if not resume:
                    refuse_unless_new(out)  # before a lock is put among somebody's files
                stack.enter_context(held(out))
                if not resume:
                    refuse_unless_new(out)
                sweep(out)
                stack.enter_context(given_rows(out, rows))
                point = resume_point(out, screen.message) if resume else None
                then = None if point is None else load_state(point).origin
        told = world.shared([point and str(point), then and then.to_dict()])
        point, then = told[0] and Path(told[0]), told[1] and Origin(**told[1])
        if then is not None:
            config = with_rows_at_once(then, config)
        return _run(in_parts(config, world, screen), out, point, then, screen, plan, world)


def _run(
    config: RunConfig,
    out: Path,
    resume_from: Path | None,
    then: Origin | None,
    screen: Screen,
    plan: RunPlanner | None,
    world: World,
) -> dict[str, Any]:
    if then is not None:
        check_settings(then, config)
        check_masks(then, config)
    known = then is not None and then.settings is not None
    if then is not None and not known:
        screen.message(
            "an earlier version began this run and kept no fingerprint of its base: it is not"
            " compared"
        )
    idle = process_memory_bytes()
    # That version trained in the stored type, whatever is faster here.
    stored = then is not None and not known and config.dtype == "auto"
    base = load_together(config, "stored" if stored else config.dtype, world)
    config = config.model_copy(update={"dtype": base.compute.name})
    reset_peak_memory(str(base.device))
    # A chat template may write the date: a resumed run keeps the day it started on.
    day = date.fromisoformat(world.shared(date.today().isoformat() if then is None else then.date))
    held_out_by = HELD_OUT_BY if then is None else then.held_out_by
    with ExitStack() as stack:
        with world.together("before its first step"):
            if then is not None:
                check_base(then, origin_of(config, base, day), config)
            config = with_tokens(config) if then is None else config
            tokens = bring(base.tokenizer, config.new_tokens, rows=capacity_of(base).tokens)
            data = training_data(
                config.data,
                length=config.length,
                capacity=room_with(capacity_of(base), tokens),
                tokenizer=extended(base.tokenizer, config.new_tokens),
                today=day,
                preamble=Preamble(variables=config.template.variables),
                held_out_by=held_out_by,
                resumes=then is not None,
                say=screen.message,
            )
            config = config.model_copy(
                update={"length": data.report.length}
            )  # never more than the model's positions
            if then is not None:
                check_rows(then, data.fingerprint, config)
                check_borders(then, data.train, config)
            paths = base.paths
            refuse_untrainable(base.model, paths)
            begun = None
            if not config.method.trains_base:
                config, begun = begin_adapter(
                    base, config, data.train, tokens=tokens, resumes=then is not None
                )
            refuse_beyond(
                "held-out rows do not fit",
                data.validation,
                capacity_of(base),
                base.acting_tokenizer,
            )
            attachment = None if begun is None else begun.attachment
            made = replace(origin_of(config, base, day), data=data.fingerprint)
            origin = then if then and known else replace(made, held_out_by=held_out_by)
            _manifest(config, base, data, None)
            one_pass = replacements(base.model)
            with fits_memory("on the trained values and their gradient", next_step=FEWER_VALUES):
                if attachment is None:
                    flat = every_weight(base, world)
                else:
                    flat = FlatParameters(
                        attachment.parameters(), attachment.learning_rate_factors()
                    )
            job = _job(config, base, data, paths, flat)
            if world.leads and not known:  # else it is what the run started with
                write_run_file(settled(config))
            records = _records(config, out, resume_from, screen) if world.leads else NoRecords()
            stack.enter_context(records)
        if world.size > 1:
            agree(world, base, data, flat)
        start = _start_record(config, base, data, paths, begun, flat, job, idle)
        job.largest = job.find_largest()
        planned = (
            _planned(plan, config, base, data, job, idle, screen, world) if world.leads else None
        )
        if (largest := world.shared(None if planned is None else planned.largest)) is not None:
            job.largest = [job.largest[largest]]
        start["planned_memory_bytes"] = None if planned is None else planned.peak
        if one_pass:
            start["paths"].append(f"{len(one_pass)} modules fused")
        start["paths"] += unknown_layers(base.model)
        if world.size > 1:
            start["paths"].append(f"{world.size} processes, each with micro-batches of its own")
            start["paths"] += [
                *shard_lines(base, flat),
                *([] if planned is None else [_each(planned)]),
            ]
        elif config.shard:
            start["paths"].append("shard: one process holds the whole base")
        if resume_from is None:
            records.write({k: v for k, v in start.items() if k != "paths"})
        screen.start(start)
        loop = Loop(job, records, screen, origin=origin, resume_from=resume_from, world=world)
        heap = (
            steady_heap(0 if planned is None else planned.peak)
            if base.device.type == "cpu"
            else nullcontext()
        )
        with (
            heap,
            fused(base.model, one_pass),
            checkpointed(base.model, base.routing, on=config.checkpointing),
        ):
            reason = loop.run()
        loop.release()
        summary = _summary(config, base, start, loop, reason)
        with world.together("on writing its result"):
            if world.leads:
                summary |= _write_result(out, config, base, data, attachment, loop)
        records.write({"kind": "end", "reason": reason, "step": loop.progress.step})
    summary["failed_loggers"] = records.failed
    if world.leads:
        with atomic_file(out / "summary.json", replace=True) as partial:
            partial.write_text(json_text(summary), encoding="utf-8")
    return summary


def _records(config: RunConfig, out: Path, resume_from: Path | None, screen: Screen) -> Records:
    step = None if resume_from is None else int(resume_from.name)
    listeners = open_loggers(config.log, out=out, settings=config.model_dump(mode="json"))
    return Records(
        out / "metrics.jsonl", resumed_step=step, listeners=listeners, say=screen.message
    )


def _planned(
    plan: RunPlanner | None,
    config: RunConfig,
    base: FrozenBase,
    data: DataSet,
    job: TrainingInputs,
    idle: int,
    screen: Screen,
    world: World,
) -> RunForecast | None:
    if plan is None:
        return None
    try:
        return plan(
            config,
            base.model.config,
            base.dtype,
            data,
            largest=[[data.train[i] for i in part] for part in job.largest],
            idle_bytes=idle,
            device=str(base.device),
            processes=world.size,
            packed=packed_sizes(base.model),
        )
    except ConfigError as fault:  # a model that looks at values: it trains all the same
        screen.message(f"no plan of its memory: {fault.headline}")
    except (RuntimeError, NotImplementedError, TypeError) as fault:
        screen.message(f"no plan of its memory: {type(fault).__name__}: {str(fault)[:80]}")
    return None


def _each(planned: RunForecast) -> str:
    layers = f" and {size(planned.layers)} of layers" if planned.layers else ""
    return (
        f"planned: each holds {size(planned.peak)} and sends {size(planned.gradient)} of"
        f" gradient{layers} a step"
    )


def _job(
    config: RunConfig, base: FrozenBase, data: DataSet, paths: ComputePaths, flat: FlatValues
) -> TrainingInputs:
    rows = len(Rows.of(data.train).lengths)
    per_epoch = -(
        -(rows if data.mixture is None else len(data.mixture.rows(config.seed, 0))) // config.batch
    )
    epochs = EPOCHS_UNSAID if config.epochs is None else config.epochs
    shows = config.show_answers and base.tokenizer.chat_template is not None
    return TrainingInputs(
        model=base.model,
        paths=paths,
        routing=base.routing,
        flat=flat,
        train=data.train,
        validation=data.validation,
        config=config,
        learning_rate=config.peak_learning_rate(hidden_size(base.config)),
        steps=config.steps or max(1, math.ceil(epochs * per_epoch)),
        out=Path(config.out),
        sample=sample_of(base, data.validation_rows, data.preamble) if shows else None,
        mixture=data.mixture,
        together=base.shards is not None,
        held=data.held,
    )


def _start_record(
    config: RunConfig,
    base: FrozenBase,
    data: DataSet,
    paths: ComputePaths,
    begun: FreshAdapter | None,
    flat: FlatValues,
    job: TrainingInputs,
    idle: int,
) -> dict[str, Any]:
    trained = sum(p.numel() for p in flat.parameters.values())
    total = num_parameters(base.model)
    attachment = None if begun is None else begun.attachment
    lines = [] if base.compute.line is None else [base.compute.line]
    lines += [*paths.lines, *([] if begun is None else begun.lines)]
    if base.quantize is not None:
        lines.append(weight_line(base.model))
    if config.share_prompt and paths.packed:
        lines.append("the prompt that a batch's rows share is computed once")
    if (examples := len(data.train)) > data.report.rows:
        lines.append(
            f"{examples:,} examples of {data.report.rows:,} rows: earlier answers as they were"
            " answered"
        )
    if data.mixture is not None:
        lines.append(_mixed_line(data))
    if data.in_files is not None:
        lines.append(data.in_files)
    if attachment is not None:
        does = (
            "can be merged into the base"
            if attachment.config.folds
            else "cannot be merged: it stays beside the base"
        )
        lines.append(f"{config.method.name} {does}")
    return {
        "kind": "start",
        "base": config.base,
        "method": config.method.name,
        "optimizer": config.optimizer,
        "trainable_parameters": trained,
        "total_parameters": total,
        "modules_adapted": None if attachment is None else attachment.adapted,
        "modules_total": None if attachment is None else attachment.adaptable,
        "adapter_bytes": None if attachment is None else adapter_file_bytes(attachment, base.model),
        "train_rows": data.report.rows,
        "validation_rows": data.report.validation_rows,
        "steps": job.steps,
        "starts_from": None if begun is None else begun.starts_from,
        "idle_memory_bytes": idle,
        "paths": lines,
    }


def _mixed_line(data: DataSet) -> str:
    assert data.mixture is not None
    total = sum(data.mixture.draws)
    parts = [
        f"{each.name} {draw:,.0f} of {each.rows:,} rows ({percent(draw, total)})"
        for each, draw in zip(data.sets, data.mixture.draws, strict=True)
    ]
    return f"an epoch takes {', '.join(parts)}"


def _manifest(config: RunConfig, base: FrozenBase, data: DataSet, loop: Loop | None) -> Manifest:
    """What veneer.json will say, and before step 1 (without a loop) could: what cannot be written
    must not show after the last one."""
    best = None if loop is None else loop.progress.best_loss
    return readable(
        lambda: manifest_for(
            base,
            method=config.method.name,
            data_fingerprint=data.fingerprint,
            recipe=config.model_dump(mode="json"),
            preamble=data.preamble,
            parents=[(each.content or "", each.weight) for each in config.from_adapter],
            template_hash=base.template_hash(),
            metrics={} if best is None else {"validation_loss": best},
            held_out=None if loop is None else loop.held_out(),
        )
    )


def _write_result(
    out: Path,
    config: RunConfig,
    base: FrozenBase,
    data: DataSet,
    attachment: Attachment | None,
    loop: Loop,
) -> dict[str, Any]:
    """The adapter, or the model folder; what summary.json says of it."""
    if attachment is not None:
        manifest = _manifest(config, base, data, loop)
        written = write_adapter(
            out / "adapter", attachment, manifest, model=base.model, replace=True
        )
        return {
            "adapter": str(written.path),
            "adapter_bytes": written.bytes,
            "adapter_sha256": written.sha256,
        }
    with atomic_folder(out / "model", replace=True) as partial:
        with quiet():
            base.model.save_pretrained(partial)
        base.tokenizer.save_pretrained(partial)
    total = sum(f.stat().st_size for f in (out / "model").iterdir())
    return {"model": str(out / "model"), "adapter_bytes": total}


def _summary(
    config: RunConfig, base: FrozenBase, start: dict[str, Any], loop: Loop, reason: str
) -> dict[str, Any]:
    at = loop.progress
    seconds = at.timed_seconds
    return {
        "reason": reason,
        "steps": at.step,
        "seconds": seconds,
        "total_seconds": at.total_seconds,
        "seconds_by_part": at.timed_parts or None,
        "examples_per_second": at.timed_examples / seconds if seconds else None,
        "tokens_per_second": at.timed_tokens / seconds if seconds else None,
        "trained_tokens": at.trained_tokens,
        "peak_memory_bytes": peak_memory_bytes(str(base.device)),
        "idle_memory_bytes": start["idle_memory_bytes"],
        "planned_memory_bytes": start["planned_memory_bytes"],
        "trainable_parameters": start["trainable_parameters"],
        "total_parameters": start["total_parameters"],
        "first_loss": at.first_loss,
        "last_loss": at.last_loss,
        "validation_loss": at.best_loss,
        "held_out": None if (found := loop.held_out()) is None else found.model_dump(mode="json"),
        "best_step": at.best_step,
        "damaged_best": loop.damaged_best,
        "base_fingerprint": base.fingerprint().digest,
        "method": config.method.name,
        "base": config.base,
        "versions": {
            "veneer": version("veneer"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
    }
