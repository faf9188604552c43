"""`base.trainer(...)`: an adapter and its optimizer, for people who write the loop themselves.

A trainer knows forward and backward, the step of the optimizer, answers, and the adapter's folder.
Rates, batches, evaluations and when to stop are up to the loop.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, cast

from torch import Tensor

from veneer.adapters.placement.acting import Acting, Applied, check_answers
from veneer.adapters.placement.attachment import Attachment
from veneer.bounds import DIVISOR
from veneer.data.examples import Example
from veneer.data.files.writing import Record
from veneer.data.template.user_prompt import UserPrompt
from veneer.decoding.answers import Answer, answer_prompts
from veneer.errors import ConfigError, VeneerError, fits_memory
from veneer.evaluation.rows import RowOptions, load_rows
from veneer.files.home import expanded
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.manifest import make_readable
from veneer.library.library import Library
from veneer.models.frozen_base import FrozenBase
from veneer.objectives.config import ObjectiveConfig
from veneer.objectives.registry import make_objective
from veneer.training.inputs import ForwardInputs, Teacher
from veneer.training.optimizer.buffer import FlatAdamW, FlatParameters
from veneer.training.own_loop.adamw import AdamW
from veneer.training.own_loop.examples import are_encoded, refuse_foreign, refuse_unfit
from veneer.training.own_loop.forward_queue import ForwardQueue, TrainerGradient
from veneer.training.own_loop.losses import CustomLoss, LossFunction, SummedLoss
from veneer.training.own_loop.objectives import CROSS_ENTROPY, Loss, check_examples, find_objective
from veneer.training.own_loop.reference import StartReference
from veneer.training.own_loop.state import TrainerState, write_state
from veneer.training.teachers.teacher import attach_teacher
from veneer.wording import kind_of


@dataclass(frozen=True)
class OptimizerStep:
    """The figures of one step.

    step           number of steps up to here
    gradient_norm  norm of the gradient after `divide_by`, before it is scaled down to max_norm
    loss_sum       sum of the losses of all calls of the step
    tokens         number of trained tokens of these calls
    """

    step: int
    gradient_norm: float
    loss_sum: float
    tokens: int


class Trainer:
    """Trains an adapter of a base, step by step; made by `base.trainer`. Use it in a `with` block,
    or close it.

    name        name of the adapter on the base
    attachment  the adapter, with its settings
    step        number of optimizer steps so far
    """

    def __init__(
        self, base: FrozenBase, attachment: Attachment, queue: ForwardQueue, start: TrainerState
    ) -> None:
        check_answers([attachment])
        self._base, self.attachment, self._queue = base, attachment, queue
        self.name, self._options, self._method = attachment.name, start.options, start.method
        attachment.preamble = attachment.preamble.overridden(variables=start.options.variables)
        self._systems: set[str | None] = set(start.systems)
        self._keep_common_system()
        adapters = ((attachment, 1.0),)
        self._acting = Acting.everywhere(adapters)
        with fits_memory("on the trained values, their gradient and the optimizer's moments"):
            flat = FlatParameters(attachment.parameters(), attachment.learning_rate_factors())
            self._optimizer: FlatAdamW | None = FlatAdamW(flat, weight_decay=0.0)
        forward = ForwardInputs(
            base.model,
            base.paths,
            base.routing,
            adapters,
            share_prompt=True,
            seed=start.options.seed,
        )
        self._gradient = TrainerGradient(forward, flat)
        self._gradient.step = start.step
        first_values = flat.values.data.clone() if start.has_own_reference else None
        if start.tensors is not None:
            self._optimizer.load(start.tensors)
            first_values = start.tensors.get("start")
        self._has_reference = first_values is not None or not start.has_own_reference
        self._reference = StartReference(forward, flat, start=first_values, known=start.reference)
        self._teachers: dict[str | None, Applied] = {None: ()}
        self._num_rows = 0
        queue.enter(self._gradient)

    @property
    def step(self) -> int:
        return self._gradient.step

    def encode(
        self, rows: str | Path | Iterable[Record], *, loss: Loss = CROSS_ENTROPY
    ) -> list[Example]:
        """Encodes rows, or a file of rows, as `veneer.train` does: token ids and which of them are
        trained. A row may become several examples, for instance one for each answer of a pair.

        loss  the objective that they are for; it decides what the rows hold
        Raises DataError, with every fault, for rows that cannot be trained on.
        """
        objective, base, preamble = find_objective(loss), self._base, self.attachment.preamble
        self._require_open()
        row_source = [rows] if isinstance(rows, Mapping) else rows
        with base.routing.held(self._acting):
            data = load_rows(
                base,
                row_source,
                RowOptions(length=self._options.length, train_on=self._options.train_on),
                preamble=replace(preamble, system=None),
                purpose="trained on",
                kind=objective.rows,
                teacher=objective.teacher_text(),
            )
            examples = self._numbered(data.train)
            refuse_unfit(base, self.attachment, examples)
        self._systems.add(data.preamble.system)
        self._keep_common_system()
        return examples

    def _numbered(self, examples: Sequence[Example]) -> list[Example]:
        """Returns the examples with row numbers that no earlier call has used."""
        start = self._num_rows
        numbered = [e if e.row is None else replace(e, row=e.row + start) for e in examples]
        self._num_rows = 1 + max((e.row for e in numbered if e.row is not None), default=start - 1)
        return numbered

    def _keep_common_system(self) -> None:
        """Makes the system turn that all rows have the adapter's own."""
        if self._systems:
            system = next(iter(self._systems)) if len(self._systems) == 1 else None
            self.attachment.preamble = replace(self.attachment.preamble, system=system)

    def forward_backward(
        self, rows: str | Path | Iterable[Record] | Sequence[Example], *, loss: Loss = CROSS_ENTROPY
    ) -> SummedLoss:
        """Adds the gradient of these rows to that of the next step.

        Loss and gradient are sums over the trained tokens, or over the pairs or ratings of an
        objective, not means: several calls before a step add up as if their rows came in one.
        `optim_step(..., divide_by=loss.count)` makes a mean.

        Rows are encoded at once. Their forward runs when `loss_sum` is read, or at the next step of
        any trainer of this base; the rows that all of them wait for are computed together.

        rows  rows, each a dict, a file of rows, or examples that `encode` made for this loss
        loss  an objective: its name, or its settings such as veneer.DPO(beta=0.1). What dpo, ipo
              and kto compare with is what the trainer started from; its values are computed here,
              once for each answer
        """
        self._require_open()
        settings = find_objective(loss)
        examples = self._examples(rows, settings)
        check_examples(settings, examples)
        if settings.has_teacher and self.attachment.tokens is not None:
            raise ConfigError(
                f"objective {settings.name} learns from a base that does not know the adapter's new"
                " tokens",
                next_step="Take an adapter without new tokens.",
            )
        objective = make_objective(settings)
        call = SummedLoss(
            examples,
            self._queue.compute,
            objective,
            name=settings.name,
            takes_all_rows=settings.several,
            reference=self._require_reference().of(examples) if objective.compares else None,
            teacher=self._teacher_of(settings) if objective.has_teacher else None,
        )
        self._gradient.add_call(call)
        return call

    def _require_reference(self) -> StartReference:
        if not self._has_reference:
            raise ConfigError(
                "this state holds no first values of its adapter, and the objective compares with"
                " them",
                next_step="Start from the adapter itself instead of resume=.",
            )
        return self._reference

    def _teacher_of(self, objective: ObjectiveConfig) -> Teacher:
        """Returns the teacher of an objective; its adapter is attached on first use."""
        named = objective.teacher_adapter
        if named not in self._teachers:
            stored = read_adapter(Library().locate(named or ""))
            self._teachers[named] = attach_teacher(self._base, stored)
        return Teacher(replace(self._gradient.forward, adapters=self._teachers[named]))

    def forward_backward_custom(
        self, rows: str | Path | Iterable[Record] | Sequence[Example], loss_fn: LossFunction
    ) -> CustomLoss:
        """Adds the gradient of your own loss of these rows to that of the next step.

        loss_fn  receives the examples, and a list with one tensor for each: log p of its trained
                 tokens, in their order. It returns the loss, or the loss and a dict of figures,
                 which `metrics` of the call then has. It runs when the call is computed, on all
                 rows at once, in the same forward that the gradient flows back through
        """
        self._require_open()
        examples = self._examples(rows, CROSS_ENTROPY)
        call = CustomLoss(examples, self._queue.compute, loss_fn)
        self._gradient.add_call(call)
        return call

    def _examples(
        self, rows: str | Path | Iterable[Record] | Sequence[Example], loss: Loss
    ) -> Sequence[Example]:
        """Returns examples as they are if this trainer can learn them, and encodes rows."""
        if not are_encoded(rows):
            return self.encode(cast(Iterable[Record], rows), loss=loss)
        refuse_foreign(self._base, self.attachment, rows)
        with self._base.routing.held(self._acting):
            refuse_unfit(self._base, self.attachment, rows)
        return rows

    def optim_step(self, adamw: AdamW, *, divide_by: float = 1.0) -> OptimizerStep:
        """Changes the adapter by the gradient of all calls since the last step.

        divide_by: the gradient is divided by this number first, for instance by the number of
        tokens. Raises ConfigError for wrong arguments or if no call was made; nothing changes then.
        Raises DivergedError if the gradient is not finite, and the error of a call that could not
        be computed. The adapter does not change then, and the next step begins without a gradient.
        """
        optimizer = self._require_open()
        if not isinstance(adamw, AdamW):
            raise ConfigError(
                f"optim_step takes veneer.AdamW(learning_rate=...), and this is {kind_of(adamw)}"
            )
        if not DIVISOR.holds(divide_by):
            raise ConfigError(f"divide_by is {divide_by!r:.40}, and takes {DIVISOR.description}")
        if adamw.weight_decay and self.attachment.config.keeps_values:
            raise ConfigError(
                "weight_decay changes the adapter's frozen tokens, too",
                next_step="Leave weight_decay 0.",
            )
        if not self._gradient.calls:
            raise ConfigError(
                "there is no gradient for a step", next_step="Call forward_backward first."
            )
        self._queue.compute()
        flat, decay = self._gradient.flat, adamw.weight_decay
        with self._gradient.ended() as calls:
            if divide_by != 1.0:
                flat.gradient.div_(float(divide_by))
            norm = float(flat.gradient.norm())
            if not math.isfinite(norm):
                raise self._gradient.diverged(norm)
            optimizer.configure(betas=adamw.betas, epsilon=adamw.eps, weight_decay=decay)
            optimizer.step(learning_rate=adamw.learning_rate, clip=adamw.max_norm, norm=norm)
        self._gradient.step += 1
        loss_sum, tokens = sum(call.loss_sum for call in calls), sum(call.tokens for call in calls)
        return OptimizerStep(self.step, norm, loss_sum, tokens)

    def sample(
        self,
        prompt: UserPrompt | Sequence[UserPrompt],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Answer | list[Answer]:
        """Answers a prompt, or a list of prompts, as `base.generate` does, with the adapter as it
        is now. Nothing is copied."""
        self._require_open()
        with self._base.routing.held(self._acting):
            return answer_prompts(
                self._base,
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
            )

    def save(self, out: str | Path, *, replace: bool = False) -> Path:
        """Writes the adapter as it is now into a new folder, which a library and PEFT read.

        replace: an existing folder is replaced. Raises ConfigError otherwise.
        """
        self._require_open()
        if not isinstance(out, str | Path):
            raise ConfigError(f"out is {out!r}, not a folder's name")
        base, attachment, parent = self._base, self.attachment, self._options.parent
        manifest = make_readable(
            lambda: manifest_for(
                base,
                method=attachment.config.name,
                preamble=attachment.preamble,
                parents=[] if parent is None else [(parent, 1.0)],
                template_hash=base.template_hash(),
            )
        )
        folder = expanded(out)
        return write_adapter(folder, attachment, manifest, model=base.model, replace=replace).path

    def save_state(self, out: str | Path, *, replace: bool = False) -> Path:
        """Writes everything that `base.trainer(resume=out)` needs to go on bit for bit: values and
        moments, options and number of steps. The folder holds the adapter, too.

        replace: an existing folder is replaced. Raises ConfigError otherwise, and between
        forward_backward and optim_step.
        """
        optimizer = self._require_open()
        if not isinstance(out, str | Path):
            raise ConfigError(f"out is {out!r}, not a folder's name")
        if self._gradient.calls:
            raise ConfigError(
                "a step has begun, and its gradient is no part of a state",
                next_step="Call optim_step first.",
            )
        tensors: dict[str, Tensor] = optimizer.state()
        if self._reference.start is not None:
            tensors["start"] = self._reference.start
        state = TrainerState(
            self._method,
            self._options,
            self.step,
            tuple(self._systems),
            tensors,
            self._reference.known,
        )
        return write_state(out, self._base, state, self.save, replace=replace)

    def close(self) -> None:
        """Takes the adapter off the base and frees the optimizer. Calls that wait are dropped."""
        if self._optimizer is None:
            return
        self._queue.leave(self._gradient)
        self._gradient.fail(
            VeneerError(f"trainer {self.name!r} was closed before this was computed")
        )
        self._optimizer = None
        teachers = [
            attachment for adapters in self._teachers.values() for attachment, _ in adapters
        ]
        for attachment in (self.attachment, *teachers):
            if self._base.attachments.get(attachment.name) is attachment:
                self._base.detach(attachment.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def _require_open(self) -> FlatAdamW:
        """Returns the optimizer. Raises ConfigError if there is none any more."""
        if self._optimizer is None:
            raise ConfigError(
                f"trainer {self.name!r} is closed", next_step="Make a new one: base.trainer(...)."
            )
        if fault := self._queue.detached(self._gradient):
            raise fault
        return self._optimizer

    def __repr__(self) -> str:
        state = "closed" if self._optimizer is None else f"{self.step} steps"
        return f"Trainer({self.name!r}, {self.attachment.config.name}, {state})"


def open_trainer(
    base: FrozenBase, attachment: Attachment, queue: ForwardQueue, start: TrainerState
) -> Trainer:
    """Opens a trainer of an adapter; takes the adapter off the base if that fails."""
    try:
        return Trainer(base, attachment, queue, start)
    except BaseException:
        base.detach(attachment.name)
        raise
