"""Reads the values with the lowest held-out loss from their checkpoint, or the next best if that
one is damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.errors import CorruptFileError
from veneer.training.state.checkpoint import checkpoint_path, load_values
from veneer.training.state.progress import RunProgress


def read_best(
    folder: Path, progress: RunProgress, say: Callable[[str], None]
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """Returns (the best values, the damaged checkpoint that should have held them or None).

    Values are None if every better checkpoint is damaged: the last values stay. `progress` then
    names the checkpoint that was taken instead. Reads the values alone; the moments, twice as
    large, are no longer needed.
    """
    assert progress.best_step is not None
    try:
        values = load_values(checkpoint_path(folder, progress.best_step))
    except CorruptFileError as fault:
        damaged = {"step": progress.best_step, "loss": progress.best_loss, "faults": fault.faults}
        say(f"{fault.headline}, the best one: {'; '.join(fault.faults)}")
        return _read_next_best(folder, progress, say), damaged
    say(
        f"the values of step {progress.best_step} are kept: the lowest held-out loss,"
        f" {progress.best_loss:.4f}"
    )
    return values, None


def _read_next_best(
    folder: Path, progress: RunProgress, say: Callable[[str], None]
) -> Tensor | None:
    for by_step in (progress.losses, progress.nats):
        by_step.pop(str(progress.best_step), None)
    progress.best_step = progress.best_loss = None
    values = None
    for loss, step in sorted((loss, int(step)) for step, loss in progress.losses.items()):
        if step != progress.step:
            try:
                values = load_values(checkpoint_path(folder, step))
            except CorruptFileError:
                continue
        progress.best_step, progress.best_loss = step, loss
        break
    kept_values = (
        f"those of step {progress.best_step}, held-out loss {progress.best_loss:.4f},"
        if progress.best_step
        else "the last"
    )
    say(f"instead of the values of that step {kept_values} are kept")
    return values
