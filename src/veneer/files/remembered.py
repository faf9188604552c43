"""Remembers results across processes as small entries in the cache folder.

An entry is stored under the hash of its key and holds the whole key. It is used only if the key is
equal and the value has the requested type; a damaged entry is ignored and written again. Every key
includes what all results depend on (`surroundings`): the bytes of Veneer's own files and compiled
kernels, the versions of the computing libraries, the processor, and environment variables that
change these.

Off unless `begin` was called, as the command line does: other programs may have replaced something
that no key covers. Knows nothing of what is remembered.
"""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from veneer.errors import VeneerError
from veneer.files.cache import cache_folder
from veneer.files.partial import sweep, unfinished
from veneer.files.processor import processor
from veneer.files.strict_json import read_json

Value = TypeVar("Value")

OFF = "VENEER_FORGET"
"""Environment variable: if 1, nothing is remembered and no entry is used."""
MOST_BYTES = 4 * 2**20
MOST_ENTRIES = 512
"""Most entries of a kind; beyond, the oldest are removed."""

COMPUTES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "accelerate", "kernels")
"""Libraries whose versions are in every key, if installed."""
READS = (
    "VENEER_",
    "ATEN_",
    "ONEDNN_",
    "DNNL_",
    "MKL_",
    "OMP_",
    "KMP_",
    "GOMP_",
    "TORCH",
    "PYTORCH_",
    "CUDA_",
    "LD_",
)
READS_ALSO = ("TRANSFORMERS_", "HF_ENABLE_", "USE_", "TRITON_", "NVIDIA_")
ABOUT_PLACES = ("VENEER_CACHE", OFF)

_enabled = False


def begin() -> None:
    """Lets this process use entries and write new ones."""
    global _enabled
    _enabled = not os.environ.get(OFF)


def is_on() -> bool:
    """Whether this process remembers results, so that callers can skip an expensive key."""
    return _enabled and surroundings() is not None


def remember(
    kind: str,
    key: Mapping[str, Any],
    value_type: Any,
    make: Callable[[], Value],
    is_valid: Callable[[Value], bool] = lambda _: True,
) -> Value:
    """Returns the value of an earlier process with the same key, else makes and stores it.

    kind        names a folder of the cache
    key         JSON: everything that the value depends on besides `surroundings`
    value_type  the value's type, for pydantic
    is_valid    whether a stored value is still valid
    """
    environment = surroundings() if _enabled else None
    if environment is None:
        return make()
    full_key = json.dumps({**key, "surroundings": environment}, sort_keys=True, default=str)
    path = cache_folder() / "found" / kind / f"{_hash(full_key)}.json"
    adapter: TypeAdapter[Value] = TypeAdapter(value_type)
    with suppress(VeneerError, ValidationError, OSError):
        entry = read_json(path, max_bytes=MOST_BYTES)
        text = entry.get("value")
        if (
            entry.get("key") == full_key
            and isinstance(text, str)
            and entry.get("sha256") == _hash(text)
        ):
            value = adapter.validate_json(text, strict=True)
            if is_valid(value):
                return value
    value = make()
    with suppress(VeneerError, OSError, ValueError):  # works without a writable cache
        text = adapter.dump_json(value).decode()
        entry = {"key": full_key, "sha256": _hash(text), "value": text}
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with unfinished(path.parent) as partial:
            partial.write_text(json.dumps(entry), encoding="utf-8")
            partial.replace(path)  # no fsync: damaged entries are ignored
        _remove_oldest(path.parent)
    return value


def forget(kind: str, value_type: Any, is_wrong: Callable[[Mapping[str, Any], Any], bool]) -> None:
    """Removes the entries of a kind that are found to be wrong by their key and value."""
    if not is_on():
        return
    adapter: TypeAdapter[Any] = TypeAdapter(value_type)
    for path in (cache_folder() / "found" / kind).glob("*.json"):
        with suppress(VeneerError, ValidationError, OSError, ValueError, TypeError, KeyError):
            entry = read_json(path, max_bytes=MOST_BYTES)
            if is_wrong(json.loads(entry["key"]), adapter.validate_json(entry["value"])):
                path.unlink(missing_ok=True)


def is_known(kind: type) -> bool:
    """Whether the key covers this class's code: it belongs to transformers, whose version is
    in it."""
    return kind.__module__.startswith("transformers.models.")


def _remove_oldest(folder: Path) -> None:
    entries = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in entries[:-MOST_ENTRIES]:
        path.unlink(missing_ok=True)


@cache
def surroundings() -> str | None:
    """Hashes what every result depends on; None if unknown, as with an editable install of a
    library."""
    try:
        versions = {name: _state(distribution(name)) for name in COMPUTES if _installed(name)}
    except OSError:
        return None
    if None in versions.values():
        return None
    names = sorted(
        name
        for name in os.environ
        if name.startswith(READS + READS_ALSO) and name not in ABOUT_PLACES
    )
    description = {
        "veneer": own_files_hash(),
        "versions": versions,
        "python": sys.version,
        "machine": [
            platform.system(),
            platform.release(),
            platform.machine(),
            _processor(),
            os.cpu_count(),
        ],
        "environment": {name: os.environ[name] for name in names},
    }
    return _hash(json.dumps(description, sort_keys=True))


def own_files_hash() -> str:
    """Hashes the names and bytes of Veneer's own files, compiled kernels included."""
    package = Path(__file__).parents[1]
    files = sorted(
        path for path in package.rglob("*") if path.suffix in (".py", ".so", ".pyd", ".c", ".h")
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _state(installation: Distribution) -> str | None:
    """Returns version and file hashes of an installation; None if it is editable."""
    if "editable" in (installation.read_text("direct_url.json") or ""):
        return None
    files = installation.read_text("RECORD") or ""
    return f"{installation.version} {_hash(files)}"


def _processor() -> list[str | None]:
    """Returns the processor's model and features."""
    fields = processor()
    names = ("model name", "flags", "Features", "CPU part", "microcode")
    return [fields.get(name) for name in names] if fields else [platform.processor()]
