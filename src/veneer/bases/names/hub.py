"""Models of the Hugging Face hub, in its own cache: found there, or downloaded at one commit.

Only names, text, JSON and safetensors are fetched; weights that are pickles are refused.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from veneer.bases.folder.model_folder import no_model, weight_files
from veneer.bases.names.named import what_exists
from veneer.errors import CorruptFileError, DoesNotFitError, SourceError
from veneer.files.system_errors import refusal

T = TypeVar("T")

ALLOWED_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
IGNORED_FILES = [
    "*/*",
    "consolidated*",
    "adapter_*",
]  # subfolders, a second copy of the weights, adapters

PATIENCE_SECONDS = 15.0

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubUnreachableError(Exception):
    """The hub gave no answer, or none about this repository; no user sees it."""


def snapshot(repo: str, revision: str | None) -> Path:
    """The folder of a repository at one commit, which it is called by; from the cache if the commit
    is known and there, or the hub is not."""
    if (is_pinned(revision) or constants.HF_HUB_OFFLINE) and (
        cached := from_cache(repo, revision)
    ) is not None:
        return cached
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            return download(repo, revision, PATIENCE_SECONDS)
        except HubUnreachableError as fault:
            if (cached := from_cache(repo, revision)) is not None:
                return cached
            reason = str(fault)
    raise SourceError(
        f"{repo}{'@' + revision if revision else ''} is neither a local folder nor in the hub's"
        " cache",
        [f"the hub was not asked or gave no answer: {reason}"],
        f"Check the network, or download it elsewhere and name the folder. {what_exists()}",
    )


def is_pinned(revision: str | None) -> bool:
    """True for a full commit hash, which always names the same content."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def from_cache(repo: str, revision: str | None) -> Path | None:
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
    return folder


def download(repo: str, revision: str | None, patience_seconds: float) -> Path:
    """Asks the hub for the commit and the list of files, checks the list, fetches what is allowed.

    HubUnreachableError: no first answer within so many seconds.
    """
    info = within(
        patience_seconds,
        repo,
        lambda: HfApi().model_info(repo, revision=revision, timeout=patience_seconds),
    )
    names = {sibling.rfilename for sibling in info.siblings or []}
    if not any(re.fullmatch(r"model[\w.-]*\.safetensors", name) for name in names):
        raise no_model(repo, names)
    try:
        # By the name of the revision, not by info.sha: so the cache knows the name when the hub is
        # away.
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=ALLOWED_FILES, ignore_patterns=IGNORED_FILES
            )
        )
    except Exception as fault:  # the client's transport errors share no class across its versions
        told = refusal(
            fault,
            constants.HF_HUB_CACHE,
            next_step="Free some space, or set HF_HOME to a place that has.",
        )
        if isinstance(told, DoesNotFitError):
            raise told from fault
        raise SourceError(
            f"the download of {repo} failed", [_said(fault)], "Try again: what has arrived is kept."
        ) from fault
    weight_files(folder)
    return folder


def within(seconds: float, repo: str, call: Callable[[], T]) -> T:
    """`call()`'s result. Raises SourceError for the hub's clear "no", HubUnreachableError for
    anything else.

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
                f"Check the name; a private model needs: hf auth login. {what_exists()}",
            ) from fault
        case Exception() as fault:
            raise HubUnreachableError(_said(fault)) from fault
        case answer:
            return answer


def _said(fault: Exception) -> str:
    """The first two lines of what the hub's client says: what kind of answer, and about what."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(fault).__name__
