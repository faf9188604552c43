"""Everything a run needs before its first step: base, rows, adapter, trained values.

A resumed run is compared with what it started with; rows, settings and base must be the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any

from veneer.adapters.placement.acting import Acting, Applied
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.token_rows import AddedTokens
from veneer.adapters.preamble import Preamble
from veneer.bases.compute import HeldAs
from veneer.bases.folder.score_head import classifier_class
from veneer.data.activation import refuse_without_activation
from veneer.data.batching import RowSpans
from veneer.data.checks.check import refuse_beyond
from veneer.data.encoder import RowRules
from veneer.data.examples import Example
from veneer.data.large import training_data
from veneer.data.load import DataSet
from veneer.data.teacher_text import TeacherText
from veneer.data.template.new_tokens import bring, extended, room_with
from veneer.errors import RefusedError, fits_memory
from veneer.execution.proofs.model import acting_prefix_length
from veneer.models.capacity import capacity_of
from veneer.models.frozen_base import FrozenBase
from veneer.models.own_head import attach_head, fresh_head
from veneer.models.starts.initial_values import FreshAdapter
from veneer.models.step import refuse_untrainable
from veneer.objectives.labels import resolved
from veneer.training.config import RunConfig
from veneer.training.coordination import every_weight, load_on_all_processes
from veneer.training.drawn_rows.own_answers import own_answers_of
from veneer.training.drawn_rows.replay import Replay, load_replay
from veneer.training.gradient import FEWER_VALUES
from veneer.training.inputs import Teacher, TrainingInputs
from veneer.training.optimizer.buffer import FlatParameters, FlatValues
from veneer.training.output.records import process_memory_bytes, reset_peak_memory
from veneer.training.output.sample import sample_of
from veneer.training.processes.world import World
from veneer.training.result import run_manifest
from veneer.training.state.origin import (
    HELD_OUT_BY,
    Origin,
    check_base,
    check_borders,
    check_masks,
    check_rows,
    check_settings,
    origin_of,
    with_rate_by_width,
)
from veneer.training.state.parents import ADAPTER_NAME, begin_adapter, with_tokens
from veneer.training.teachers.teacher import locate_teacher, teacher_examples
from veneer.training.teachers.teacher_base import TeacherBases, load_teacher_base, make_teacher


@dataclass(frozen=True)
class PreparedRun:
    """Holds a run that can take its first step.

    config: its settings, with every default resolved. adapter: None for full fine-tuning.
    idle_bytes: memory of the process before its base was loaded.
    """

    config: RunConfig
    base: FrozenBase
    data: DataSet
    adapter: FreshAdapter | None
    inputs: TrainingInputs
    origin: Origin
    idle_bytes: int
    rows_key: object
    """Equal for runs that read the same rows in the same way."""
    rows: DataSet
    """The rows without replay rows, whose tokens count in the fingerprint of `data`."""
    teacher_base: FrozenBase | None = None
    """The teacher's own base; None if it is the student's."""

    def detach(self) -> None:
        """Detaches its adapters from their bases."""
        for name in self.adapter_names:
            self.base.detach(name)
        if self.teacher_base is not None:
            for attachment, _ in self.inputs.teacher.forward.adapters:
                self.teacher_base.detach(attachment.name)

    @property
    def adapter_names(self) -> list[str]:
        """Names of its adapters on the base: the trained one, and the teacher's."""
        applied = self.inputs.adapters
        if self.teacher_base is None:
            applied = (*applied, *self.inputs.teacher.forward.adapters)
        return [attachment.name for attachment, _ in applied]

    @property
    def attachment(self) -> Attachment | None:
        return None if self.adapter is None else self.adapter.attachment


class SharedBase:
    """The base that jobs share once the first of them has loaded it, and the jobs on it now."""

    def __init__(self) -> None:
        self.runs: list[PreparedRun] = []
        self.loaded: tuple[FrozenBase, int] | None = None
        """The base, and the memory of the process before it was loaded."""
        self.num_runs = 0
        """Number of runs so far, which gives each adapter a name of its own."""
        self.first_evaluations: dict[str, Any] = {}
        """Evaluations before step 1, by what they depend on (held_out/first_evaluation.py)."""
        self.teacher_bases: TeacherBases = {}

    def add(self, run: PreparedRun) -> None:
        self.runs.append(run)
        self.loaded = run.base, run.idle_bytes
        self.num_runs += 1

    def remove(self, run: PreparedRun) -> None:
        self.runs = [other for other in self.runs if other is not run]

    def detach_others(self) -> None:
        """Detaches what a run attached that could not be prepared."""
        if self.loaded is not None:
            base, _ = self.loaded
            kept = {name for run in self.runs for name in run.adapter_names}
            for name in [name for name in base.attachments if name not in kept]:
                base.detach(name)


