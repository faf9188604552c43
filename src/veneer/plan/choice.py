"""A choice of settings to plan: those fields of a run that decide its memory and its time."""

from dataclasses import dataclass

from veneer.adapters.config import MethodConfig
from veneer.adapters.labels import HeadSettings
from veneer.bases.compute import DtypeName
from veneer.objectives.config import OwnAnswersConfig, TeacherBase
from veneer.quant.config import Quantize, weight_format
from veneer.training.config import OptimizerName, RunConfig, rows_at_once
from veneer.training.processes.reduce import ReduceKind


@dataclass(frozen=True)
class Choice:
    """Holds what decides a run's cost: fields of RunConfig, and the numbers of processes and new
    tokens.
    """

    method: MethodConfig
    quantize: Quantize | None = None
    dtype: DtypeName = "auto"
    batch: int = 8
    micro_batch: int | None = None
    length: int = 2048
    checkpointing: bool = False
    share_prompt: bool = True
    optimizer: OptimizerName = "adamw"
    offload: bool = False
    shard: bool = False
    reduce: ReduceKind = "plain"
    new_tokens: int = 0
    teacher: TeacherBase | None = None
    head: HeadSettings | None = None
    own_answers: OwnAnswersConfig | None = None
    processes: int = 1

    @classmethod
    def of(cls, config: RunConfig, processes: int = 1) -> "Choice":
        return cls(
            method=config.method,
            quantize=config.quantize,
            dtype=config.dtype,
            batch=config.batch,
            micro_batch=config.micro_batch,
            length=config.length,
            checkpointing=config.checkpointing,
            share_prompt=config.share_prompt,
            optimizer=config.optimizer,
            offload=config.offload,
            shard=config.shard,
            reduce=config.reduce,
            new_tokens=len(config.new_tokens),
            teacher=config.objective.teacher_base,
            head=config.objective.head,
            own_answers=config.objective.own_answers_config,
            processes=processes,
        )

    @property
    def rows_at_once(self) -> int:
        """Returns the rows of a micro-batch, as training/coordination.py divides the batch."""
        return rows_at_once(self.batch, self.micro_batch, self.reduce, self.processes)

    @property
    def in_shards(self) -> bool:
        """Returns whether layers are sharded: a single process holds everything."""
        return self.shard and self.processes > 1

    @property
    def label(self) -> str:
        """Returns the name on the command line: qlora for lora over 4 bits."""
        return weight_format(self.quantize).before_method + self.method.name
