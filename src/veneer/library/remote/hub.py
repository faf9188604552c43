"""One adapter in the root of a Hugging Face repository, where PEFT looks for it.

A push is one commit with the model card: all files or none. A pull resolves the revision to a
commit and takes every file from that commit. Pickles and other files are not downloaded.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from veneer.errors import (
    ConfigError,
    CorruptFileError,
    RefusedError,
    SourceError,
    UnsafeFileError,
    first_line,
)
from veneer.files.atomic import MANIFEST, verify_manifest
from veneer.files.system_errors import refusal
from veneer.formats.manifest import CARD_NAME
from veneer.library.entry import Entry
from veneer.library.library import Library
from veneer.library.names import check_name
from veneer.library.objects import ADAPTER_FILES, put
from veneer.library.remote.remote import Transfer

_ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
MAX_BYTES = 20_000_000_000
"""Largest download: an adapter has megabytes, so a repository with more is refused first."""


def _parsed(address: str) -> tuple[str, str | None]:
    if (match := _ADDRESS.fullmatch(address)) is None or ".." in address:
        raise ConfigError(
            f"{address} is not the address of a repository",
            [],
            "For instance hf://org/name or hf://org/name@v1.",
        )
    return match["repository"], match["revision"]


def push_to_hub(entry: Entry, folder: Path, address: str, card: str | None = None) -> Transfer:
    from huggingface_hub import CommitOperationAdd, HfApi

    repository, revision = _parsed(address)
    api = HfApi()
    operations = [
        CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path)
        for path in sorted(folder.iterdir())
    ]
    if card is not None:
        operations.append(CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=card.encode()))
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.create_commit(
            repository,
            operations,
            commit_message=f"{entry.reference} {entry.version.object[:12]}",
            revision=revision,
        )
    except Exception as fault:  # the client's errors have no common base
        raise SourceError(
            f"{address} was not written: {first_line(fault)}",
            [],
            "Check the name and your token: hf auth login",
        ) from fault
    return Transfer(f"{repository}@{commit.oid}", address, entry.version.facts.bytes, skipped=False)


def pull_from_hub(library: Library, address: str, *, name: str | None = None) -> Entry:
    """Downloads an adapter into the library.

    Raises SourceError, UnsafeFileError (only a pickle there), RefusedError (too large), and what
    `add` raises.
    """
    from huggingface_hub import HfApi, hf_hub_download

    from veneer.library.examination import examined  # loads torch

    repository, revision = _parsed(address)
    chosen = check_name(name or _default_name(repository))
    try:
        info: Any = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except Exception as fault:
        raise SourceError(
            f"{address} cannot be read: {first_line(fault)}",
            [],
            "Check the name, the revision and your token.",
        ) from fault
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    wanted = [file for file in (*ADAPTER_FILES, MANIFEST) if file in sizes]
    _check_files(address, sizes, wanted)
    with library.receiving():
        folder = library.folder / "incoming" / f"hub-{info.sha}"
        for file in wanted:
            try:  # resumes, and compares with the commit's own hashes
                hf_hub_download(repository, file, revision=info.sha, local_dir=folder)
            except Exception as fault:
                if (disk_error := refusal(fault, folder)) is not None:
                    raise disk_error from fault
                raise SourceError(
                    f"{address}: {file} was not downloaded: {first_line(fault)}",
                    [],
                    "Try again: downloaded parts are kept.",
                ) from fault
        if MANIFEST in wanted:  # .cache holds files of the client
            faults = [fault for fault in verify_manifest(folder) if not fault.startswith(".cache/")]
            if faults:
                raise CorruptFileError(
                    f"{address} is not what was pushed", faults, "Push it again."
                )
        files, facts = examined(folder, None)
        note = f"{repository} at {info.sha[:12]}"
        entry = library.point(chosen, put(library.objects, files), facts, note=note)
        shutil.rmtree(folder)
    return entry


def _default_name(repository: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", repository.rpartition("/")[2].lower()).strip("-")


def _check_files(address: str, sizes: dict[str, int | None], wanted: list[str]) -> None:
    if missing := [file for file in ADAPTER_FILES[:2] if file not in sizes]:
        pickles = [
            file for file in sizes if file.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        ]
        if pickles and ADAPTER_FILES[0] in sizes:
            raise UnsafeFileError(
                f"{address} holds its weights only as a pickle, which can run code when it is"
                " opened",
                pickles,
                "Ask the owner for safetensors; or, if you trust it, convert it once with PEFT.",
            )
        raise SourceError(f"{address} holds no adapter", [f"{file} is missing" for file in missing])
    if (total := sum(sizes[file] or 0 for file in wanted)) > MAX_BYTES:
        raise RefusedError(f"{address}: {total:,} bytes are no adapter; the limit is {MAX_BYTES:,}")
