"""Progress of a run, as a checkpoint's state.json holds it; reads this layout and the first one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError
from veneer.training.state.checkpoint import read_state
from veneer.training.state.origin import Origin


@dataclass
class RunProgress:
    """Holds how far a run is and what it has measured. Losses in nats per trained token."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    """Batches of this epoch that were trained."""
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_better: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    timed_seconds: float = 0.0
    """Seconds in steps, without the first step of every process."""
    timed_examples: int = 0
    timed_tokens: int = 0
    timed_parts: dict[str, float] = field(default_factory=dict)
    """Timed seconds by part, the mean over all processes; empty for one process."""
    total_seconds: float = 0.0
    trained_tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """Held-out loss of every checkpoint on disk and of this one, by step."""
    nats: dict[str, list[float]] = field(default_factory=dict)
    """Held-out losses in cells (held_out/losses.py), by step: of the same checkpoints, and "0" for
    those before step 1. Of answers they are nats."""
    preference: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Figures of the objective on held-out rows, of preferences or labels, by step like `nats`;
    empty for answers."""
    sample: dict[str, Any] = field(default_factory=dict)
    """The sample row's answer before training."""

    def count_step(self, *, loss: float, trained_tokens: int) -> None:
        self.step += 1
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        self.trained_tokens += trained_tokens

    def count_time(
        self, seconds: float, parts: Mapping[str, float], *, examples: int, tokens: int
    ) -> None:
        self.timed_seconds += seconds
        self.timed_examples += examples
        self.timed_tokens += tokens
        for part, spent in parts.items():
            self.timed_parts[part] = self.timed_parts.get(part, 0.0) + spent

    def forget_losses_except(self, steps: Iterable[int]) -> None:
        """Drops the losses of checkpoints that are no longer on disk; the nats of step 0 stay."""
        names = {str(step) for step in steps}
        self.losses = {step: loss for step, loss in self.losses.items() if step in names}
        self.nats = {step: nats for step, nats in self.nats.items() if step in names | {"0"}}
        figures = self.preference.items()
        self.preference = {step: values for step, values in figures if step in names | {"0"}}


@dataclass(frozen=True)
class SavedState:
    """Holds the content of state.json."""

    origin: Origin
    progress: RunProgress


def load_state(path: Path) -> SavedState:
    """Reads a checkpoint's state. Raises CorruptFileError if another version of Veneer wrote it."""
    stored = read_state(path)
    if "progress" not in stored and "date" in stored and "data" in stored:
        stored = _from_first_layout(stored)
    try:
        return SavedState(Origin(**stored["origin"]), RunProgress(**stored["progress"]))
    except (KeyError, TypeError) as fault:
        raise CorruptFileError(
            f"the checkpoint {path} is not of this version of Veneer",
            [f"state.json: {fault}"],
            "Continue it with the version that wrote it, or start a new run.",
        ) from fault


def _from_first_layout(stored: dict[str, Any]) -> dict[str, Any]:
    """Converts a state of the first layout, which held the fields of the progress alone."""
    progress = dict(stored)
    origin = dict.fromkeys(("base", "tokenizer", "template", "settings"))
    origin |= {name: progress.pop(name) for name in ("date", "data")}
    if progress.get("best_step") is not None:
        progress["losses"] = {str(progress["best_step"]): progress.get("best_loss")}
    return {"origin": origin, "progress": progress}
