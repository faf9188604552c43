"""What a place has: the types that a base would be held in there, and what figures depend on
(circumstances.py).

As a program (`python -m veneer.comparison.surroundings BASE`) it reads settings as JSON and prints
what it found: a node of a cluster asks it in a process of its own, which has the threads and the
devices that a run would have there.
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
    """dtypes: of the base for each of the settings that were asked about. lines: why, for
    people."""

    dtypes: list[DtypeName]
    lines: list[str]
    circumstances: dict[str, str]


def surroundings(base: str, asked: Sequence[RunConfig]) -> NodeEnvironment:
    """Of this process."""
    found = [compute_of(c.base, dtype=c.dtype, device=c.device, quantize=c.quantize) for c in asked]
    lines = dict.fromkeys(each.line for each in found if each.line is not None)
    return NodeEnvironment([each.name for each in found], list(lines), circumstances(base))


def main() -> int:
    try:
        asked = [RunConfig.of(each) for each in json.load(sys.stdin)]
        print(json.dumps(asdict(surroundings(sys.argv[1], asked))))
    except VeneerError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
