"""What figures depend on besides settings and rows: the base's files, the programs, the machine.

The name of a base proves nothing: its folder may hold another model now, the hub another commit.
"""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from veneer.bases.names.sources import locate
from veneer.files.hashes import file_hash
from veneer.files.home import expanded
from veneer.files.processor import processor
from veneer.files.remembered import own_files_hash

READ = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
"""Suffixes of files that a base is read from."""


def circumstances(base: str) -> dict[str, str]:
    """Returns what figures made here and now with this base depend on."""
    model = processor().get("model name") or platform.processor()
    return {
        "base": base_hash(base),
        **{name: version(name) for name in ("veneer", "torch", "transformers")},
        "files": own_files_hash(),  # kernels may be recompiled under the same version
        "processor": f"{platform.machine()} {model}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def base_hash(base: str) -> str:
    """Returns the SHA-256, in hex, of names and content of the base's files."""
    file = expanded(base)
    return file_hash(file) if file.is_file() else folder_hash(locate(base).folder)


def folder_hash(folder: Path) -> str:
    """Returns the SHA-256, in hex, of names and content of a model's or adapter's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in READ and path.is_file()):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()
