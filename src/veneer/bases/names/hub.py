"""Finds models of the Hugging Face hub in its cache, or downloads them at one commit.

Only names, text, JSON and safetensors are downloaded; pickled weights are refused.
"""

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
from veneer.bases.names.named import list_named_defaults
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
    """The hub did not answer, or not about this repository; users never see this error."""


def snapshot(repo: str, revision: str | None) -> Path:
    """Returns the folder of a repository at one commit.

    It comes from the cache if the commit is pinned and cached, or if the hub does not answer.
    """
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
        [f"the hub was not asked or did not answer: {reason}"],
        f"Check the network, or download it elsewhere and name the folder. {list_named_defaults()}",
    )


def is_pinned(revision: str | None) -> bool:
    """Whether it is a full commit hash, which always names the same content."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def from_cache(repo: str, revision: str | None) -> Path | None:
    """Returns the complete snapshot in the hub's cache, or None; uses no network."""
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
    """Downloads the allowed files of a commit after checking the list of files.

    Raises HubUnreachableError if there is no first answer within patience_seconds.
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
        # By the revision's name, not by info.sha, so that the cache finds it without the hub.
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=ALLOWED_FILES, ignore_patterns=IGNORED_FILES
            )
        )
    except Exception as fault:  # the client's transport errors share no class across its versions
        error = refusal(
            fault,
            constants.HF_HUB_CACHE,
            next_step="Free some space, or set HF_HOME to a disk with more space.",
        )
        if isinstance(error, DoesNotFitError):
            raise error from fault
        raise SourceError(
            f"the download of {repo} failed",
            [_first_lines(fault)],
            "Try again: finished files are kept.",
        ) from fault
    weight_files(folder)
    return folder


def within(seconds: float, repo: str, call: Callable[[], T]) -> T:
    """Runs `call()` with a time limit and returns its result.

    Raises SourceError for the hub's clear refusal, HubUnreachableError for anything else. It runs
    in a thread, because a name look-up has no time limit of its own.
    """
    outcome: list[T | Exception] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as fault:  # as in download
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
                [_first_lines(fault)],
                "Accept them on the model's page, then run: hf auth login",
            ) from fault
        case RepositoryNotFoundError() | RevisionNotFoundError() as fault:
            raise SourceError(
                f"the hub knows no model {repo}, or not this revision of it, or it is private",
                [_first_lines(fault)],
                f"Check the name; a private model needs: hf auth login. {list_named_defaults()}",
            ) from fault
        case Exception() as fault:
            raise HubUnreachableError(_first_lines(fault)) from fault
        case answer:
            return answer


def _first_lines(fault: Exception) -> str:
    """Returns the first two lines of the hub client's message."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(fault).__name__
