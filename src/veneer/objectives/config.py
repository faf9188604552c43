"""Settings of the objectives, which a run file gives under `objective`. `--help` reads this file,
so it does not import torch.

Sources: DPO, Rafailov et al. 2023, arXiv:2305.18290; IPO, Azar et al. 2023, arXiv:2310.12036; KTO,
Ethayarajh et al. 2024, arXiv:2402.01306; ORPO, Hong et al. 2024, arXiv:2403.07691; distil, Agarwal
et al. 2023, arXiv:2306.13649; classify, transformers' ...ForSequenceClassification.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from veneer.adapters.labels import HeadKind, HeadSettings
from veneer.bounds import BETA, ENERGY, FACTOR, NEW_TOKENS, PROBABILITY, SMOOTHING
from veneer.data.examples import RowKind
from veneer.data.teacher_text import TeacherText, absolute_path, read_teacher_text
from veneer.errors import ConfigError
from veneer.files.settings import StrictSettings
from veneer.quant.config import Quantize

TeacherWeights = tuple[str, str | None, str]
"""Name, weight format and type of a teacher's base."""


class TeacherBase(StrictSettings):
    """Names another base as the teacher; its tokenizer has the vocabulary of the student's."""

    base: str
    """Hub id, folder, .gguf file, or a named default, as for the run's own base."""
    adapter: str | None = None
    """Adapter on that base: a name in the library or a folder; default: the base alone."""
    quantize: Quantize | None = None
    """Format of its linear layers in memory, for instance nf4; default: as they are stored."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of its weights; auto chooses as for the run's own base, and is filled in when the run
    begins."""
    digest: str | None = None
    """Digest of its fingerprint, filled in when the run begins."""

    @property
    def weights(self) -> TeacherWeights:
        """Returns what decides its weights: teachers of one process with equal values share
        them."""
        return self.base, self.quantize, self.dtype


@dataclass(frozen=True)
class OwnAnswersConfig:
    """Says how many rows the student answers itself before a step.

    share: of a step's rows. tokens: most of an answer
    """

    share: float
    tokens: int


class ObjectiveConfig(StrictSettings):
    """Base class of objectives: properties of an objective besides its settings.

    rows           what the rows of a run hold
    has_teacher    whether it learns from the predictions of a teacher
    several        whether it reads several examples of a row, which one forward must compute
    share_of_rate  factor of the method's usual learning rate
    answers        whether the model writes answers
    measures       what evaluations of its rows measure, by which `tune` and `compare` judge; the
                   first one decides. Empty if they cannot judge it
    """

    rows: ClassVar[RowKind]
    has_teacher: ClassVar[bool] = False
    several: ClassVar[bool] = False
    share_of_rate: ClassVar[float] = 1.0
    answers: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("loss",)

    name: str = ""
    """Name in the run file; every objective has one."""

    def teacher_text(self) -> TeacherText | None:
        """Returns the text that a teacher reads besides each row, None without a teacher.

        Raises ConfigError if a file cannot be read.
        """
        return None

    @property
    def teacher_adapter(self) -> str | None:
        """Returns the name or folder of the teacher's adapter; None for a base alone."""
        return None

    @property
    def teacher_base(self) -> TeacherBase | None:
        """Returns the settings of a teacher that is another base; None if the student's base is the
        teacher's."""
        return None

    @property
    def own_answers_config(self) -> OwnAnswersConfig | None:
        """Returns how many rows the student answers itself; None if it learns from given answers
        alone."""
        return None

    def located(
        self, adapter: str | None, content: str | None, base: TeacherBase | None = None
    ) -> Self:
        """Returns the settings with absolute paths, the folder and the content hash of the
        teacher's adapter, and its base as it was loaded.

        Raises ConfigError if the settings name another content.
        """
        return self

    @property
    def head(self) -> HeadSettings | None:
        """Returns the settings of the head that it trains; None if it learns from answers."""
        return None


class Answers(ObjectiveConfig):
    rows: ClassVar[RowKind] = "answers"

    name: Literal["answers"] = "answers"


class PreferenceConfig(ObjectiveConfig):
    """Base class of objectives that learn which answers are preferred."""

    several: ClassVar[bool] = True
    share_of_rate: ClassVar[float] = 0.1
    measures: ClassVar[tuple[str, ...]] = ("accuracy", "likelier")


