"""Finds the files of a set by its name: a file, a folder, a pattern, an address, a hub data set.

rows.jsonl   rows/   rows/*.jsonl.gz            local files
s3://bucket/rows/*.parquet                      any address that fsspec knows
org/name   org/name:split   hf://datasets/...   Hugging Face data sets, as plain Parquet

Remote files are downloaded into the cache folder (downloads.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from veneer.data.files.downloads import download_if_changed, unreachable
from veneer.errors import DataError
from veneer.files.addresses import file_system
from veneer.files.home import expanded
from veneer.files.nesting import is_text

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
PACKED = (".gz", ".zst")
SHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")
"""Extensions of workbooks, which are not read."""
MOST_FILES = 100_000
_ON_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+(/[\w.-]+)?)?")
_T = TypeVar("_T")
_CONVERTED = "@refs/convert/parquet"
"""The branch that holds every hub data set as plain Parquet."""


@dataclass(frozen=True)
class RowFile:
    """A file of rows: its name in messages, and its local path."""

    name: str
    path: Path


@dataclass(frozen=True)
class ResolvedSets:
    """Remembers the files of each set, so that every pass over a set reads the same versions."""

    _files: dict[str, list[RowFile]] = field(default_factory=dict)

    def find_files(self, name: str) -> list[RowFile]:
        """Finds the files of a set, once. Raises what the function `find_files` raises."""
        if name not in self._files:
            self._files[name] = find_files(name)
        return self._files[name]


def kind_of(name: str) -> str:
    """Returns the extension that decides how a file is read; empty if it is not one of KINDS."""
    bare = Path(name)
    if bare.suffix.lower() in PACKED:
        bare = bare.with_suffix("")
    kind = bare.suffix.lower()
    return kind if kind in KINDS else ""


def find_files(name: str) -> list[RowFile]:
    """Finds all files of a set, in order.

    Raises DataError if there are none or they cannot be downloaded, ConfigError for an unknown kind
    of address. A single file is not checked: opening it reports what is wrong.
    """
    if not name.strip() or "\0" in name:
        raise DataError(
            f"no set of rows is called {name!r}",
            next_step="Name a file, a folder, a pattern or an address.",
        )
    if "://" in name:
        return _find_remote(name)
    try:
        return _find_local(name, expanded(name))
    except (OSError, ValueError) as fault:  # no access, an impossible name, ** beside other letters
        raise unreachable(name, fault) from fault


def refuse_missing(names: Sequence[str]) -> None:
    """Raises DataError with each name of a file that does not exist. Other names are checked
    later."""
    missing = [name for name in names if "://" not in name and _is_absent(name)]
    if missing:
        faults = [_describe_missing(name, expanded(name)) for name in missing]
        raise DataError(
            "file not found" if len(faults) == 1 else "files not found",
            [f"D100 {fault}" for fault in faults],
            "A set is a file, a folder, a pattern such as rows/*.jsonl, an address, or a hub's data"
            " set (org/name).",
        )


def absolute(name: str) -> str:
    """Makes a set's name independent of the current folder."""
    if "://" in name:
        return name
    path = expanded(name)
    is_local = path.exists() or any(mark in name for mark in "*?[") or kind_of(name)
    return str(path.absolute()) if is_local else name


def _is_absent(name: str) -> bool:
    if not is_text(name):  # reported elsewhere
        return False
    try:
        path = expanded(name)
        exists = path.exists() or any(mark in name for mark in "*?[")
        return bool(name.strip()) and not exists and not _may_be_on_hub(name, path)
    except (OSError, ValueError):  # reported when it is opened
        return False


def _may_be_on_hub(name: str, path: Path) -> bool:
    return bool(_ON_THE_HUB.fullmatch(name)) and not kind_of(name) and not path.parent.is_dir()


def _describe_missing(name: str, path: Path) -> str:
    """Describes a missing file: a similar name, or that its folder does not exist either."""
    if not path.parent.is_dir():
        return f"{name}  its folder {path.parent} does not exist either"
    similar = get_close_matches(path.name, [file.name for file in path.parent.iterdir()], n=1)
    return f"{name}" + (f"  did you mean {path.parent / similar[0]}?" if similar else "")


