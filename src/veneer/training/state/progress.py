"""Where a run stands: what a checkpoint's state.json holds, read back from this layout and the
first one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.errors import CorruptFileError
from veneer.training.state.checkpoint import read_state
from veneer.training.state.origin import Origin


@dataclass
class RunProgress:
    """Where a run stands; what a checkpoint's state.json holds. Losses in nats per trained
    token."""

    step: int = 0
    epoch: int = 0
    index: int = 0
    """Batches of this epoch already taken."""
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_better: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    timed_seconds: float = 0.0
    """Steps only, the first of every process left out."""
    timed_examples: int = 0
    timed_tokens: int = 0
    timed_parts: dict[str, float] = field(default_factory=dict)
    """Of several processes: what the timed seconds went into, the mean of all."""
    total_seconds: float = 0.0
    trained_tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """Held-out loss of each checkpoint that there is, by its step, and of this one."""
    nats: dict[str, list[float]] = field(default_factory=dict)
    """Held-out nats, in cells (held_out.py): before step 1, by "0", and of each of these
    checkpoints."""
    sample: dict[str, Any] = field(default_factory=dict)
    """The sample row's answer before training."""


@dataclass(frozen=True)
class SavedState:
    """What state.json holds."""

    origin: Origin
    progress: RunProgress


def load_state(path: Path) -> SavedState:
    """What a checkpoint says beside its tensors. CorruptFileError: another version of Veneer wrote
    it."""
    stored = read_state(path)
    if "progress" not in stored and "date" in stored and "data" in stored:
        stored = _of_first_layout(stored)
    try:
        return SavedState(Origin(**stored["origin"]), RunProgress(**stored["progress"]))
    except (KeyError, TypeError) as fault:
        raise CorruptFileError(
            f"the checkpoint {path} is not of this version of Veneer",
            [f"state.json: {fault}"],
            "Continue it with the version that wrote it, or start a new run.",
        ) from fault


def _of_first_layout(stored: dict[str, Any]) -> dict[str, Any]:
    """A state of the first layout, in which the progress stood alone, as one of today's."""
    progress = dict(stored)
    origin = dict.fromkeys(("base", "tokenizer", "template", "settings"))
    origin |= {name: progress.pop(name) for name in ("date", "data")}
    if progress.get("best_step") is not None:
        progress["losses"] = {str(progress["best_step"]): progress.get("best_loss")}
    return {"origin": origin, "progress": progress}