def prepare_run(
    config: RunConfig,
    started: Origin | None,
    *,
    shared: SharedBase | None = None,
    world: World,
    say: Callable[[str], None],
) -> PreparedRun:
    """Loads base and rows, and attaches the adapter. started: what a resumed run started with.

    shared: the base of jobs that train in the same forwards; they share equal rows, too.
    Raises ConfigError, AdapterMismatchError or another VeneerError if the run cannot be computed,
    or would not be the one that was started.
    """
    if started is not None:
        _check_start(started, config, say)
    shared = shared or SharedBase()
    base, idle_bytes = shared.loaded or _load_base(config, started, world)
    teacher_base = load_teacher_base(config, base, world, shared.teacher_bases)
    config = config.model_copy(update={"dtype": base.compute.name})
    base.routing.active = ()
    day = _first_day(started, world)
    with world.fail_together("before its first step"):
        config, stored_teacher = locate_teacher(
            config, None if teacher_base is None else teacher_base.settings
        )
        if started is None:
            config = with_tokens(config)
        else:
            check_base(started, origin_of(config, base, day), config)
            config = with_rate_by_width(config, base.hidden_size)
        new_tokens = bring(base.tokenizer, config.new_tokens, rows=capacity_of(base).tokens)
        teacher_text = config.objective.teacher_text()
        rows_key = (
            *(config.data, config.length, config.new_tokens, config.template, day, started),
            *(config.objective.rows, teacher_text, config.objective.head),
        )
        rows = next((run.rows for run in shared.runs if run.rows_key == rows_key), None)
        if rows is None:
            rows = _load_rows(config, base, new_tokens, teacher_text, day, started, say)
        student_examples = rows.train if teacher_text is None else _student_examples(rows.train)
        data, replay = rows, load_replay(config, base, student_examples, day)
        if replay is not None:
            data = replace(rows, fingerprint=f"{rows.fingerprint} {replay.fingerprint}")
        # Never longer than the model has positions.
        objective = resolved(config.objective, data.head)
        length = data.report.length
        config = config.model_copy(update={"length": length, "objective": objective})
        if started is not None:
            check_rows(started, data.fingerprint, config)
            check_borders(started, data.train, config)
        refuse_untrainable(base.model, base.paths)
        adapter: FreshAdapter | None = None
        applied: Applied = ()
        if config.method.trains_base:
            applied = _head_of_base(base, config)
        else:
            config, adapter = begin_adapter(
                base,
                config,
                teacher_examples(rows.train)
                if config.method.starts_from_teacher
                else student_examples,
                name=f"{ADAPTER_NAME} {shared.num_runs + 1}" if shared.num_runs else ADAPTER_NAME,
                tokens=new_tokens,
                resumes=started is not None,
            )
            applied = ((adapter.attachment, 1.0),)
            student_rows = (e for e in chain(data.train, data.validation) if e.kind != "teacher")
            refuse_without_activation(student_rows, adapter.attachment.invocation)
        refuse_beyond(
            "held-out rows do not fit", data.validation, capacity_of(base), base.acting_tokenizer
        )
        rows_of_epoch = _rows_of_epoch(config, data)
        config = config.resolved(base, rows_of_epoch)
        origin = _origin(config, base, data, day, started)
        run_manifest(config, base, data)  # raises now if it could not be written at the end
        with fits_memory("on the trained values and their gradient", next_step=FEWER_VALUES):
            flat = _trained_values(base, config, applied, world)
        teacher = make_teacher(config, base, teacher_base, stored_teacher, data)
        inputs = _training_inputs(
            config, config.num_steps(rows_of_epoch), base, data, flat, applied, teacher, replay
        )
        teacher_model = base if teacher_base is None else teacher_base.base
        inputs.own_answers = own_answers_of(config, base, data, teacher_model)
        inputs.first_evaluations = shared.first_evaluations
        if config.objective.several:
            _refuse_divided_rows(inputs)
    return PreparedRun(
        config,
        base,
        data,
        adapter,
        inputs,
        origin,
        idle_bytes,
        rows_key,
        rows,
        None if teacher_base is None else teacher_base.base,
    )


def _check_start(started: Origin, config: RunConfig, say: Callable[[str], None]) -> None:
    """Raises ConfigError if a resumed run has other settings than it started with."""
    check_settings(started, config)
    check_masks(started, config)
    if started.settings is None:
        say(
            "an earlier version began this run and kept no fingerprint of its base: it is not"
            " compared"
        )


