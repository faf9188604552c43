"""What a run started with: base, tokenizer, template, rows, day and settings. A resumed run must
match.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

from pydantic import JsonValue, ValidationError

from veneer.bases.identity.fingerprint import Fingerprint
from veneer.data.batching import equal_neighbours
from veneer.data.examples import Example
from veneer.data.split import BY_COUNT, BY_THRESHOLD
from veneer.errors import AdapterMismatchError, ConfigError
from veneer.files.strict_json import field_faults
from veneer.models.frozen_base import FrozenBase
from veneer.training.config import RunConfig
from veneer.training.output.loggers import flat

MAY_CHANGE = (
    "out",
    "base",
    "device",
    "log",
    "keep",
    "checkpointing",
    "offload",
    "micro_batch",
    "shard",
    "show_answers",
    "from_adapter",
)
"""Settings that may change on resuming: where things are and how they are computed. The base and
the rows are compared by content.
"""
HELD_OUT_BY = BY_COUNT
"""How rows are chosen to be held out (data/split.py)."""
MOST_SHOWN = 10
"""Most rows that an error names."""
MASKS = "prefix"
"""Masks depend on the text up to a token (data/batching.py)."""
ROWS_BY = "number"
"""How rows that became several examples are told apart (data/load.py)."""


@dataclass(frozen=True)
class Origin:
    """Describes a run's start, in every checkpoint's state.json."""

    date: str
    """Day the run started on; a chat template may have written it into the rows."""
    base: dict[str, JsonValue] | None
    """Fingerprint of the base. None, with settings None, from a version that kept only day and
    rows.
    """
    tokenizer: str | None
    template: str | None
    settings: dict[str, Any] | None
    data: str = ""
    """Fingerprint of the rows."""
    masks: str = "row"
    """What dropout's masks depend on; older versions, without this field: the row and the
    position.
    """

    held_out_by: str = BY_THRESHOLD
    """How rows were held out; older versions: by a threshold."""
    rows_by: str = "content"
    """How rows of several examples were told apart; older versions: by content, so that equal
    neighbours were one row."""
    rows_at_once: int | None = None
    """Rows of a micro-batch under `reduce: exact`, whose bits depend on it. None from older
    versions, and under `reduce: plain`.
    """

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def origin_of(config: RunConfig, base: FrozenBase, day: date) -> Origin:
    return Origin(
        date=day.isoformat(),
        base=base.fingerprint().to_dict(),
        tokenizer=base.tokenizer_hash(),
        template=base.template_hash(),
        settings=_settings(config),
        masks=MASKS,
        held_out_by=HELD_OUT_BY,
        rows_by=ROWS_BY,
        rows_at_once=config.rows_at_once if config.reduce == "exact" else None,
    )


def with_rows_at_once(started: Origin, config: RunConfig) -> RunConfig:
    """Returns the settings with the micro-batch size of the run's start, unless micro_batch is set.

    Only `reduce: exact` promises the same bits. Older versions took the whole batch on one process,
    and wrote micro_batch to the run file on several.
    """
    if config.reduce != "exact" or config.micro_batch is not None:
        return config
    return config.model_copy(update={"micro_batch": started.rows_at_once or config.batch})


def with_rate_by_width(config: RunConfig, hidden_size: int) -> RunConfig:
    """Returns the settings of a resumed run with its learning rate. Versions that wrote none down
    took the method's for this hidden size."""
    if config.learning_rate is not None:
        return config
    rate = config.method.rate_by_width(hidden_size) * config.objective.share_of_rate
    return config.model_copy(update={"learning_rate": float(f"{rate:.1e}")})


def check_settings(started: Origin, config: RunConfig) -> None:
    """Raises ConfigError with every setting that differs; settings newer than the run had their
    default.
    """
    if started.settings is None:
        return
    defaults = {**config.model_dump(include={"base", "out"}), "data": {"train": config.data.train}}
    stored = {
        **defaults,
        **started.settings,
        "data": {**defaults["data"], **started.settings.get("data", {})},
    }
    try:
        started_config = RunConfig.model_validate(stored)
    except ValidationError as fault:
        raise ConfigError(
            f"another version of Veneer began the run in {config.out}",
            field_faults(fault),
            "Continue it with the version that began it, or start a new run.",
        ) from fault
    current, previous = flat(_settings(config)), flat(_settings(started_config))
    faults = [
        f"{name}: then {previous.get(name)!r}, now {current.get(name)!r}"
        for name in sorted(current.keys() | previous.keys())
        if current.get(name) != previous.get(name)
    ]
    if faults:
        raise ConfigError(
            f"run.yaml in {config.out} is not what the run started with",
            faults,
            "Write these settings as they were, or start a new run with others.",
        )


def check_masks(started: Origin, config: RunConfig) -> None:
    """Raises ConfigError if dropout's masks would differ from the run's start."""
    if config.method.drops_out and started.masks != MASKS:
        raise ConfigError(
            f"another version of Veneer began the run in {config.out}, with other masks of dropout",
            [
                f"masks then by {started.masks}, now by {MASKS}: steps would differ from those of a"
                " run that never stopped"
            ],
            "Continue it with the version that began it, or start a new run.",
        )


def check_base(started: Origin, now: Origin, config: RunConfig) -> None:
    """Raises AdapterMismatchError if weights, tokenizer or chat template differ from the run's
    start.
    """
    if started.base is None or now.base is None:
        return
    faults = Fingerprint.from_dict(started.base).differences(Fingerprint.from_dict(now.base))
    for part, before, after in (
        ("tokenizer", started.tokenizer, now.tokenizer),
        ("chat template", started.template, now.template),
    ):
        if before != after:
            faults.append(f"{part}: {_short(before)} against {_short(after)}")
    if faults:
        raise AdapterMismatchError(
            f"{config.base} is not the base that the run in {config.out} started on (then against"
            " now)",
            faults,
            "Put that base in its place again, or start a new run with another --out.",
        )


def check_rows(started: Origin, now: str, config: RunConfig) -> None:
    """Raises ConfigError if the fingerprint of the rows differs from the run's start."""
    if started.data != now:
        raise ConfigError(
            f"the rows of {config.data.called} are not those the run in {config.out} started with",
            [f"fingerprint then {started.data}, now {now}"],
            "Restore the file, or start a new run.",
        )


def check_borders(started: Origin, examples: Sequence[Example], config: RunConfig) -> None:
    """Raises ConfigError if equal neighbouring rows were one row in the version that began the run.

    Batches would differ, and the fingerprint of the rows does not show where a row ends.
    """
    if started.rows_by == ROWS_BY:
        return
    equal = equal_neighbours(examples)
    if equal:
        raise ConfigError(
            f"another version of Veneer began the run in {config.out}, which took equal"
            " neighbouring rows for one",
            [
                f"{examples[number].ref} repeats the row before it: two rows now, one then, so"
                " batches would differ"
                for number in equal[:MOST_SHOWN]
            ],
            "Continue it with the version that began it, or start a new run.",
        )


def _settings(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(MAY_CHANGE, True),
            "data": {"train", "validation", "tokens"},
            "replay": {"rows"},
        },
    )


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}…"
