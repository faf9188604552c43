"""Settings of a run: the fields of a run file, each with its unit. Imports no torch: `--help` reads
this.
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from veneer.adapters.config import LoRA, Method, MethodConfig
from veneer.adapters.method_config import RateBasis
from veneer.adapters.preamble import variable_faults
from veneer.bounds import (
    BETA,
    CLIP,
    COUNT,
    EPOCHS,
    LEARNING_RATE,
    LENGTH,
    ROWS,
    SEED,
    SHARE,
    WEIGHT,
    WEIGHT_DECAY,
)
from veneer.data.config import DataConfig as DataConfig
from veneer.data.template.new_tokens import text_faults
from veneer.errors import ConfigError
from veneer.files.home import expanded
from veneer.files.settings import StrictSettings
from veneer.objectives.config import Answers, AnyObjective
from veneer.quant.config import FOUR_BITS, Quantize, weight_format

OptimizerName = Literal["adamw", "adamw8bit"]

MOMENT_BYTES: dict[OptimizerName, float] = {"adamw": 8, "adamw8bit": 2 + 2 * 4 / 256}
"""Bytes of an optimizer's moments per trained value, beside the value and its gradient."""

EPOCHS_UNSAID = 3.0
"""Passes over the rows if neither epochs nor steps are set."""

SHORT_FORMS: dict[str, tuple[str, Quantize]] = {"qlora": ("lora", FOUR_BITS)}
"""Names that a run file may give for a method over a weight format."""


EXACT_PARTS = 8
"""Micro-batches of a step under `reduce: exact` if micro_batch is unset. A constant, because how
rows are divided shows in the last bits. At most this many processes share a step.
"""


