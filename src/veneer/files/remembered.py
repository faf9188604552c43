"""What was found out once and holds until something that it depends on changes: small entries in
the cache folder.

An entry lies under the hash of its key and holds the key whole. It counts only where the key is
equal and the value has the type that is asked for; a damaged one is as none, and is written again.
Every key is widened by what all such findings depend on (`surroundings`): the bytes of Veneer's own
files, its compiled kernels among them, the versions of what computes, the processor, and the
environment variables that change what these do.

Off unless `begin` was called, which the command line does: in a process that others write,
something may have been replaced that no key knows of. Not known here: what is remembered.
"""

from __future__ import annotations

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

Found = TypeVar("Found")

OFF = "VENEER_FORGET"
"""Environment variable: set to 1, nothing is remembered, and nothing that was is used."""
MOST_BYTES = 4 * 2**20
MOST_ENTRIES = 512
"""Of a kind; beyond, those that were written first go."""

COMPUTES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "accelerate", "kernels")
"""Whose versions every key holds, where they are installed."""
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
ABOUT_PLACES = ("VENEER_CACHE", "VENEER_LIBRARY", OFF)

_begun = False


def begin() -> None:
    """From now on this process uses what others like it found, and leaves what it finds."""
    global _begun
    _begun = not os.environ.get(OFF)


def is_on() -> bool:
    """Whether this process remembers: a key that is dear need not be made where it does not."""
    return _begun and surroundings() is not None


def remembered(
    kind: str,
    key: Mapping[str, Any],
    of: Any,
    make: Callable[[], Found],
    still: Callable[[Found], bool] = lambda _: True,
) -> Found:
    """What `make` gave an earlier process with the same key, else what it gives now.

    kind    names a folder of the cache;  key   JSON, everything that the value depends on beside
            `surroundings`
    of      its type, as pydantic reads and writes it;  still   whether it holds yet
    """
    around = surroundings() if _begun else None
    if around is None:
        return make()
    whole = json.dumps({**key, "surroundings": around}, sort_keys=True, default=str)
    path = cache_folder() / "found" / kind / f"{_hash(whole)}.json"
    reads: TypeAdapter[Found] = TypeAdapter(of)
    with suppress(VeneerError, ValidationError, OSError):
        entry = read_json(path, max_bytes=MOST_BYTES)
        text = entry.get("value")
        if (
            entry.get("key") == whole
            and isinstance(text, str)
            and entry.get("sha256") == _hash(text)
        ):
            value = reads.validate_json(text, strict=True)
            if still(value):
                return value
    value = make()
    with suppress(VeneerError, OSError, ValueError):  # a cache that cannot be written is none
        text = reads.dump_json(value).decode()
        entry = {"key": whole, "sha256": _hash(text), "value": text}
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with unfinished(path.parent) as partial:
            partial.write_text(json.dumps(entry), encoding="utf-8")
            partial.replace(
                path
            )  # not synced: one that a power cut damages is as none, and nobody waits for a disk
        _forget_oldest(path.parent)
    return value


def is_known(kind: type) -> bool:
    """Whether the key says what code this class is: transformers' own, whose version stands in
    it."""
    return kind.__module__.startswith("transformers.models.")


def _forget_oldest(folder: Path) -> None:
    entries = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in entries[:-MOST_ENTRIES]:
        path.unlink(missing_ok=True)


@cache
def surroundings() -> str | None:
    """Hash of what any finding depends on; None where that cannot be told: a library that is being
    worked on."""
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
    told = {
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
    return _hash(json.dumps(told, sort_keys=True))


def own_files_hash() -> str:
    """SHA-256 over the names and bytes of Veneer's own files, compiled kernels included."""
    own = Path(__file__).parents[1]
    files = sorted(
        path for path in own.rglob("*") if path.suffix in (".py", ".so", ".pyd", ".c", ".h")
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(own).as_posix()}\n".encode())
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


def _state(found: Distribution) -> str | None:
    """Version and hashes of the files of an installation; None where they are those that somebody
    works on."""
    if "editable" in (found.read_text("direct_url.json") or ""):
        return None
    files = found.read_text("RECORD") or ""
    return f"{found.version} {_hash(files)}"


def _processor() -> list[str | None]:
    """Model and features, as the system tells them."""
    told = processor()
    names = ("model name", "flags", "Features", "CPU part", "microcode")
    return [told.get(name) for name in names] if told else [platform.processor()]
