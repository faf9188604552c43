"""Checks made before torch is loaded, which takes seconds: unknown names, missing files, existing
output folders. Lower folders make the same checks; here they run first.
"""

from collections.abc import Iterable
from pathlib import Path

from veneer.bases.loading.shapes import shape_of
from veneer.bases.names.named import refuse_unknown
from veneer.data.files.places import refuse_missing
from veneer.errors import ConfigError, DataError
from veneer.files.atomic import refuse_existing, refuse_unwritable, refuse_unwritable_file
from veneer.files.strict_json import illegible
from veneer.training.config import RunConfig
from veneer.training.state.place import locked_folder, refuse_finished, refuse_unless_new


def check_base(source: str | None) -> None:
    """Raises SourceError if a name is no base."""
    if source is not None:
        refuse_unknown(source)


def check_plannable(source: str) -> None:
    """Raises SourceError if a name is neither a base nor a size that a plan knows."""
    if shape_of(source) is None:
        refuse_unknown(source)


def check_rows(*named: str | None) -> None:
    """Raises DataError with every data set that is missing."""
    refuse_missing([name for name in named if name is not None])


def check_place(config: RunConfig, *, resume: bool) -> None:
    """Checks the output folder of a run.

    Raises ConfigError if its content does not allow the run, BusyError if another process uses it,
    and InputError if it is not writable.
    """
    out = Path(config.out)
    (refuse_finished if resume else refuse_unless_new)(out)
    with locked_folder(out):
        pass


def check_run(config: RunConfig) -> None:
    """Checks that the base, the rows and what a teacher reads exist."""
    check_base(config.base)
    check_base(
        None if config.objective.teacher_base is None else config.objective.teacher_base.base
    )
    config.objective.teacher_text()
    check_rows(
        *(row_set.path for row_set in (*config.data.train_sets, *config.data.validation_sets)),
        *([] if config.replay.rows is None else [config.replay.rows]),
    )


def check_new(out: str | Path) -> None:
    """Raises ConfigError if the output exists or its path is no UTF-8, which tokenizers cannot
    write to, and InputError if it is not writable."""
    if faults := illegible(str(out), "output"):
        raise ConfigError("the path of the output is no UTF-8", faults, "Choose another path.")
    refuse_unwritable(out)
    refuse_existing(Path(out), unless=False)


def check_writable(*files: str | Path | None) -> None:
    """Raises InputError if one of the output files is not writable, and ConfigError if a folder or
    device is there."""
    for file in files:
        if file is not None:
            refuse_unwritable_file(file)


def check_files(files: Iterable[Path | None]) -> None:
    """Raises DataError with every file that is missing."""
    if missing := [
        f"{file} was not found" for file in files if file is not None and not file.is_file()
    ]:
        raise DataError("a file cannot be read", missing)