def _load_base(config: RunConfig, started: Origin | None, world: World) -> tuple[FrozenBase, int]:
    """Loads the base; returns also the memory that the process held before."""
    idle_bytes = process_memory_bytes()
    # Versions without settings in a checkpoint trained in the stored type.
    is_old = started is not None and started.settings is None
    dtype: HeldAs = "stored" if is_old and config.dtype == "auto" else config.dtype
    base = load_on_all_processes(config, dtype, world)
    reset_peak_memory(str(base.device))
    return base, idle_bytes


def _student_examples(examples: Sequence[Example]) -> list[Example]:
    return [example for example in examples if example.kind != "teacher"]


def _first_day(started: Origin | None, world: World) -> date:
    """Returns the day the run started on: a chat template may write the date."""
    day = date.today().isoformat() if started is None else started.date
    return date.fromisoformat(world.broadcast_value(day))


def _load_rows(
    config: RunConfig,
    base: FrozenBase,
    new_tokens: AddedTokens | None,
    teacher: TeacherText | None,
    day: date,
    started: Origin | None,
    say: Callable[[str], None],
) -> DataSet:
    return training_data(
        config.data,
        RowRules(
            config.length,
            room_with(capacity_of(base), new_tokens),
            Preamble(variables=config.template.variables),
            HELD_OUT_BY if started is None else started.held_out_by,
            config.objective.rows,
            teacher,
            config.objective.head,
        ),
        extended(base.tokenizer, config.new_tokens),
        today=day,
        resumes=started is not None,
        say=say,
    )


def _origin(
    config: RunConfig, base: FrozenBase, data: DataSet, day: date, started: Origin | None
) -> Origin:
    """Returns what checkpoints keep of the start: as it was, else as it is now."""
    if started is not None and started.settings is not None:
        return started
    held_out_by = HELD_OUT_BY if started is None else started.held_out_by
    return replace(origin_of(config, base, day), data=data.fingerprint, held_out_by=held_out_by)


def _head_of_base(base: FrozenBase, config: RunConfig) -> Applied:
    """Attaches the score head of full fine-tuning; returns nothing if the base's own head
    trains."""
    if config.objective.head is None:
        return ()
    classifier_class(base.model)  # raises now if the model could not be written at the end
    head = fresh_head(base, config.objective.head)
    return attach_head(base, config.method, head, name=ADAPTER_NAME)


def _trained_values(
    base: FrozenBase, config: RunConfig, applied: Applied, world: World
) -> FlatValues:
    if config.method.trains_base:
        head = {} if not applied else applied[0][0].parameters()
        return every_weight(base, world, head)
    attachment = applied[0][0]
    return FlatParameters(attachment.parameters(), attachment.learning_rate_factors())


def _training_inputs(
    config: RunConfig,
    steps: int,
    base: FrozenBase,
    data: DataSet,
    flat: FlatValues,
    adapters: Applied,
    teacher: Teacher | None,
    replay: Replay | None,
) -> TrainingInputs:
    shows_answers = (
        config.show_answers
        and config.objective.answers
        and base.tokenizer.chat_template is not None
    )
    return TrainingInputs(
        model=base.model,
        paths=base.paths,
        routing=base.routing,
        adapters=adapters,
        flat=flat,
        train=data.train,
        validation=data.validation,
        config=config,
        learning_rate=config.peak_learning_rate(base),
        steps=steps,
        out=Path(config.out),
        sample=sample_of(base, data.validation_rows, data.preamble) if shows_answers else None,
        mixture=data.mixture,
        sharded=base.sharding is not None,
        validation_sets=data.held,
        reference_adapters=adapters if config.from_adapter or config.new_tokens else (),
        stored_teacher=teacher,
        replay=replay,
    )


def _refuse_divided_rows(inputs: TrainingInputs) -> None:
    """Raises RefusedError if answers that are compared cannot be computed in one forward."""
    paths = inputs.paths
    with inputs.routing.held(Acting.everywhere(inputs.adapters)):
        prefix = acting_prefix_length(inputs.model)
    validation = inputs.validation
    train_rows = _by_row(inputs.train, inputs.rows)
    for examples in chain(train_rows, _by_row(validation, RowSpans.of(validation))):
        if len(paths.together(examples, prefix)) > 1:
            reason = paths.padded_reason or paths.switches.words
            raise RefusedError(
                f"objective {inputs.config.objective.name} reads several examples of a row, and"
                " this base computes them apart",
                [f"{examples[0].ref}: {reason}"],
                "Take another base, a smaller length, or objective answers.",
            )


def _by_row(examples: Sequence[Example], rows: RowSpans) -> Iterator[list[Example]]:
    """Yields the examples of each row."""
    for row in range(len(rows.lengths)):
        yield [examples[number] for number in rows.examples([row])]


def _rows_of_epoch(config: RunConfig, data: DataSet) -> int:
    if data.mixture is None:
        return len(RowSpans.of(data.train).lengths)
    return len(data.mixture.rows(config.seed, 0))
