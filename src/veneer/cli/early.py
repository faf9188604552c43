"""What can be refused before torch is loaded, which takes seconds: names of nothing, files that are
not there, places that are taken. The rooms below refuse the same, in the same words; they are asked
here first.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from veneer.bases.loading.shapes import shape_of
from veneer.bases.names.named import refuse_unknown
from veneer.data.files.places import refuse_missing
from veneer.errors import DataError
from veneer.files.atomic import refuse_existing, refuse_unwritable
from veneer.training.config import RunConfig
from veneer.training.state.place import held, refuse_finished, refuse_unless_new


def check_base(source: str | None) -> None:
    """SourceError: it names no base."""
    if source is not None:
        refuse_unknown(source)


def check_plannable(source: str) -> None:
    """SourceError: it names no base, and no size that a plan knows."""
    if shape_of(source) is None:
        refuse_unknown(source)


def check_rows(*named: str | None) -> None:
    """DataError with every set that is not there."""
    refuse_missing([each for each in named if each is not None])


def check_place(config: RunConfig, *, resume: bool) -> None:
    """ConfigError: no such run may stand in its folder. BusyError: another process is in it.
    InputError: nothing can be written there."""
    out = Path(config.out)
    (refuse_finished if resume else refuse_unless_new)(out)
    with held(out):
        pass


def check_run(config: RunConfig) -> None:
    """Its base and its rows."""
    check_base(config.base)
    check_rows(*(one.path for one in (*config.data.train_sets, *config.data.validation_sets)))


def check_new(out: str | Path) -> None:
    """ConfigError: something stands there. InputError: nothing can be written there."""
    refuse_unwritable(out)
    refuse_existing(Path(out), unless=False)


def check_writable(*files: str | Path | None) -> None:
    """InputError: a file that will be written, or written anew, cannot be."""
    for file in files:
        if file is not None:
            refuse_unwritable(file)


def check_files(files: Iterable[Path | None]) -> None:
    """DataError with every one that is not there."""
    if missing := [
        f"{file} is not there" for file in files if file is not None and not file.is_file()
    ]:
        raise DataError("a file cannot be read", missing)
