"""Where a run may stand: a new one only where nothing is, one process at a time. No torch here: the
command line asks before it loads any."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from veneer.errors import ConfigError
from veneer.files.lock import locked
from veneer.files.partial import PREFIX

LOCK = ".lock"


def refuse_unless_new(out: Path) -> None:
    """ConfigError where a new run would stand among other files; remains of a write that was never
    done are none."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file: a run is a folder", next_step="Take another --out.")
    if all(_remains(path.name) for path in out.iterdir()):
        return
    hint = "Take another --out."
    if (out / "summary.json").is_file():
        hint = f"The run in it is finished; to rebuild its report: veneer report {out}. {hint}"
    elif (out / "run.yaml").is_file():
        hint = f"Continue it with --resume {out}, or take another --out."
    raise ConfigError(f"{out} exists and is not empty: nothing is overwritten", next_step=hint)


def refuse_finished(out: Path) -> None:
    """ConfigError for a run that came to its end: there is nothing to continue."""
    if (out / "summary.json").is_file():
        raise ConfigError(
            f"the run in {out} is finished",
            next_step=(
                f"Start a new run with another --out; to rebuild its report: veneer report {out}"
            ),
        )


@contextmanager
def held(out: Path) -> Iterator[None]:
    """The folder is this process's alone within the block. Raises BusyError, or InputError where
    nothing can be written.

    A folder that holds nothing at the end goes with its lock: a run that was refused leaves nothing
    behind.
    """
    made = not out.exists()
    with locked(out / LOCK, wait_seconds=0):
        try:
            yield
        finally:
            with suppress(
                OSError
            ):  # what ended the run is told, and a lock file that stays locks nothing
                (out / LOCK).unlink(missing_ok=True)
                if made and not any(out.iterdir()):
                    out.rmdir()


def _remains(name: str) -> bool:
    return name == LOCK or name.startswith(PREFIX)
