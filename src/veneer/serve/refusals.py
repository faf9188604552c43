"""Errors of requests as HTTP responses: a status, and a body in OpenAI's form.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

A client's mistake is 4xx, whatever raised it; 5xx means that the server is going down or has a
bug.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from veneer.errors import (
    AdapterMismatchError,
    BudgetFullError,
    ConfigError,
    CorruptFileError,
    DoesNotFitError,
    InputError,
    QueueFullError,
    QuotaError,
    UnsafeFileError,
    VeneerError,
)
from veneer.serve.limits import MOST_FAULTS

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
CODES = {
    400: "invalid_request",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    422: "adapter_refused",
    429: "queue_full",
    500: "internal_error",
    503: "shutting_down",
    507: "budget_full",
}
RETRY_SECONDS = 1
"""Seconds until a client should retry after 429 and 503."""
_RETRIED = (429, 503)
_MESSAGE_CHARACTERS = 4000
OUT_OF_TIME = "The time for this request is over."
MOST_SHOWN = 40
"""Characters of a value that an error shows."""
_PATH = re.compile(
    r"""
      # in quotes, where blanks may stand in names
      (?<=['"])(?:~|[A-Za-z]:|\\)?(?:[/\\][^/\\'"\n]+){2,}(?=['"])
    | file://[^\s'"]+
    | (?<![\w.~\#/\\])(?:~|[A-Za-z]:|\\)?(?:[/\\](?:[^\s/\\:'",;]|[:',;](?=[^\s'",;:]))+){2,}
    """,
    re.VERBOSE,
)
"""Matches paths and file addresses: /srv/models/x, ~/models/x, C:\\models\\x, \\\\host\\share\\x,
file:///srv/x.

A single part (/v1) and a JSON pointer (#/properties/x) are no paths."""


@dataclass(frozen=True)
class Fault:
    """One mistake in a request. param: the path of the field, such as messages[0].role."""

    param: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.param}: {self.what}" if self.param else self.what


@dataclass(eq=False)
class Refusal(Exception):
    """Ends a request with an error. Raised anywhere in serve/, answered in http/app.py."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def error(self) -> dict[str, Any]:
        return {
            "message": self.message[:_MESSAGE_CHARACTERS],
            "type": TYPES.get(
                self.status, "invalid_request_error" if self.status < 500 else "server_error"
            ),
            "param": self.param,
            "code": self.code or CODES.get(self.status),
        }

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}

    @property
    def all_headers(self) -> dict[str, str]:
        """Says when to retry, or that retrying does not help: some clients retry by themselves."""
        if self.status in _RETRIED:
            return {"retry-after": str(RETRY_SECONDS), **self.headers}
        return {"x-should-retry": "false", **self.headers}


def without_folders(text: str) -> str:
    """Replaces every absolute path by its last part, so that no client learns where files are.

    Every message passes here last. Where a path has a better name, such as "the library", hide_path
    has replaced it before. The server's working folder and its user's home are known, so their
    names may hold blanks. Other paths are recognised by how paths are usually written.
    """
    for folder in sorted(_own_folders(), key=len, reverse=True):
        pattern = rf"(?<![\w.~/\\]){re.escape(folder)}(?![\w-])(?=([/\\])?)"
        text = re.sub(pattern, lambda match: "/~" if match[1] else "~", text)
    return _PATH.sub(lambda path: PurePath(path[0].replace("\\", "/")).name, text)


def _own_folders() -> list[str]:
    """Returns the working folder and the user's home, unless one is the root folder."""
    folders = []
    with suppress(OSError):
        folders.append(Path.cwd())
    with suppress(RuntimeError):
        folders.append(Path.home())
    return [str(folder) for folder in folders if folder != folder.parent]


def refuse(faults: Sequence[Fault]) -> Refusal:
    """Makes a 400 of up to MOST_FAULTS faults; its param is the first fault's."""
    lines = list(map(str, faults[:MOST_FAULTS]))
    message = "; ".join([*(line.removesuffix(".") for line in lines[:-1]), lines[-1]])
    more = "; and more" if len(faults) > MOST_FAULTS else ""
    return Refusal(400, message + more, faults[0].param)


def refusal_of(fault: Exception, *, param: str | None = None) -> Refusal:
    """Turns an exception into a refusal. The text of a foreign exception is not shown: it may hold
    anything."""
    if isinstance(fault, Refusal):
        return fault
    message = without_folders(str(fault))
    if isinstance(fault, QueueFullError):
        return Refusal(429, message)
    if isinstance(fault, QuotaError):
        return Refusal(507, message, param, "quota_reached")
    if isinstance(fault, BudgetFullError):
        return Refusal(507, message, param)
    if isinstance(fault, AdapterMismatchError | CorruptFileError | UnsafeFileError):
        return Refusal(422, message, param or "model")
    if isinstance(fault, InputError | DoesNotFitError):
        code = "context_length_exceeded" if isinstance(fault, DoesNotFitError) else None
        return Refusal(400, message, param, code)
    if isinstance(fault, VeneerError):
        return Refusal(422, message, param)
    return Refusal(500, "This is a bug in Veneer; the server's log says more.")


@contextmanager
def refusing(param: str | None = None) -> Iterator[None]:
    """Turns a VeneerError of the block into a Refusal that names the field."""
    try:
        yield
    except VeneerError as fault:
        raise refusal_of(fault, param=param) from None


@contextmanager
def out_of_time() -> Iterator[None]:
    """Turns a TimeoutError of the block into a Refusal: 408."""
    try:
        yield
    except TimeoutError:
        raise Refusal(408, OUT_OF_TIME) from None


def shutting_down() -> Refusal:
    return Refusal(503, "The server is shutting down.")


def unknown_model(name: str, next_step: str = "") -> Refusal:
    """Makes a 404, the same for a model that is missing and one that is hidden."""
    message = f"The model `{name[:80]}` does not exist."
    return Refusal(404, f"{message} {next_step}".strip(), "model", "model_not_found")


def unknown_adapter(fault: ConfigError, param: str = "lora_path") -> Refusal:
    message = without_folders(f"{fault.headline}. {fault.next_step}".strip())
    return Refusal(404, message, param, "adapter_not_found")


def brief(value: Any, *, quoted: bool = True) -> str:
    """Shortens a value for an error: printable, on one line."""
    text = value if isinstance(value, str) else as_json(value)
    text = text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "…"
    clean = "".join(c if c.isprintable() else "·" for c in text)
    return repr(clean) if quoted and isinstance(value, str) else clean


def as_json(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return f'"{value}"' if isinstance(value, str) else str(value)