class _ReferenceConfig(PreferenceConfig):
    """Base class of objectives over pairs with a reference."""

    rows: ClassVar[RowKind] = "pairs"

    sft_weight: Annotated[float, FACTOR] = 0.0
    """Weight of the cross-entropy of the preferred answer, added to the loss; it keeps the
    probabilities of both answers from falling."""


class DPO(_ReferenceConfig):
    """Learns from pairs: raises the preferred answer's log p above the other's, relative to a
    reference."""

    name: Literal["dpo"] = "dpo"
    beta: Annotated[float, BETA] = 0.1
    """Strength of the pull towards the reference; a smaller value lets the model move further."""
    label_smoothing: Annotated[float, SMOOTHING] = 0.0
    """Share of the pairs that are assumed to be swapped."""
    per_token: bool = False
    """Compare means over tokens instead of sums, so that longer answers have no advantage; beta is
    then larger, 1 to 5."""


class IPO(_ReferenceConfig):
    """Learns from pairs: the margin between two answers shall reach a target."""

    name: Literal["ipo"] = "ipo"
    beta: Annotated[float, BETA] = 0.1
    """The margin that training aims at is 1 / (2 beta)."""
    per_token: bool = True
    """Compare means over tokens, as TRL does; false compares sums, as the paper's formula does."""


class KTO(PreferenceConfig):
    """Learns from answers that are rated good or bad."""

    rows: ClassVar[RowKind] = "ratings"
    measures: ClassVar[tuple[str, ...]] = ()

    name: Literal["kto"] = "kto"
    beta: Annotated[float, BETA] = 0.1
    """Strength of the pull towards the reference."""
    good_weight: Annotated[float, FACTOR] = 1.0
    """Weight of answers that are rated good."""
    bad_weight: Annotated[float, FACTOR] = 1.0
    """Weight of answers that are rated bad."""


class ORPO(PreferenceConfig):
    """Learns from pairs without a reference: cross-entropy and an odds ratio."""

    rows: ClassVar[RowKind] = "pairs"

    name: Literal["orpo"] = "orpo"
    weight: Annotated[float, FACTOR] = 0.1
    """Weight of the odds ratio beside the cross-entropy of the preferred answer."""


class Distil(ObjectiveConfig):
    """Learns the next tokens that a teacher predicts."""

    rows: ClassVar[RowKind] = "answers"
    has_teacher: ClassVar[bool] = True
    several: ClassVar[bool] = True

    name: Literal["distil"] = "distil"
    divergence: Literal["forward", "reverse", "jensen_shannon"] = "forward"
    """forward: KL(teacher || student), the student covers all that the teacher expects; reverse:
    KL(student || teacher), it keeps to what the teacher finds likely; jensen_shannon: between the
    two, by `teacher_share`."""
    teacher_share: Annotated[float, ENERGY] = 0.5
    """The teacher's share of the mixture that jensen_shannon compares both with: near 0 it acts
    like forward, near 1 like reverse."""
    temperature: Annotated[float, BETA] = 1.0
    """Divides the logits of both; above 1 less likely tokens count more."""
    system: str | None = None
    """System prompt that the teacher reads in front of every conversation, and the student does
    not. A row's own system prompt stands behind it, for both."""
    document: str | None = None
    """A text file that the teacher reads in its system prompt, behind `system`."""
    tools: str | None = None
    """A JSON file with a list of tools that the teacher knows, in rows that have none."""
    teacher: str | TeacherBase | None = None
    """Adapter of the teacher: a name in the library or a folder; or another base with the same
    tokenizer: {base, adapter, quantize}. Default: the run's base alone."""
    own_answers: Annotated[float, PROBABILITY] = 0.0
    """Share of a step's rows that the student answers itself before the step; the teacher says what
    it would have expected at each token of these answers. The other rows keep their own."""
    answer_tokens: Annotated[int, NEW_TOKENS] = 128
    """Longest such answer, tokens."""
    content: str | None = None
    """Content hash of that adapter, filled in when the run begins."""

    @property
    def own_answers_config(self) -> OwnAnswersConfig | None:
        if self.own_answers == 0:
            return None
        return OwnAnswersConfig(self.own_answers, self.answer_tokens)

    def teacher_text(self) -> TeacherText:
        if all(part is None for part in (self.system, self.document, self.tools, self.teacher)):
            raise ConfigError(
                "objective distil needs a teacher",
                next_step="Set objective.document, system or tools, which the base reads, or"
                " objective.teacher, an adapter or another base.",
            )
        return read_teacher_text(self.system, self.document, self.tools)

    @property
    def teacher_adapter(self) -> str | None:
        return self.teacher.adapter if isinstance(self.teacher, TeacherBase) else self.teacher

    @property
    def teacher_base(self) -> TeacherBase | None:
        return self.teacher if isinstance(self.teacher, TeacherBase) else None

    def located(
        self, adapter: str | None, content: str | None, base: TeacherBase | None = None
    ) -> Self:
        if self.content not in (None, content):
            raise ConfigError(
                f"{adapter} is not the teacher that the run started with",
                [f"content then {self.content}, now {content}"],
                "Put that adapter back, or start a new run.",
            )
        previous = None if self.teacher_base is None else self.teacher_base.digest
        if base is not None and previous not in (None, base.digest):
            raise ConfigError(
                f"{base.base} is not the teacher that the run started with",
                [f"weights then {previous}, now {base.digest}"],
                "Put that base back, or start a new run.",
            )
        teacher = adapter if base is None else base.model_copy(update={"adapter": adapter})
        files = {
            name: absolute_path(path)
            for name in ("document", "tools")
            if (path := getattr(self, name)) is not None
        }
        return self.model_copy(update={**files, "teacher": teacher, "content": content})


