"""Bodies of the requests that the page's Teach tab sends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from veneer.bounds import LENGTH, SHARE
from veneer.data.examples import Layout, LongRows, TrainOn
from veneer.serve.limits import MOST_NAME
from veneer.serve.protocols.body import Body, Length, Num
from veneer.serve.refusals import Fault

MOST_COLUMNS = 16
MOST_COLUMN = 200
MOST_SETTINGS = 64
OFFERED = (
    "epochs",
    "steps",
    "learning_rate",
    "method.rank",
    "method.alpha",
    "method.dropout",
    "method.rslora",
    "method.init",
    "batch",
    "micro_batch",
    "schedule",
    "warmup",
    "weight_decay",
    "clip",
    "order",
    "checkpointing",
    "evaluate_every",
    "save_every",
    "patience",
    "show_answers",
    "seed",
    "quantize",
    "dtype",
    "objective.name",
    "objective.system",
)
"""Settings that the page offers, in its order."""
OBJECTIVE = "objective.name"
DOCUMENT = "objective.document"
"""A setting whose file is uploaded: the page never names a path."""
Column = Annotated[str, Length(1, MOST_COLUMN)]


class RowChoices(Body):
    """How rows are read, and which of them are held out."""

    layout: Layout = "auto"
    """layout of the rows; auto recognises it by the columns"""
    columns: Annotated[dict[str, Column], Length(0, MOST_COLUMNS)] = Field(default_factory=dict)
    """for names of the layout, the columns of the file that hold them"""
    validation_share: Annotated[float, Num(SHARE)] = 0.05
    """share of the rows to hold out"""
    train_on: TrainOn = "assistant"
    """tokens to train on"""
    length: Annotated[int, Num(LENGTH)] = 2048
    """longest row in tokens"""
    long_rows: LongRows = "refuse"
    """what happens to longer rows"""

    def conflicts(self) -> Iterator[Fault]:
        columns = list(self.columns.values())
        if twice := sorted({column for column in columns if columns.count(column) > 1}):
            yield Fault("columns", f"column {twice[0]!r} is chosen twice")


TaskKind = Literal["style", "format", "task", "instructions", "knowledge"]
Value = str | int | float | bool


class MethodChoices(Body):
    """What is trained and with which settings."""

    base: Annotated[str, Length(0, MOST_NAME)] = ""
    """name of a base on this machine; empty: the server's"""
    kind: TaskKind = "task"
    """what the rows teach; the advice depends on it"""
    method: Literal["lora", "qlora", "dora", "prefix", "bottleneck"] = "lora"
    """what is trained"""
    settings: Annotated[dict[str, Any], Length(0, MOST_SETTINGS)] = Field(default_factory=dict)
    """other settings of a run file by their path, such as method.rank; absent ones have their
    default"""

    def conflicts(self) -> Iterator[Fault]:
        for path, value in self.settings.items():
            if path not in OFFERED:
                yield Fault("settings", f"{path[:80]!r} is not offered here")
            elif not isinstance(value, Value):
                yield Fault(f"settings.{path}", "is not a number, a text, true or false")


class PlanBody(MethodChoices):
    """The body of a request for a plan."""

    compare: bool = False
    """plans every method"""
    keep: bool = True
    """keeps the choices with the rows"""


ExportKind = Literal["llamacpp_adapter", "llamacpp", "ollama"]


class ExportBody(Body):
    """The body of a request for a file that another program reads."""

    to: ExportKind
    """llamacpp_adapter: the adapter alone; llamacpp and ollama: base and adapter as one model"""
    type: Literal["q8_0", "f16"] = "q8_0"
    """type of a whole model's weights"""


class JudgeBody(Body):
    """The body of a request to evaluate the base and the adapter on the held-out rows."""

    other: Annotated[str, Length(0, MOST_NAME)] = ""
    """another adapter of the library, which is evaluated too; empty: none"""


class WorkBody(Body):
    """The body of a request to stop an evaluation or an export."""

    kind: Literal["judge", "export"]
    """what is stopped"""


class KeepBody(Body):
    """The body of a request to keep an adapter."""

    name: Annotated[str, Length(1, MOST_NAME)]
    """name in the library"""
    next_version: bool = False
    """whether it may be the next version of a name that is taken"""


class NoBody(Body):
    """The body of a request that needs no field."""
