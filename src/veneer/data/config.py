"""Which rows a run takes, and how they are read: what a run file says under `data`. No torch:
`--help` reads this."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from veneer.bounds import PART, SET_WEIGHT, SHARE
from veneer.files.settings import Settings

RowFormat = Literal["auto", "chat", "prompt_completion", "alpaca", "sharegpt", "text"]
ColumnMap = dict[str, str | None]


class SetConfig(Settings):
    """One of several sets that a run takes."""

    path: str
    """As `data.train`."""
    name: str | None = None
    """What reports call it; default: its path."""
    weight: Annotated[float, SET_WEIGHT] = 1.0
    """How often an epoch takes each of its rows: 0.5 takes every second one, the others in the next
    epoch."""
    share: Annotated[float, PART] | None = None
    """Instead of a weight: the part of an epoch that it makes up, 0.1 of general rows against
    forgetting, say."""
    format: RowFormat | None = None
    """Default: as `data.format`."""
    map: ColumnMap = Field(default_factory=dict)
    """Default: as `data.map`."""

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


class DataConfig(Settings):
    train: Sets
    """The training rows: a file (.jsonl, .json, .csv, also .gz or .zst; .parquet), a folder or
    pattern of such, an address of fsspec's, a data set of the hub (org/name); or a list of sets:
    {path, weight, format, map}."""
    validation: Sets | None = None
    """The held-out rows, named likewise; without them, `validation_share` of the training rows is
    held out."""
    validation_share: Annotated[float, SHARE] = 0.05
    """Share of rows held out, of each set: the prompts with the smallest hashes; 0 holds nothing
    out."""
    shares_of: Literal["rows", "tokens"] = "rows"
    """What the sets' shares are counted in."""
    tokens: Literal["auto", "memory", "files"] = "auto"
    """Where a run keeps its tokens: auto puts those of 64 MiB of rows and more into files of the
    cache folder, built once."""
    format: RowFormat = "auto"
    """How a row is laid out; auto looks at the columns."""
    map: ColumnMap = Field(default_factory=dict)
    """Columns under the names that layouts have, {question: prompt, answer: completion}; null
    leaves one out, in messages too."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are learnt: every assistant turn, the last one only, or all tokens."""
    long_rows: Literal["refuse", "drop", "cut"] = "refuse"
    """What happens to rows longer than `length`: refuse to start, leave them out, or cut their
    end."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """[a.jsonl, {path: b.jsonl}] and {path: a.jsonl}."""
        if isinstance(value, dict):
            return [value]
        return (
            [{"path": each} if isinstance(each, str) else each for each in value]
            if isinstance(value, list)
            else value
        )

    @model_validator(mode="after")
    def _sets_fit(self) -> Self:
        if isinstance(self.train, list):
            if not self.train:
                raise ValueError("data.train is an empty list: name a set")
            shares = [each.share for each in self.train if each.share is not None]
            whole = sum(shares)
            if len(shares) < len(self.train) and whole >= 1:
                raise ValueError(
                    f"the sets' shares make up {whole:g}, and nothing is left for the others"
                )
            if len(shares) == len(self.train) and abs(whole - 1) > 1e-6:
                raise ValueError(
                    f"the sets' shares make up {whole:g} of an epoch, not 1: leave one out for the"
                    " rest"
                )
            names = [each.called for each in self.train]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two sets are called {', '.join(twice)}: give each a name")
        return self

    @property
    def train_sets(self) -> list[SetConfig]:
        return _sets(self.train)

    @property
    def validation_sets(self) -> list[SetConfig]:
        """Empty: a part of each training set is held out."""
        return [] if self.validation is None else _sets(self.validation)

    @property
    def called(self) -> str:
        """The training rows, for a message."""
        return (
            self.train
            if isinstance(self.train, str)
            else ", ".join(each.path for each in self.train)
        )


def _sets(named: str | list[SetConfig]) -> list[SetConfig]:
    return [SetConfig(path=named)] if isinstance(named, str) else named
