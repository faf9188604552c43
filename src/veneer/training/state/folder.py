"""A run's folder: its files, and the checkpoint to resume from."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml
from pydantic import ValidationError

from veneer.bases.names.named import NAMED
from veneer.data.config import SetConfig
from veneer.data.files.places import absolute
from veneer.data.files.writing import Record, write_records
from veneer.errors import ConfigError, CorruptFileError
from veneer.files.atomic import write_text
from veneer.files.home import absolute_if_exists
from veneer.files.partial import PREFIX, remove, unfinished
from veneer.files.strict_json import field_faults, read_yaml
from veneer.files.system_errors import explained
from veneer.training.config import RunConfig
from veneer.training.state.checkpoint import newest_valid, numbers
from veneer.training.state.place import locked_folder, refuse_finished


@contextmanager
def written_rows(out: Path, rows: Mapping[str, Iterable[Record]]) -> Iterator[None]:
    """Writes rows to files of these names in the folder; removes them if no run began within the
    block.
    """
    try:
        for name, records in rows.items():
            write_records(out / name, records)
        yield
    finally:
        if not (out / "run.yaml").is_file():
            for name in rows:
                (out / name).unlink(missing_ok=True)


def resume_point(out: Path, say: Callable[[str], None]) -> Path | None:
    """Returns the checkpoint to continue from, None if the run stopped before its first.

    Raises ConfigError for a finished run, CorruptFileError if every checkpoint is damaged.
    """
    refuse_finished(out)
    folder = out / "checkpoints"
    if not numbers(folder):
        say("stopped before its first checkpoint: it starts again")
        return None
    path, faults = newest_valid(folder)
    for fault in faults:
        say(f"skipped a damaged checkpoint: {fault}")
    if path is None:
        raise CorruptFileError(
            f"no checkpoint in {out} can be resumed",
            faults,
            f"Restore one, or remove {folder} to start again.",
        )
    return path


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Returns the settings with absolute paths of the files that they name."""

    def absolute_sets(named: str | list[SetConfig] | None) -> str | list[SetConfig] | None:
        if not isinstance(named, list):
            return None if named is None else absolute(named)
        return [
            set_config.model_copy(
                update={"path": absolute(set_config.path), "name": set_config.called}
            )
            for set_config in named
        ]

    rows = {
        "train": absolute_sets(config.data.train),
        "validation": absolute_sets(config.data.validation),
    }
    base = config.base if config.base in NAMED else absolute_if_exists(config.base)
    replay = config.replay
    if replay.rows is not None:
        replay = replay.model_copy(update={"rows": absolute(replay.rows)})
    data = config.data.model_copy(update=rows)
    return config.model_copy(update={"base": base, "data": data, "replay": replay})


def write_run_file(config: RunConfig, file: Path | None = None) -> None:
    """Writes resolved settings, so that a resumed run needs only the folder. file: by default
    run.yaml in that folder."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_text(file or Path(config.out) / "run.yaml", text, replace=True)


def resume_config(folder: str | Path) -> RunConfig:
    """Reads the settings of the run in `folder`. Raises ConfigError, or SourceError if it is not
    YAML.
    """
    path = Path(folder) / "run.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no run: {path} is missing",
            next_step="Give the folder that --out named.",
        )
    try:
        return RunConfig.model_validate({**read_yaml(path), "out": str(folder)})
    except ValidationError as fault:
        raise ConfigError(
            f"{path} does not describe a run",
            field_faults(fault),
            "`veneer explain settings` lists the settings.",
        ) from fault


def remove_run(folder: Path) -> None:
    """Removes a run, unless a process works in it: BusyError. Whoever reads it meanwhile finds it
    whole or not at all."""
    if folder.exists():
        with explained(folder), unfinished(folder.parent) as gone, locked_folder(folder):
            folder.rename(gone)


def sweep(out: Path) -> None:
    """Removes unfinished files of ended processes, in the folder and among its checkpoints."""
    for folder in (out, out / "checkpoints"):
        for path in folder.glob(
            f"{PREFIX}*"
        ):  # of any machine, because this process holds the lock
            remove(path)
