"""Runs the project's own training step on tensors without storage, to count its memory and work.

    build the base -> attach the method -> flat values, gradient, moments -> forward -> loss ->
        backward -> update

All of it is the code that trains (adapters/attach.py, models/step.py, training/optimizer/buffer.py,
models/checkpointing.py), so it cannot differ from the run. Deep models of equal layers are run at
three small depths; every figure then grows by the same amount per layer, which is checked, and the
answer is exact for the whole depth. Otherwise the whole depth is run. Knows nothing of devices:
estimate.py adds what an allocator, a kernel or the process takes.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from veneer.adapters.attach import attach
from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.acting import TokenKeys
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.reads import weights_read_past
from veneer.adapters.placement.routing import Routing
from veneer.adapters.placement.score_head import ScoreHead
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.bases.loading.from_config import build
from veneer.errors import ConfigError
from veneer.execution.attention import decoder
from veneer.execution.facts.decoder_layer import decoder_layers
from veneer.execution.proofs.model import structure
from veneer.execution.train_step import fused, replacements
from veneer.formats.adapter import adapter_file_bytes
from veneer.formats.peft.tensors import tensor_file_bytes
from veneer.kernels.bindings.library import planning, take_counts
from veneer.kernels.layout import round_up
from veneer.models.checkpointing import checkpointed
from veneer.models.left_out import reached_weights
from veneer.models.own_head import head_width
from veneer.models.state_scans import assume_scans
from veneer.models.step import (
    ComputePaths,
    assume_paths,
    keep_paths,
    predictions,
    refuse_untrainable,
)
from veneer.plan.simulation.depth import first_layers, grown_phase, grown_work, period_of
from veneer.plan.simulation.planned_offload import PlannedOffload
from veneer.plan.simulation.step_counts import (
    ACTIVATIONS,
    BACKWARD,
    GRADIENTS,
    LOGITS,
    MOMENTS,
    VALUES,
    WEIGHTS,
    BaseBytes,
    DryRun,
    Step,
)
from veneer.plan.simulation.taught import SimulatedModel, build_teacher, step_loss, student_batch
from veneer.plan.simulation.tracker import META, MetaMode, Parts, Tracker, Work, without_values
from veneer.plan.simulation.weights import base_bytes
from veneer.private.torch import storage_key
from veneer.training.config import OptimizerName
from veneer.training.optimizer.buffer import FlatParameters

COMPILED = (0, 0, 0)
"""Shape under which products in compiled functions are counted; no library product has it."""


@dataclass(frozen=True)
class AttachedFacts:
    """Holds facts of a base with a method that depend neither on rows nor on checkpointing.

    period: length of the repeating pattern of layers, None without one. Other fields are DryRun's.
    """

    depth: int
    period: int | None
    experts: int
    paths: ComputePaths
    static: Parts
    base: BaseBytes
    trainable_parameters: int
    total_parameters: int
    file_bytes: int
    modules_adapted: int | None
    modules_total: int | None


@dataclass(frozen=True)
class BaseFacts:
    """Facts of the base that do not depend on the method; the fields are those of AttachedFacts."""

    depth: int
    paths: ComputePaths
    base: BaseBytes


def attached_facts(
    step: Step, base_facts: dict[torch.dtype, BaseFacts] | None = None
) -> AttachedFacts:
    """Finds the facts of a config, dtype, method, optimizer and device at full depth.

    base_facts: facts of the base by type, found for other methods; used, and extended. Raises
    ConfigError if the method's settings do not fit the base.
    """
    with planning("cpu" if step.on_cpu else "cuda"):
        model = build(step.config, step.dtype)
        experts = _num_experts(step.config)
        if (facts := None if base_facts is None else base_facts.get(step.dtype)) is None:
            facts = _base_facts(step, model, experts)
            if base_facts is not None:
                base_facts[step.dtype] = facts
        keep_paths(model, facts.paths)
        with META, MetaMode(experts=experts):
            attachment, parameters = _install(model, step, Routing(), facts.paths)
        period = period_of(model, parameters)
        static = _static(model, parameters, step.optimizer)
        return AttachedFacts(
            facts.depth,
            period,
            experts,
            facts.paths,
            static,
            facts.base,
            trainable_parameters=sum(p.numel() for p in parameters.values()),
            total_parameters=sum(p.numel() for p in model.parameters()),
            file_bytes=_file_bytes(model, attachment),
            modules_adapted=None if attachment is None else attachment.adapted,
            modules_total=None if attachment is None else attachment.adaptable,
        )


def _base_facts(step: Step, model: PreTrainedModel, experts: int) -> BaseFacts:
    depth = len(decoder_layers(model) or ())
    held = base_bytes(model, on_cpu=step.on_cpu)
    return BaseFacts(depth, _paths(step, model, depth, experts), held)


def dry_run(step: Step, facts: AttachedFacts | None = None) -> DryRun:
    """Counts one step. facts: attached_facts(step) of a step with the same base, method and
    optimizer.

    Raises ConfigError if the method's settings do not fit the base.
    """
    facts = facts or attached_facts(step)
    with planning("cpu" if step.on_cpu else "cuda"):
        run: DryRun | None = None
        if facts.period is not None and facts.depth > 4 * facts.period:
            run = _extrapolated(step, facts.depth, facts.period, facts.experts, facts.paths)
        if run is None:
            run = _run(step, build(step.config, step.dtype), facts.experts, paths=facts.paths)
    counted = ("trainable_parameters", "total_parameters", "modules_adapted", "modules_total")
    figures = {name: getattr(facts, name) for name in (*counted, "base", "file_bytes")}
    return replace(run, static=dict(facts.static), **figures)


def _paths(step: Step, model: PreTrainedModel, depth: int, experts: int) -> ComputePaths:
    """Returns the paths of `model`, needed before attaching: some methods require packed attention.

    Only a few layers of a deep model of equal layers are examined: their structure decides.
    """
    period = period_of(model, {})
    examined = model
    if period is not None and depth > 4 * period:
        examined = first_layers(step.config, step.dtype, 2 * period)
    structure(examined)  # runs a small copy, which does not count
    with MetaMode(experts=experts):
        paths = assume_paths(examined)
    with META, MetaMode(experts=experts):
        return replace(paths, read_past=weights_read_past(model, like=examined))


def _install(
    model: PreTrainedModel, step: Step, routing: Routing, paths: ComputePaths
) -> tuple[Attachment | None, dict[str, nn.Parameter]]:
    """Attaches what trains, as in training/prepare.py."""
    refuse_untrainable(model, paths)
    score: ScoreHead | None = None
    if step.head is not None:
        device = next(model.parameters()).device
        score = ScoreHead.fresh(step.head, hidden_size=head_width(model), device=device)
    if step.method.trains_base:
        trained_head = Attachment("planned", step.method, score=score)
        if score is not None:
            routing.enter(model, "planned", trained_head)
            routing.active = (("planned", 1.0),)
        return None, {**reached_weights(model, paths.left_out), **trained_head.parameters()}
    assert isinstance(step.method, AdapterConfig)
    head, new_tokens = model.get_output_embeddings(), None
    if step.new_tokens:
        vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
        new_tokens = AddedTokens((), tuple(range(vocabulary, vocabulary + step.new_tokens)))
    attachment = attach(
        model,
        step.method,
        name="planned",
        routing=routing,
        head=head,
        tokens=new_tokens,
        score=score,
        values_follow=next(model.parameters()).is_meta,  # there are none
        read_past=paths.read_past,
        idle=paths.idle,
    )
    routing.active = (("planned", 1.0),)
    return attachment, attachment.parameters()


def _run(
    step: Step,
    model: PreTrainedModel,
    experts: int,
    device: torch.device = META,
    paths: ComputePaths | None = None,
) -> DryRun:
    """Runs one step of `model` at its depth; on a device other than meta, counts real tensors."""
    tracker, routing = Tracker(experts=experts, device=device), Routing()
    if step.on_cpu:
        assume_scans(model)
    with tracker.phase("load", label=WEIGHTS):
        for tensor in [*model.parameters(), *model.buffers()]:
            tracker.hold(tensor)
    if paths is None:
        structure(model)
        with tracker:
            paths = assume_paths(model)
    else:
        keep_paths(model, paths)
    with device, MetaMode(experts=experts) if device == META else nullcontext():
        _, parameters = _install(model, step, routing, paths)
        student = SimulatedModel(model, paths, routing)
        teacher = student if step.teacher is None else build_teacher(step.teacher)
    fused_modules = replacements(model)  # by the paths that the adapter's wrappers leave
    with tracker:
        tracker.enter("prepare", label=VALUES)
        for parameter in parameters.values():
            tracker.hold(parameter)
        flat = FlatParameters(parameters)
        tracker.relabel(flat.gradient, GRADIENTS)
        tracker.enter("prepare", label=MOMENTS)
        # Either optimizer allocates its moments when it is made and nothing else, ever.
        moments = torch.empty(
            moment_bytes(flat.values.numel(), step.optimizer), dtype=torch.uint8, device=device
        )
        batch = student_batch(step, packed=paths.packed, device=device)
        read = teacher.batch(step, device)
        weights = (*model.parameters(), *model.buffers(), flat.values)
        offload = PlannedOffload(weights) if step.offload else None
        with (
            ExitStack() as hooks,
            fused(model, fused_modules),
            teacher.fused(),
            checkpointed(model, routing, on=step.checkpointing),
        ):
            tracker.enter("forward", label=ACTIVATIONS)
            tracker.work = Work()
            take_counts()
            with without_values(type(teacher.model).__name__):
                taught = None if read is None else teacher.predict(read)
            hook = (decoder(model) or model).register_forward_hook(
                lambda *_: tracker.enter("loss", label=LOGITS)
            )
            hooks.callback(hook.remove)
            with routing.drawing(TokenKeys(batch.dropout_rows, 0)):
                with _offloading(offload), without_values(type(model).__name__):
                    own = predictions(student, batch)
                    loss = step_loss(own, taught)
                forward_shapes = len(tracker.work.of_libraries)
                tracker.enter("backward", label=BACKWARD)
                loss.backward()
            counts = take_counts()
            tracker.work.products[COMPILED] += counts.flops
            tracker.work.replayed_layers = counts.replayed_layers
            tracker.work.host_bytes = 0 if offload is None else offload.moved_bytes
        tracker.enter("update", label="other")
        flat.publish()
        tracker.enter("done", label="other")
        del moments
    steps = [
        phase for phase in tracker.phases if phase.name in ("forward", "loss", "backward", "update")
    ]
    return DryRun(
        static={},
        phases=steps,
        work=tracker.work,
        trainable_parameters=0,
        total_parameters=0,
        file_bytes=0,
        modules_adapted=None,
        modules_total=None,
        computed_tokens=batch.computed_tokens + (0 if read is None else read.computed_tokens),
        packed=paths.packed,
        experts=experts,
        expert_rows=round_up(tracker.expert_rows),
        forward_shapes=forward_shapes,
    )


def _offloading(offload: PlannedOffload | None) -> AbstractContextManager[Any]:
    if offload is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(offload.pack, offload.unpack)


def moment_bytes(values: int, optimizer: OptimizerName) -> int:
    """Counts AdamW's moments: 8 bytes a value; in 8 bits 2, and two float32 scales per 256."""
    in_8_bits = optimizer == "adamw8bit" and values >= 4096
    return 2 * values + 8 * -(-values // 256) if in_8_bits else 8 * values


def _static(
    model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: OptimizerName
) -> Parts:
    """Returns permanent bytes by label, laid out as FlatParameters and FlatAdamW do."""
    weights = sum(_storages(model).values())
    flat = FlatParameters(parameters)
    # float32 values moved into the flat buffer: the storage they had before is gone.
    buffer = storage_key(flat.values)
    remaining = sum(size for key, size in _storages(model).items() if key != buffer)
    size = flat.values.untyped_storage().nbytes()
    moments = moment_bytes(flat.values.numel(), optimizer)
    return {WEIGHTS: min(remaining, weights), VALUES: size, GRADIENTS: size, MOMENTS: moments}


def _storages(model: nn.Module) -> dict[int, int]:
    """Returns the bytes of each storage of parameters and buffers, by its key."""
    tensors = (*model.parameters(), *model.buffers())
    return {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


class _StayOnMeta(TorchFunctionMode):
    """Skips Tensor.cpu() for tensors without storage: a file's size needs only shape and type."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return (
            args[0]
            if func is torch.Tensor.cpu and args[0].is_meta
            else func(*args, **(kwargs or {}))
        )


def _file_bytes(model: PreTrainedModel, attachment: Attachment | None) -> int:
    if attachment is not None:
        with _StayOnMeta():
            return adapter_file_bytes(attachment, model)
    tensors = {id(t): (name, t) for name, t in reversed(model.state_dict(keep_vars=True).items())}
    return tensor_file_bytes(dict(tensors.values()))


def _num_experts(config: PreTrainedConfig) -> int:
    text = config.get_text_config()
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if isinstance(value := getattr(text, name, None), int) and value > 0:
            return value
    return 1


def _extrapolated(
    step: Step, depth: int, period: int, experts: int, paths: ComputePaths | None = None
) -> DryRun | None:
    """Extrapolates from three small depths, None unless figures grow by equal amounts."""
    first = depth % period + period * (1 if depth % period else 2)
    runs = []
    for shallow_depth in (first, first + period, first + 2 * period):
        # The settings may name a layer that a shallow model lacks: then the whole depth is run.
        with suppress(ConfigError):
            shallow = first_layers(step.config, step.dtype, shallow_depth)
            runs.append(_run(step, shallow, experts, paths=paths))
    if len(runs) < 3:
        return None
    one, two, three = runs
    steps = (depth - first) // period
    grown = [
        grown_phase(a, b, c, steps)
        for a, b, c in zip(one.phases, two.phases, three.phases, strict=True)
    ]
    end_bytes = [run.phases[0].end_bytes for run in runs]
    linear = end_bytes[2] - end_bytes[1] == end_bytes[1] - end_bytes[0]
    # The most that anything grows by: a moment that grew by less could be overtaken deeper down.
    for phase_one, phase_two in zip(one.phases[:3], two.phases[:3], strict=True):
        linear &= phase_two.peak_bytes - phase_one.peak_bytes >= end_bytes[1] - end_bytes[0]
    phases = [phase for phase in grown if phase is not None]
    if not linear or len(phases) < len(grown):
        return None
    one.phases, one.work = phases, grown_work(one.work, two.work, steps)
    return one
