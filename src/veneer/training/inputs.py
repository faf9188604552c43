"""The inputs of the training loop: model, trained values, rows and settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from veneer.adapters.placement.acting import Acting, Applied
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import Batch, RowSpans
from veneer.data.collector import SetSize
from veneer.data.examples import Example
from veneer.data.longest import largest_micro_batches, plans_of_run
from veneer.data.mixture import Mixture
from veneer.data.teacher import without_beginning
from veneer.models.step import ComputePaths, batch_of, parts_of
from veneer.objectives.labels import balanced
from veneer.objectives.objective import AnswerBatch, Objective, Values
from veneer.objectives.registry import make_objective
from veneer.training.config import RunConfig
from veneer.training.drawn_rows.own_answers import OwnAnswers
from veneer.training.drawn_rows.replay import Replay
from veneer.training.optimizer.buffer import FlatValues
from veneer.training.output.sample import Sample
from veneer.training.state.checkpoint import numbers


@dataclass(frozen=True)
class ReferenceLogProbs:
    """Log-probabilities of all answers by the reference, summed over their targets (E)."""

    train: Values
    validation: Values


@dataclass(frozen=True)
class ForwardInputs:
    """Holds what a forward over the rows of one adapter needs.

    adapters: what acts on the rows. seed: of the dropout masks.
    """

    model: PreTrainedModel
    paths: ComputePaths
    routing: Routing
    adapters: Applied
    share_prompt: bool
    seed: int

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Builds the batch of a forward over these examples alone."""
        return batch_of(
            self,
            examples,
            range(len(examples)),
            share_prompt=self.share_prompt,
            adapters=self.adapters,
        )


@dataclass(frozen=True)
class Teacher:
    """Holds what a teacher's forward needs.

    vocabulary: number of tokens of a teacher that is another base; None: its base is the student's
    prompt: number of tokens in front of every example whose keys and values are an adapter of its
    forward
    line: how its prompt is computed, for the screen
    """

    forward: ForwardInputs
    vocabulary: int | None = None
    prompt: int = 0
    line: str | None = None

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Builds the batch of a forward over these examples, without the prompt that is known."""
        return self.forward.batch([without_beginning(e, self.prompt) for e in examples])

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Returns the parameters of each of its adapters."""
        return [dict(adapter.parameters()) for adapter, _ in self.forward.adapters]


@dataclass
class TrainingInputs:
    """Holds what a run trains, on what, and how.

    adapters: what acts on its rows; none if every weight trains. learning_rate: the peak rate.
    steps: optimizer steps of the whole run.
    """

    model: PreTrainedModel
    paths: ComputePaths
    routing: Routing
    adapters: Applied
    flat: FlatValues
    train: Sequence[Example]
    validation: Sequence[Example]
    config: RunConfig
    learning_rate: float
    steps: int
    out: Path
    sample: Sample | None
    mixture: Mixture | None = None
    sharded: bool = False
    """True if the base's layers are sharded. All processes then compute at the same time, one
    micro-batch each, because they gather the layers for one another."""
    validation_sets: Sequence[SetSize] = ()
    """Sizes of the sets that `validation` consists of, in its order."""
    largest: Sequence[Sequence[int]] = ()
    """Micro-batches, as numbers of examples, that are tried before step 1; empty: those of
    find_largest."""
    reference_adapters: Applied = ()
    """Adapters of the reference, with the values that training starts from; none: the base."""
    stored_teacher: Teacher | None = None
    """The teacher, if it is more than the base alone."""
    replay: Replay | None = None
    """Rows on which the adapter stays close to the base."""
    own_answers: OwnAnswers | None = None
    """Draws the student's own answers; None if it learns from given answers alone."""
    reference: ReferenceLogProbs | None = None
    """Log-probabilities of the reference, which the objective reads; None until computed."""
    first_evaluations: dict[str, Any] = field(default_factory=dict)
    """Evaluations before step 1 of jobs on this base, by what they depend on."""

    rows: RowSpans = field(init=False)
    """The examples of each row of `train`."""
    objective: Objective = field(init=False)
    """The objective that `config` asks for, with what its rows decide."""

    def __post_init__(self) -> None:
        self.rows = RowSpans.of(self.train)
        self.objective = make_objective(balanced(self.config.objective, self.train))

    def answers(self, numbers: Sequence[int], examples: Sequence[Example]) -> AnswerBatch:
        """Returns training examples with their reference; zeros before it is computed.

        Those that a teacher reads are left out. numbers: of the examples; a number may occur
        several times, since a mixture of sets repeats rows
        """
        numbered = [
            pair for pair in zip(numbers, examples, strict=True) if pair[1].kind != "teacher"
        ]
        student_examples = [example for _, example in numbered]
        if self.reference is None:
            return AnswerBatch.without_reference(student_examples)
        return AnswerBatch(
            student_examples, self.reference.train[[number for number, _ in numbered]]
        )

    def held_out_answers(self) -> AnswerBatch:
        if self.reference is None:
            return AnswerBatch.without_reference(self.validation)
        return AnswerBatch(self.validation, self.reference.validation)

    def find_largest(self) -> list[list[int]]:
        """Finds the micro-batches of all steps that may take the most memory (data/longest.py)."""
        config = self.config
        with self.routing.held(Acting.everywhere(self.adapters)):
            examples = self.longest_train
            rows = self.rows if examples is self.train else RowSpans.of(examples)
            plans = plans_of_run(
                examples,
                self.rows,
                batch=config.batch,
                seed=config.seed,
                order=config.order,
                mixture=self.mixture,
                steps=self.steps,
            )
            return largest_micro_batches(
                examples,
                rows,
                plans,
                micro_batch=config.rows_at_once,
                packed=self.paths.packed,
                share_prompt=config.share_prompt,
                divide=lambda part: parts_of(self, examples, [part]),
            )

    @property
    def forward(self) -> ForwardInputs:
        """Returns what a forward over the training rows needs."""
        config = self.config
        return ForwardInputs(
            self.model, self.paths, self.routing, self.adapters, config.share_prompt, config.seed
        )

    @property
    def longest_train(self) -> Sequence[Example]:
        """Returns the training examples, each as long as an answer of the student's own may make
        it."""
        return self.train if self.own_answers is None else self.own_answers.longest

    @property
    def teacher(self) -> Teacher:
        """Returns the teacher that the objective compares with: the base alone by default."""
        return self.stored_teacher or self.base_as_teacher

    @property
    def base_as_teacher(self) -> Teacher:
        """Returns the run's base without an adapter, as a teacher."""
        return Teacher(replace(self.forward, adapters=()))

    @property
    def evaluate_every(self) -> int:
        return self.config.evaluation_interval(self.steps)

    def memory_advice(self, otherwise: str) -> str:
        """Advises to resume if the run has a checkpoint; else returns `otherwise`."""
        if not numbers(self.out / "checkpoints"):
            return otherwise
        return (
            f"Free memory, then continue from the last checkpoint: veneer train --resume {self.out}"
        )
