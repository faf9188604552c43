"""What figures depend on beside settings and rows: the base's own files, the programs, the machine.

A name of a base proves nothing: the folder may hold another model by now, the hub another commit.
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
"""Files of a base that something of it is read from."""


def circumstances(base: str) -> dict[str, str]:
    """Of figures that are made here and now with this base."""
    model = processor().get("model name") or platform.processor()
    return {
        "base": base_hash(base),
        **{name: version(name) for name in ("veneer", "torch", "transformers")},
        "files": own_files_hash(),  # kernels may be compiled anew under the same version
        "processor": f"{platform.machine()} {model}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def base_hash(base: str) -> str:
    """SHA-256, in hex, over the files that the base is read from, by name."""
    file = expanded(base)
    return file_hash(file) if file.is_file() else folder_hash(locate(base).folder)


def folder_hash(folder: Path) -> str:
    """SHA-256, in hex, over the model's or the adapter's files in the folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in READ and path.is_file()):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()