class Classify(ObjectiveConfig):
    rows: ClassVar[RowKind] = "labels"
    answers: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ()

    name: Literal["classify"] = "classify"
    kind: HeadKind = "label"
    """One label of several (label), any number of labels (labels), a number (regression), or how
    well a document fits a query (rerank)."""
    labels: list[str] = Field(default_factory=list)
    """The labels, in the order of the head's outputs; default: those of the rows, sorted. Not with
    regression and rerank."""
    class_weights: dict[str, Annotated[float, FACTOR]] = Field(default_factory=dict)
    """Weight of a label's rows in the loss, {rare: 5}; default: 1. With kind labels it weighs the
    rows that have the label."""
    balanced: bool = False
    """Fill in class_weights so that rare labels count as much as frequent ones."""
    thresholds: dict[str, Annotated[float, PROBABILITY]] = Field(default_factory=dict)
    """Probability from which a label is chosen, by label; default: 0.5. Only with kind labels."""

    @property
    def head(self) -> HeadSettings:
        return HeadSettings(self.kind, tuple(self.labels), tuple(sorted(self.thresholds.items())))

    @field_validator("labels", "class_weights", "thresholds", mode="before")
    @classmethod
    def _numbers_are_names(cls, value: object) -> object:
        """Reads whole numbers, true and false as names, since labels in rows may be such."""
        if isinstance(value, dict):
            return {_label_name(label): number for label, number in value.items()}
        return [_label_name(label) for label in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.labels and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels names a label twice")
        if not self.head.names_outputs and (self.labels or self.class_weights or self.balanced):
            raise ValueError(f"kind {self.kind} has one output: leave labels and class_weights out")
        if self.kind == "label" and 0 in self.class_weights.values():
            raise ValueError(
                "a class weight of 0 leaves the rows of the label out: leave them out of the data"
            )
        unknown = sorted({*self.class_weights, *self.thresholds} - set(self.labels))
        if self.labels and unknown:
            raise ValueError(f"{', '.join(unknown)}: weights and thresholds of unknown labels")
        return self


def _label_name(label: object) -> object:
    """Returns the name of a label as rows give it (data/files/labels.py)."""
    if isinstance(label, int):
        return str(label).lower()
    return label


AnyObjective = Annotated[
    Answers | DPO | IPO | KTO | ORPO | Distil | Classify, Field(discriminator="name")
]

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "answers": Answers,
    "dpo": DPO,
    "ipo": IPO,
    "kto": KTO,
    "orpo": ORPO,
    "distil": Distil,
    "classify": Classify,
}