def matching_files(pattern: Path) -> list[Path]:
    """Returns the files that match, none if it is not a pattern, such as `a**` or an empty one."""
    try:
        files = Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
        return sorted(file for file in files if file.is_file())
    except (IndexError, OSError, ValueError):
        return []


def _find_local(name: str, path: Path) -> list[RowFile]:
    if path.is_dir():
        # Programs keep copies in hidden folders: .ipynb_checkpoints of Jupyter, for instance.
        paths = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and kind_of(file.name)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        return _check_count([RowFile(str(file), file) for file in paths], name)
    if path.exists():
        return [RowFile(name, path)]
    if any(mark in name for mark in "*?["):
        paths = [file for file in matching_files(path) if kind_of(file.name)]
        return _check_count([RowFile(str(file), file) for file in paths], name)
    if _may_be_on_hub(name, path):
        return _find_on_hub(name)
    refuse_missing([name])
    return [RowFile(name, path)]


def _check_count(files: list[_T], name: str) -> list[_T]:
    if not files:
        raise DataError(
            f"{name}: no row files found",
            next_step=f"Kinds of file: {', '.join(KINDS)}, .gz, .zst.",
        )
    if len(files) > MOST_FILES:
        raise DataError(
            f"{name}: {len(files):,} files, at most {MOST_FILES:,} are read",
            next_step="Name fewer.",
        )
    return files


def _find_on_hub(full_name: str) -> list[RowFile]:
    """Finds a hub data set: org/name, org/name:split, org/name:config/split."""
    name, _, part = full_name.partition(":")
    address = f"hf://datasets/{name}{_CONVERTED}"
    fs, root = file_system(address)
    files = _list_remote(fs, f"{root}/**/*.parquet", full_name)
    parts: dict[tuple[str, str], list[str]] = {}
    for file in files:
        config, _, within = file.removeprefix(root).strip("/").partition("/")
        split, below, _ = within.partition("/")
        if not below:  # not in a split's folder
            continue
        parts.setdefault((config, split.removeprefix("partial-")), []).append(file)
    configs = sorted({config for config, _ in parts})
    config, _, split = part.rpartition("/")
    config = config or (
        "default" if "default" in configs else configs[0] if len(configs) == 1 else ""
    )
    chosen = parts.get((config, split or "train"))
    if not chosen:
        available = ", ".join(f"{c}/{s}" for c, s in sorted(parts)) or "none"
        raise DataError(
            (
                f"the data set {name} has no {part or 'train'}"
                if config
                else f"the data set {name} has several parts"
            ),
            [f"there is: {available}"],
            f"Name one: {name}:{'/'.join(sorted(parts)[0]) if parts else 'SPLIT'}.",
        )
    return [
        RowFile(f"hf://{file}", download_if_changed(fs, file, f"hf://{file}"))
        for file in _check_count(sorted(chosen), full_name)
    ]


def _find_remote(set_name: str) -> list[RowFile]:
    scheme = set_name.partition("://")[0]
    fs, root = file_system(set_name)
    if any(mark in root for mark in "*?["):
        paths = _list_remote(fs, root, set_name)
    elif kind_of(root):
        paths = [root]
    elif (
        scheme == "hf" and root.startswith("datasets/") and root.count("/") == 2 and "@" not in root
    ):
        return _find_on_hub(root.removeprefix("datasets/"))
    else:
        paths = _list_remote(fs, f"{root.rstrip('/')}/**", set_name)
    files = _check_count([file for file in paths if kind_of(file)], set_name)
    names = [file if "://" in file else f"{scheme}://{file}" for file in files]
    return [
        RowFile(set_name, download_if_changed(fs, file, set_name))
        for set_name, file in zip(names, files, strict=True)
    ]


def _list_remote(fs: Any, pattern: str, name: str) -> list[str]:
    try:
        return sorted(str(path) for path in fs.glob(pattern))
    except Exception as fault:  # every store raises errors of its own
        raise unreachable(name, fault) from fault
