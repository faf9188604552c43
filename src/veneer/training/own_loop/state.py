"""The state of a trainer on disk, from which a loop goes on bit for bit.

state.safetensors  values and moments, float32       adapter/  the adapter as it is now
state.json         method, options, base, number of steps

A new adapter is attached again by its settings and seed. One that existed before is loaded from
`adapter/`. Then the values are those of state.safetensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from veneer.adapters.config import AdapterConfig, adapter_settings
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.bounds import LENGTH, SEED, check_numbers
from veneer.data.examples import TrainOn
from veneer.errors import AdapterMismatchError, ConfigError, SourceError
from veneer.files.atomic import atomic_folder, refuse_other_content, write_manifest
from veneer.files.home import expanded
from veneer.files.strict_json import json_text
from veneer.models.frozen_base import FrozenBase
from veneer.training.state.checkpoint import load_checkpoint, write_tensors

VERSION = 1


@dataclass(frozen=True)
class TrainerOptions:
    """Options of `base.trainer`. parent: content hash of the adapter that training starts from.

    Raises ConfigError for options out of bounds.
    """

    seed: int = 0
    length: int = 2048
    train_on: TrainOn = "assistant"
    variables: Mapping[str, Any] | None = None
    new_tokens: tuple[str, ...] = ()
    parent: str | None = None

    def __post_init__(self) -> None:
        check_numbers(seed=(SEED, self.seed), length=(LENGTH, self.length))
        if self.train_on not in get_args(TrainOn):
            choices = ", ".join(get_args(TrainOn))
            raise ConfigError(f"train_on is {self.train_on!r}, not one of {choices}")


@dataclass(frozen=True)
class TrainerState:
    """Holds what a trainer starts from: a new adapter, or one with values, moments and steps.

    method     settings of the adapter, or the folder of the stored one
    systems    system turns of the rows so far
    tensors    values and moments, and the first values if a reference needs them; None at the start
    reference  log p of answers by the reference, by their hash
    """

    method: AdapterConfig | str | Path
    options: TrainerOptions
    step: int = 0
    systems: tuple[str | None, ...] = ()
    tensors: Mapping[str, Tensor] | None = None
    reference: Mapping[str, float] = field(default_factory=dict)

    @property
    def has_own_reference(self) -> bool:
        """Returns whether the reference is the adapter at its start, and not the base alone."""
        return self.options.parent is not None or bool(self.options.new_tokens)

    def of_parent(self, content_hash: str) -> "TrainerState":
        """Names the adapter that training starts from; a resumed state keeps the name it has."""
        parent = self.options.parent or content_hash
        return replace(self, options=replace(self.options, parent=parent))


def write_state(
    out: str | Path,
    base: FrozenBase,
    state: TrainerState,
    write_adapter: Callable[[Path], object],
    *,
    replace: bool,
) -> Path:
    """Writes the folder of a state; it appears when it is complete."""
    method = state.method
    content = {
        "format_version": VERSION,
        "base": base.fingerprint().to_dict(),
        "method": None if isinstance(method, str | Path) else method.model_dump(mode="json"),
        "options": asdict(state.options),
        "step": state.step,
        "systems": list(state.systems),
        "reference": dict(state.reference),
    }
    folder = expanded(out)
    if replace:
        refuse_other_content(folder, "state.json")
    with atomic_folder(folder, replace=replace) as partial:
        write_adapter(partial / "adapter")
        write_tensors(partial / "state.safetensors", state.tensors or {})
        (partial / "state.json").write_text(json_text(content), encoding="utf-8")
        write_manifest(partial)
    return folder


def read_trainer_state(named: str | Path, base: FrozenBase) -> TrainerState:
    """Reads the folder of a state.

    Raises SourceError if it is none, AdapterMismatchError if it was made on another base, and
    CorruptFileError if it is damaged.
    """
    folder = expanded(named)
    if not (folder / "state.json").is_file():
        raise SourceError(
            f"{folder} holds no state of a trainer", next_step="Give a folder of save_state."
        )
    tensors, content = load_checkpoint(folder)
    if content.get("format_version") != VERSION:
        raise ConfigError(f"the state in {folder} is of another version of Veneer")
    faults = Fingerprint.from_dict(content["base"]).differences(base.fingerprint())
    if faults:
        raise AdapterMismatchError(
            f"{base.source} is not the base that the state in {folder} was made on (then against"
            " now)",
            faults,
            "Load that base.",
        )
    options, method = TrainerOptions(**content["options"]), content["method"]
    return TrainerState(
        folder / "adapter" if method is None else adapter_settings(method),
        replace(options, new_tokens=tuple(options.new_tokens)),
        content["step"],
        tuple(content["systems"]),
        tensors,
        content.get("reference", {}),
    )


def choose_start(
    base: FrozenBase,
    method: AdapterConfig | str | Path | None,
    options: TrainerOptions,
    resume: str | Path | None,
) -> TrainerState:
    """Returns the state that a trainer starts from, a new or a stored one.

    Raises ConfigError if both are asked for, or neither, and for options that do not fit.
    """
    if resume is None:
        if method is None:
            raise ConfigError(
                "a trainer needs a method, an adapter or resume=",
                next_step="For instance base.trainer(veneer.LoRA(rank=16)).",
            )
        if isinstance(method, str | Path) and options.new_tokens:
            raise ConfigError("new_tokens are for a new adapter, and this one exists")
        return TrainerState(method, options)
    if method is not None or options != TrainerOptions():
        raise ConfigError(
            "a resumed trainer takes its method and options from its state",
            next_step="Leave them out, or leave resume= out.",
        )
    return read_trainer_state(resume, base)
