"""What a run started with: its base, tokenizer, template, rows, day and settings. A resumed run has
the same, or stops."""

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
"""Settings that say where things are and how they are computed, not what. The base and the rows are
compared as such."""
HELD_OUT_BY = BY_COUNT
"""How rows are held out (data/split.py)."""
MOST_SHOWN = 10
"""Rows that an error names."""
MASKS = "prefix"
"""By the text up to a token (data/batching.py)."""
ROWS_BY = "number"
"""What tells apart rows that became several examples (data/load.py)."""


@dataclass(frozen=True)
class Origin:
    """Kept in every checkpoint's state.json."""

    date: str
    """Day the run started on, which a chat template may have written into the rows."""
    base: dict[str, JsonValue] | None
    """Fingerprint of the base. None here and in the settings: of a version that kept only the day
    and the rows."""
    tokenizer: str | None
    template: str | None
    settings: dict[str, Any] | None
    data: str = ""
    """Fingerprint of the rows."""
    masks: str = "row"
    """By what dropout's masks are drawn; of a version that did not say: by the row and the place in
    it."""

    held_out_by: str = BY_THRESHOLD
    """How rows were held out; of a version that did not say: by a threshold."""
    rows_by: str = "content"
    """What told apart rows of several examples; of a version that did not say: their content, so
    that equal neighbours were one row."""
    rows_at_once: int | None = None
    """Rows of a micro-batch under `reduce: exact`, whose bits depend on it. None: of a version that
    did not say, and under `reduce: plain`."""

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


def with_rows_at_once(then: Origin, config: RunConfig) -> RunConfig:
    """The settings of a run that goes on with as many rows at once as it began with, unless
    micro_batch is set.

    Only `reduce: exact` promises the same bits. A version that did not keep the number took the
    whole batch on one process, and wrote micro_batch to the run file on several.
    """
    if config.reduce != "exact" or config.micro_batch is not None:
        return config
    return config.model_copy(update={"micro_batch": then.rows_at_once or config.batch})


def check_settings(then: Origin, config: RunConfig) -> None:
    """Raises ConfigError with every setting that is another one now; one that did not exist then
    had its default."""
    if then.settings is None:
        return
    defaults = {**config.model_dump(include={"base", "out"}), "data": {"train": config.data.train}}
    stored = {
        **defaults,
        **then.settings,
        "data": {**defaults["data"], **then.settings.get("data", {})},
    }
    try:
        started = RunConfig.model_validate(stored)
    except ValidationError as fault:
        raise ConfigError(
            f"another version of Veneer began the run in {config.out}",
            field_faults(fault),
            "Continue it with the version that began it, or start a new run.",
        ) from fault
    ours, theirs = flat(_settings(config)), flat(_settings(started))
    faults = [
        f"{name}: then {theirs.get(name)!r}, now {ours.get(name)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if faults:
        raise ConfigError(
            f"run.yaml in {config.out} is not what the run started with",
            faults,
            "Write these settings as they were, or start a new run with others.",
        )


def check_masks(then: Origin, config: RunConfig) -> None:
    """Raises ConfigError if dropout would go on with other masks than the run began with."""
    if config.method.drops_out and then.masks != MASKS:
        raise ConfigError(
            f"another version of Veneer began the run in {config.out}, with other masks of dropout",
            [
                f"masks then by {then.masks}, now by {MASKS}: steps would not be those of the run"
                " that never stopped"
            ],
            "Continue it with the version that began it, or start a new run.",
        )


def check_base(then: Origin, now: Origin, config: RunConfig) -> None:
    """Raises AdapterMismatchError if the weights, the tokenizer or the chat template are not those
    of the start."""
    if then.base is None or now.base is None:
        return
    faults = Fingerprint.from_dict(then.base).differences(Fingerprint.from_dict(now.base))
    for what, was, found in (
        ("tokenizer", then.tokenizer, now.tokenizer),
        ("chat template", then.template, now.template),
    ):
        if was != found:
            faults.append(f"{what}: {_short(was)} against {_short(found)}")
    if faults:
        raise AdapterMismatchError(
            f"{config.base} is not the base that the run in {config.out} started on (then against"
            " now)",
            faults,
            "Put that base in its place again, or start a new run with another --out.",
        )


def check_rows(then: Origin, now: str, config: RunConfig) -> None:
    """Raises ConfigError if the fingerprint of the rows is another one."""
    if then.data != now:
        raise ConfigError(
            f"the rows of {config.data.called} are not those the run in {config.out} started with",
            [f"fingerprint then {then.data}, now {now}"],
            "Restore the file, or start a new run.",
        )


def check_borders(then: Origin, examples: Sequence[Example], config: RunConfig) -> None:
    """Raises ConfigError if neighbouring rows are equal that were one row to the version that began
    the run.

    Its batches were other ones, and the fingerprint of the rows does not show where a row ends.
    """
    if then.rows_by == ROWS_BY:
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
        exclude={**dict.fromkeys(MAY_CHANGE, True), "data": {"train", "validation", "tokens"}},
    )


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}…"
