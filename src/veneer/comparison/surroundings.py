"""The environment of a machine: the base's type there, and what figures depend on
(circumstances.py).

As a program (`python -m veneer.comparison.surroundings BASE`) it reads settings as JSON and prints
the environment: a cluster's node runs it in a process with the threads and devices of a run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from veneer.bases.compute import DtypeName
from veneer.comparison.circumstances import circumstances
from veneer.errors import VeneerError
from veneer.models.load import compute_of
from veneer.training.config import RunConfig


@dataclass(frozen=True)
class NodeEnvironment:
    """Describes a machine. dtypes: of the base, for each settings. lines: why, for people."""

    dtypes: list[DtypeName]
    lines: list[str]
    circumstances: dict[str, str]


def surroundings(base: str, configs: Sequence[RunConfig]) -> NodeEnvironment:
    """Returns the environment of this process."""
    computes = [
        compute_of(config.base, dtype=config.dtype, device=config.device, quantize=config.quantize)
        for config in configs
    ]
    lines = dict.fromkeys(compute.line for compute in computes if compute.line is not None)
    return NodeEnvironment([compute.name for compute in computes], list(lines), circumstances(base))


def main() -> int:
    try:
        configs = [RunConfig.of(settings) for settings in json.load(sys.stdin)]
        print(json.dumps(asdict(surroundings(sys.argv[1], configs))))
    except VeneerError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
