"""The environment of a machine: the base's type there, and what figures depend on besides settings
and rows: the base's files, the programs, the machine.

The name of a base proves nothing: its folder may hold another model now, the hub another commit.
As a program (`python -m veneer.comparison.environment BASE`) it reads settings as JSON and prints
the environment: a cluster's node runs it in a process with the threads and devices of a run.
"""

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch

from veneer.bases.compute import DtypeName
from veneer.bases.loading.without_weights import load_skeleton
from veneer.bases.names.sources import locate
from veneer.errors import VeneerError
from veneer.files.hashes import file_hash
from veneer.files.home import expanded
from veneer.files.processor import processor
from veneer.files.remembered import own_files_hash
from veneer.models.frozen_base import hidden_size
from veneer.models.load import compute_of, load_base
from veneer.training.config import RunConfig

READ = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
"""Suffixes of files that a base is read from."""


@dataclass(frozen=True)
class NodeEnvironment:
    """Describes a machine. dtypes: of the base, for each settings. rates: the learning rate of
    each, or its default. lines: why these types, for people."""

    dtypes: list[DtypeName]
    rates: list[float]
    lines: list[str]
    circumstances: dict[str, str]


def find_environment(base: str, configs: Sequence[RunConfig]) -> NodeEnvironment:
    """Returns the environment of this process."""
    computes = [
        compute_of(config.base, dtype=config.dtype, device=config.device, quantize=config.quantize)
        for config in configs
    ]
    lines = dict.fromkeys(compute.line for compute in computes if compute.line is not None)
    basis = _WeightsOnDemand(base)
    rates = [config.peak_learning_rate(basis) for config in configs]
    dtypes = [compute.name for compute in computes]
    return NodeEnvironment(dtypes, rates, list(lines), circumstances(base))


@dataclass(frozen=True)
class _WeightsOnDemand:
    """Reads what default learning rates are computed from out of the files of a base. Weights are
    read if a method needs them, in their stored type: the files are mapped, not copied."""

    base: str

    @property
    def hidden_size(self) -> int:
        return hidden_size(load_skeleton(self.base).model.config)

    @cached_property
    def weight_rms(self) -> float:
        return load_base(self.base, dtype="stored", device="cpu").weight_rms


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


def main() -> int:
    try:
        configs = [RunConfig.of(settings) for settings in json.load(sys.stdin)]
        print(json.dumps(asdict(find_environment(sys.argv[1], configs))))
    except VeneerError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
