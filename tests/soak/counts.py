"""How often the loops of this folder run: a few times in `make test`, the full count in `make soak`.

VENEER_SOAK=1        every loop its full count
VENEER_SOAK_KILLS=50 this loop (called "kills") fifty times, whatever the other says
"""

import os


def count(name: str, *, ci: int, soak: int) -> int:
    """Rounds of the loop called `name`."""
    own = os.environ.get(f"VENEER_SOAK_{name.upper()}")
    if own is not None:
        return int(own)
    return soak if os.environ.get("VENEER_SOAK") == "1" else ci