def rows_at_once(
    batch: int, micro_batch: int | None, reduce: Literal["plain", "exact"], processes: int = 1
) -> int:
    """Returns the rows of a micro-batch on this many processes."""
    parts = EXACT_PARTS if reduce == "exact" else processes
    return min(batch, micro_batch or -(-batch // parts))


class TemplateConfig(StrictSettings):
    variables: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template, for instance {enable_thinking: false}; stored in the adapter
    and used again whenever it answers.
    """

    @field_validator("variables")
    @classmethod
    def _check_variables(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if faults := variable_faults(value):
            raise ValueError("; ".join(faults))
        return value


class StartFrom(StrictSettings):
    """Names one of the adapters that a run continues."""

    adapter: str
    """Name in the library, or a folder of an adapter or a run."""
    weight: Annotated[float, WEIGHT] = 1.0
    """Factor of its update; the updates of several adapters are added."""
    content: str | None = None
    """Content hash of the adapter, filled in when the run begins."""


class ReplayConfig(StrictSettings):
    """Rows on which the adapter stays close to the base, against forgetting."""

    rows: str | None = None
    """Rows of other tasks, named as in data.train, for instance those of `veneer data replay`. On
    their answers KL(base || adapter) is added to the loss. Default: none.
    """
    weight: Annotated[float, BETA] = 1.0
    """Factor of the mean KL over the trained tokens of a step's replay rows."""
    batch: Annotated[int, ROWS] = 2
    """Replay rows of each optimizer step, besides those of `batch`."""


def trains_packed(method: MethodConfig, quantize: Quantize) -> str:
    return f"method {method.name} trains every weight, and weights held as {quantize} cannot train"


class RunConfig(StrictSettings):
    base: str
    """Hub id, folder, .gguf file, or a named default such as smollm2-135m."""
    data: DataConfig
    """The rows: a file, or {train, validation, format, ...}."""
    replay: ReplayConfig = Field(default_factory=ReplayConfig)
    """Rows against forgetting: {rows, weight, batch}."""
    template: TemplateConfig = Field(default_factory=TemplateConfig)
    """Settings of the base's chat template."""
    objective: AnyObjective = Field(default_factory=Answers)
    """What training minimises: answers (cross-entropy of the given answers), a preference: dpo,
    ipo, kto or orpo, a teacher: distil, or labels of a score head: classify; or one with its
    settings: {name: dpo, beta: 0.1}. In a run file `task: classify` says the same."""
    method: Method = Field(default_factory=LoRA)
    """lora, dora, bottleneck, prefix or full, or the method with its settings: {name: lora, rank:
    16}; qlora is lora over quantize: nf4."""
    from_adapter: list[StartFrom] = Field(default_factory=list)
    """Continue training an adapter, Veneer's or PEFT's: a name in the library, a folder, or a list
    of these or of {adapter, weight}, which is added up. It keeps its settings, except those set
    under `method`; a larger rank keeps its update.
    """
    new_tokens: list[str] = Field(default_factory=list)
    """Texts that become single tokens, ["<order>", "</order>"]. Their embeddings train and are
    stored with the adapter; the base's own tokens do not change. Not with full.
    """
    quantize: Quantize | None = None
    """Store the base's linear layers in 4 bits (nf4, fp4) or in the blocks of a .gguf file (gguf);
    not with full."""
    keep_dense: list[str] = Field(default_factory=list)
    """Modules (names or endings) that stay dense under nf4 and fp4; head, embeddings, norms and
    routers always do."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the base's weights; auto keeps the stored type, or takes float32 on a CPU that is
    slow in it.
    """
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if available."""
    steps: Annotated[int, COUNT] | None = None
    """Optimizer steps; instead of `epochs`."""
    epochs: Annotated[float, EPOCHS] | None = None
    """Passes over the training rows; 3 if neither this nor `steps` is set."""
    batch: Annotated[int, ROWS] = 8
    """Rows per optimizer step."""
    micro_batch: Annotated[int, ROWS] | None = None
    """Rows computed at once, in training and evaluation. Gradients are summed until `batch` is
    reached. Default: batch divided by the processes; with reduce: exact an eighth of batch on any
    number of processes."""
    length: Annotated[int, LENGTH] = 2048
    """Longest row kept, tokens; never more than the model has positions."""
    order: Literal["bucketed", "shuffled", "file"] = "bucketed"
    """Rows of similar length together (fastest), fully shuffled, or in the file's order."""
    share_prompt: bool = True
    """Compute the prompt that all rows of a batch share once."""
    learning_rate: Annotated[float, LEARNING_RATE] | None = None
    """Peak rate. Default of lora and dora: 0.675% of the root mean square of the base's linear
    weights for A and 4 times that for B (SmolLM2-135M: 1.3e-3 and 5.2e-3). Default of other
    methods: lower for wider bases (full: 1.3e-4 at hidden size 576, 2.9e-5 at 4096)."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the rate after warm-up; linear and cosine end at 0."""
    warmup: Annotated[float, SHARE] = 0.03
    """Share of the steps in which the rate rises to its peak."""
    weight_decay: Annotated[float, WEIGHT_DECAY] = 0.0
    """Decoupled weight decay of AdamW."""
    clip: Annotated[float, CLIP] | None = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. null: no clipping."""
    checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in backward: less memory, more
    time."""
    offload: bool = False
    """Keep what backward needs in host memory instead of the GPU's: less memory there, more time;
    exact. CUDA only."""
    shard: bool = False
    """Split the base's layers over the processes; each layer is gathered while it is computed. With
    full the gradient, masters and moments are split too. The same result with less memory and more
    traffic."""
    reduce: Literal["plain", "exact"] = "plain"
    """How gradients of micro-batches are added; exact gives the same bits on any number of
    processes with the same threads each, for 16 bytes per trained value.
    """
    optimizer: OptimizerName = "adamw"
    """adamw8bit stores the moments in 8 bits (needs the extra adamw8bit): worthwhile with full,
    saves little with adapters.
    """
    evaluate_every: Annotated[int, COUNT] | None = None
    """Steps between evaluations on the held-out rows; default: five times a run."""
    show_answers: bool = True
    """Answer the first held-out question at every evaluation, to show progress; takes seconds on a
    CPU."""
    save_every: Annotated[int, COUNT] | None = None
    """Steps between checkpoints; default: at every evaluation."""
    keep: Annotated[int, COUNT] | None = None
    """Checkpoints kept beside the best one; the newest valid one always stays. Default: 2 while the
    run trains, and the newest alone when it is finished."""
    patience: Annotated[int, COUNT] | None = None
    """Stop after this many evaluations without a better held-out loss; default: never."""
    seed: Annotated[int, SEED] = 0
    """Seed of the adapter's initial values, the order of the rows and dropout."""
    log: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)
    """Also send the records to these services; each needs the extra of its name."""
    out: str
    """Folder of the run; must not exist yet, or hold the run that --resume continues."""

    @property
    def rows_at_once(self) -> int:
        """Rows of a micro-batch, in training and evaluations."""
        return rows_at_once(self.batch, self.micro_batch, self.reduce)

    def num_steps(self, rows: int) -> int:
        """Returns the optimizer steps of a run with so many rows in an epoch."""
        epochs = EPOCHS_UNSAID if self.epochs is None else self.epochs
        return self.steps or max(1, math.ceil(epochs * -(-rows // self.batch)))

    def resolved(self, base: RateBasis, rows: int) -> "RunConfig":
        """Returns the settings with the defaults that depend on others, on the base or on the rows.

        A run records them, so that it resumes with what it began with, whatever the defaults are by
        then. rows: of an epoch
        """
        has_length = self.steps is not None or self.epochs is not None
        return self.model_copy(
            update={
                "epochs": self.epochs if has_length else EPOCHS_UNSAID,
                "learning_rate": self.peak_learning_rate(base),
                "evaluate_every": self.evaluation_interval(self.num_steps(rows)),
            }
        )

    def evaluation_interval(self, steps: int) -> int:
        """Returns after how many steps a run of so many is evaluated."""
        return self.evaluate_every or max(1, math.ceil(steps / 5))

    def peak_learning_rate(self, base: RateBasis) -> float:
        """Returns the peak rate that is set, else the method's for this base, or the objective's
        share of it. Raises ConfigError if none is set and the base's weights give none."""
        if self.learning_rate is not None:
            return self.learning_rate
        usual = self.method.for_learning_rate(None).default_learning_rate(base)
        rate = float(f"{usual * self.objective.share_of_rate:.1e}")
        if not LEARNING_RATE.holds(rate):
            raise ConfigError(
                f"this base has no default learning rate: its weights give {rate:g}",
                next_step="Set learning_rate.",
            )
        return rate

    @model_validator(mode="before")
    @classmethod
    def _expand_short_forms(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            if "task" in values and "objective" not in values:
                values["objective"] = values.pop("task")
            if isinstance(values.get("data"), (str, Path)):
                values["data"] = {"train": str(values["data"])}
            if isinstance(start := values.get("from_adapter"), str | Path | dict | list):
                several = start if isinstance(start, list) else [start]
                values["from_adapter"] = [
                    {"adapter": str(entry)} if isinstance(entry, str | Path) else entry
                    for entry in several
                ]
            for part in ("method", "objective"):
                if isinstance(values.get(part), str):
                    values[part] = {"name": values[part]}
            method = values.get("method")
            name = method.get("name") if isinstance(method, dict) else None
            if isinstance(name, str) and name in SHORT_FORMS:
                method_name, quantize = SHORT_FORMS[name]
                values["method"] = {**method, "name": method_name}
                if values.get("quantize") is None:
                    values["quantize"] = quantize
        return values

    @field_validator("out")
    @classmethod
    def _expand_home(cls, value: str) -> str:
        """Expands ~, as a shell would."""
        return str(expanded(value)) if value.startswith("~") else value

    @field_validator("new_tokens")
    @classmethod
    def _check_new_tokens(cls, value: list[str]) -> list[str]:
        if faults := text_faults(value):
            raise ValueError("; ".join(faults))
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> "RunConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("steps and epochs are both given: give one")
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise ValueError(f"micro_batch {self.micro_batch} is larger than batch {self.batch}")
        if self.offload and self.checkpointing:
            raise ValueError(
                "checkpointing keeps so little that offload finds nothing to move: give one"
            )
        if self.shard and weight_format(self.quantize).from_gguf:
            raise ValueError(
                f"quantize {self.quantize} maps a file and takes no memory of a process: leave"
                " shard out"
            )
        if self.shard and self.offload:
            raise ValueError(
                "offload moves what backward needs to the host, and shard lets go of it: give one"
            )
        if self.shard and self.method.trains_base and self.optimizer != "adamw":
            raise ValueError(
                f"with method {self.method.name} shard holds moments in parts, and {self.optimizer}"
                " scales them in blocks that parts cut through: take optimizer adamw, or leave"
                " shard out"
            )
        if self.shard and self.method.trains_base and self.reduce == "exact":
            raise ValueError(
                f"with method {self.method.name} shard adds up gradients as floating-point numbers:"
                " take reduce plain, or leave shard out"
            )
        learns_answers = self.objective.answers and not self.objective.several
        if self.data.train_on == "all" and not learns_answers:
            raise ValueError(
                f"objective {self.objective.name} does not learn from every token, and train_on all"
                " trains prompts too: leave train_on out"
            )
        if self.shard and not self.objective.answers and self.method.trains_base:
            raise ValueError(
                f"with method {self.method.name} shard holds the base's weights in parts, and"
                f" objective {self.objective.name} trains a head beside them: leave shard out"
            )
        if self.objective.has_teacher and self.method.trains_base:
            raise ValueError(
                f"method {self.method.name} trains every weight of the base, and objective"
                f" {self.objective.name} learns from the base: take method lora"
            )
        if self.method.starts_from_teacher and not self.objective.has_teacher:
            raise ValueError(
                "start: teacher reads the text of a teacher, and objective"
                f" {self.objective.name} has none: take objective distil"
            )
        if self.method.keeps_values and self.weight_decay:
            raise ValueError("weight_decay changes frozen tokens, too: leave it 0")
        if self.objective.has_teacher and self.new_tokens:
            raise ValueError(
                f"objective {self.objective.name} learns from a base that does not know"
                " new_tokens: leave them out"
            )
        if self.replay.rows is not None and not self.objective.answers:
            raise ValueError(
                "replay compares tokens with the base, and objective"
                f" {self.objective.name} predicts none: leave replay out"
            )
        if self.replay.rows is not None and self.method.acts_from:
            raise ValueError(
                "replay rows do not hold the activation, before which an adapter is the base: leave"
                " replay out"
            )
        if self.replay.rows is not None and (self.method.trains_base or self.new_tokens):
            raise ValueError(
                "replay compares an adapter with the base, which method full and new_tokens change:"
                " leave it out"
            )
        if self.from_adapter and self.method.trains_base:
            raise ValueError(
                f"method {self.method.name} trains every weight, and from_adapter names an adapter:"
                " give one"
            )
        if self.new_tokens and self.method.trains_base:
            raise ValueError(
                f"method {self.method.name} trains the base's own weights, and new_tokens brings"
                " rows beside them: take method lora"
            )
        if self.quantize is not None and self.method.trains_base:
            raise ValueError(
                f"{trains_packed(self.method, self.quantize)}: leave quantize out, or take method"
                " lora"
            )
        return self


def like_begun(config: RunConfig, given: RunConfig, begun: RunConfig) -> RunConfig:
    """Returns settings with base and dtype written as in the folder of a run that has begun, whose
    base they share. A type that is left open becomes that run's only if that run left it open too.

    given: settings with which that run was started. begun: those in its folder
    """
    base, dtype = config.base, config.dtype
    update = {
        "base": begun.base if str(expanded(base).absolute()) == begun.base else base,
        "dtype": begun.dtype if dtype == given.dtype == "auto" else dtype,
    }
    return config.model_copy(update=update)
