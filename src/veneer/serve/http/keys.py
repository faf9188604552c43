"""API keys, stored as hashes, compared in constant time, each with a scope.

    use     answers, models, metrics
    train   these, and uploading rows, starting, stopping and deleting jobs
    admin   these, and loading and unloading adapters

A file has a line for each key: `use 5d41...(sha256, hexadecimal) name`. Keys have 256 random bits,
so that a plain SHA-256 cannot be reversed. No two keys have one name: jobs and uploaded files are
recorded under the name of their key.
"""

import hashlib
import hmac
import os
import re
import secrets
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from veneer.errors import ConfigError, SourceError
from veneer.files.system_errors import explained

Scope = Literal["use", "train", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
VARIABLES: dict[str, Scope] = {
    "VENEER_API_KEY": "use",
    "VENEER_TRAIN_KEY": "train",
    "VENEER_ADMIN_KEY": "admin",
}
SHORTEST = 16
MOST_KEYS = 1000
_LINE = re.compile(rf"({'|'.join(SCOPES)}) ([0-9a-f]{{64}})(?: ([\w.-]{{1,64}}))?")


@dataclass(frozen=True)
class ApiKey:
    scope: Scope
    digest: str
    name: str


@dataclass(frozen=True)
class Caller:
    """The client of a request. name, digest: of its key; empty if no key is required."""

    name: str
    scope: Scope
    digest: str = ""

    @property
    def may_train(self) -> bool:
        return self.scope in ("train", "admin")


class ApiKeys:
    """The server's keys. Without any, everyone who reaches the server may do everything."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def caller(self, key_text: str | None) -> Caller | None:
        """Returns the owner of a key; None if it is unknown. Takes the same time for every text of
        one length."""
        if not self._keys:
            return Caller("", "admin")
        digest = hashed(key_text or "")
        caller = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                caller = Caller(key.name, key.scope, key.digest)
        return caller if key_text else None


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(file: Path | None, environment: Mapping[str, str]) -> ApiKeys:
    """Reads the keys of a file and of the environment. SourceError. ConfigError: names every wrong
    line."""
    keys = [] if file is None else _read_file(file)
    for variable, scope in VARIABLES.items():
        if key := environment.get(variable):
            if len(key) < SHORTEST:
                raise ConfigError(
                    f"{variable} has {len(key)} characters; a key needs at least {SHORTEST}",
                    next_step='For instance: export VENEER_API_KEY="$(openssl rand -hex 32)".',
                )
            keys.append(ApiKey(scope, hashed(key), variable.lower()))
    if faults := _repeated(keys):
        raise ConfigError(
            "two API keys have the same name, or are the same key",
            faults,
            "Give each key a name of its own, and each scope a key of its own.",
        )
    return ApiKeys(keys)


def _repeated(keys: Sequence[ApiKey]) -> list[str]:
    """Describes each name that several keys have, and each key that is there twice."""
    names = Counter(key.name for key in keys)
    faults = [f"{count} keys are called {name}" for name, count in names.items() if count > 1]
    names_of_key = defaultdict[str, list[str]](list)
    for key in keys:
        names_of_key[key.digest].append(key.name)
    return faults + [
        f"{' and '.join(same)} are one key" for same in names_of_key.values() if len(same) > 1
    ]


def _read_file(file: Path) -> list[ApiKey]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as fault:
        raise SourceError(
            f"{file} cannot be read: {fault.strerror}",
            next_step=_make(file if isinstance(fault, FileNotFoundError) else None),
        ) from fault
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not text", next_step=_make(None)) from None
    keys, faults = list[ApiKey](), list[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            faults.append(f"line {number} is not `use`, `train` or `admin`, a SHA-256 and a name")
        else:
            scope = next(scope for scope in SCOPES if scope == match[1])
            keys.append(ApiKey(scope, match[2], match[3] or f"key-{number}"))
    if len(keys) > MOST_KEYS:
        faults.append(f"it has {len(keys):,} keys; at most {MOST_KEYS:,} are allowed")
    if faults or not keys:
        raise ConfigError(
            f"{file} is not a file of keys",
            faults or ["it has no keys"],
            _make(None if faults else file),
        )
    return keys


def _make(file: Path | None) -> str:
    """Names the command that makes a key. file: None if what stands there is no file of keys."""
    name = "FILE" if file is None else shlex.quote(str(file))
    return f"Make one: veneer serve --new-key use --keys {name}"


def new_key(file: Path, scope: Scope) -> str:
    """Makes a key and adds its hash to the file. The key itself is not stored."""
    key = f"vn-{secrets.token_hex(32)}"
    with explained(file):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(f"{scope} {hashed(key)} {scope}-{hashed(key)[:8]}\n")
    return key
