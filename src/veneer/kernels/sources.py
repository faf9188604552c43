"""Identifies the C sources of the compiled kernels.

setup.py runs this file by its path and compiles the digest into the library, so it imports the
standard library alone. bindings/library.py refuses a library of other sources.
"""

import hashlib
from pathlib import Path

NATIVE = Path(__file__).parent / "native"


def digest(folder: Path = NATIVE) -> str:
    """Returns the SHA-256 of all C sources, with their names, in hexadecimal digits."""
    hashed = hashlib.sha256()
    for path in sorted(folder.rglob("*.[ch]")):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        hashed.update(content)
    return hashed.hexdigest()
