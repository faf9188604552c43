"""The place of a run: a new run needs an empty folder, and one process at a time works in it.

Imports no torch: the command line checks this first.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from veneer.errors import ConfigError
from veneer.files.lock import locked
from veneer.files.partial import PREFIX

LOCK = ".lock"


def refuse_unless_new(out: Path) -> None:
    """Raises ConfigError if a new run would be among other files; unfinished files do not count."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file: a run is a folder", next_step="Take another --out.")
    if all(_is_leftover(path.name) for path in out.iterdir()):
        return
    hint = "Take another --out."
    if (out / "summary.json").is_file():
        hint = f"The run in it is finished; to rebuild its report: veneer report {out}. {hint}"
    elif (out / "run.yaml").is_file():
        hint = f"Continue it with --resume {out}, or take another --out."
    raise ConfigError(f"{out} exists and is not empty: nothing is overwritten", next_step=hint)


def refuse_finished(out: Path) -> None:
    """Raises ConfigError for a run that is finished: there is nothing to continue."""
    if (out / "summary.json").is_file():
        raise ConfigError(
            f"the run in {out} is finished",
            next_step=(
                f"Start a new run with another --out; to rebuild its report: veneer report {out}"
            ),
        )


@contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Locks the folder for this process within the block. Raises BusyError, or InputError.

    A folder that is empty at the end is removed with its lock, so a refused run leaves nothing
    behind.
    """
    is_new = not out.exists()
    with locked(out / LOCK, wait_seconds=0):
        try:
            yield
        finally:
            # The run's own error matters more, and a lock file that stays locks nothing.
            with suppress(OSError):
                (out / LOCK).unlink(missing_ok=True)
                if is_new and not any(out.iterdir()):
                    out.rmdir()


def _is_leftover(name: str) -> bool:
    return name == LOCK or name.startswith(PREFIX)
