"""The `data` part of a run file: which rows a run trains on and how they are read.

Imports no torch, because `--help` reads this module.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from veneer.bounds import PART, SET_WEIGHT, SHARE
from veneer.data.examples import Layout, LongRows, TrainOn
from veneer.files.settings import StrictSettings

ColumnMap = dict[str, str | None]


class SetConfig(StrictSettings):
    """One of several data sets that a run trains on."""

    path: str
    """A file, folder, pattern, address or hub data set, as in `data.train`."""
    name: str | None = None
    """Name in reports; default: the path."""
    weight: Annotated[float, SET_WEIGHT] = 1.0
    """How often an epoch uses each row: 0.5 uses every second row and the rest in the next
    epoch."""
    share: Annotated[float, PART] | None = None
    """Instead of a weight: this set's part of an epoch, such as 0.1 of general rows against
    forgetting."""
    format: Layout | None = None
    """Default: `data.format`."""
    map: ColumnMap = Field(default_factory=dict)
    """Default: `data.map`."""

    @property
    def called(self) -> str:
        return self.name or self.path

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.share is not None and self.weight != 1.0:
            raise ValueError(f"{self.path} has a weight and a share: give one")
        return self


def _kind(value: Any) -> str:
    return "sets" if isinstance(value, list) else "file"


Sets = Annotated[
    Annotated[str, Tag("file")] | Annotated[list[SetConfig], Tag("sets")], Discriminator(_kind)
]


class DataConfig(StrictSettings):
    train: Sets
    """The training rows: a file (.jsonl, .json, .csv, also .gz or .zst; .parquet), a folder or
    pattern of files, an fsspec address, a Hugging Face data set (org/name); or a list of sets:
    {path, weight, format, map}."""
    validation: Sets | None = None
    """The held-out rows: given in the same forms. Without them, `validation_share` of the training
    rows is held out."""
    validation_share: Annotated[float, SHARE] = 0.05
    """Share of each set's rows to hold out: the prompts with the smallest hashes. 0 holds nothing
    out."""
    shares_of: Literal["rows", "tokens"] = "rows"
    """Whether the sets' shares count rows or tokens."""
    tokens: Literal["auto", "memory", "files"] = "auto"
    """Where a run keeps its tokens. From 64 MiB of rows on, auto writes them to the cache folder
    once and reads them from there."""
    format: Layout = "auto"
    """Row layout; auto recognises it by the columns."""
    map: ColumnMap = Field(default_factory=dict)
    """Renames columns to the names of the layout: {question: prompt, answer: completion}. null
    drops a column, also inside messages."""
    train_on: TrainOn = "assistant"
    """Tokens to train on: every assistant turn, the last one only, or all tokens."""
    long_rows: LongRows = "refuse"
    """Rows longer than `length`: refuse to start, drop them, or cut their end."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _expand_short_forms(cls, value: Any) -> Any:
        """Expands short forms: [a.jsonl, {path: b.jsonl}] and {path: a.jsonl}."""
        if isinstance(value, dict):
            return [value]
        return (
            [{"path": item} if isinstance(item, str) else item for item in value]
            if isinstance(value, list)
            else value
        )

    @model_validator(mode="after")
    def _sets_fit(self) -> Self:
        if isinstance(self.train, list):
            if not self.train:
                raise ValueError("data.train is an empty list: name a set")
            shares = [train_set.share for train_set in self.train if train_set.share is not None]
            whole = sum(shares)
            if len(shares) < len(self.train) and whole >= 1:
                raise ValueError(
                    f"the sets' shares add up to {whole:g}, which leaves nothing for the other sets"
                )
            if len(shares) == len(self.train) and abs(whole - 1) > 1e-6:
                raise ValueError(
                    f"the sets' shares add up to {whole:g}, not 1: leave out one share for the rest"
                )
        for sets in (self.train_sets, self.validation_sets):
            names = [data_set.called for data_set in sets]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two sets are called {', '.join(twice)}: give each a name")
        for data_set in self.validation_sets:
            if data_set.weight != 1.0 or data_set.share is not None:
                raise ValueError(
                    f"{data_set.called} is held out, and an evaluation uses each of its rows once:"
                    " leave weight and share out"
                )
        return self

    @property
    def train_sets(self) -> list[SetConfig]:
        return _sets(self.train)

    @property
    def validation_sets(self) -> list[SetConfig]:
        """Returns the validation sets. Empty if a part of each training set is held out."""
        return [] if self.validation is None else _sets(self.validation)

    @property
    def called(self) -> str:
        """Returns the training set's name for messages."""
        return (
            self.train
            if isinstance(self.train, str)
            else ", ".join(train_set.path for train_set in self.train)
        )


def _sets(path_or_sets: str | list[SetConfig]) -> list[SetConfig]:
    return [SetConfig(path=path_or_sets)] if isinstance(path_or_sets, str) else path_or_sets
