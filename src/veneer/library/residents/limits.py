"""Limits of loading adapters in a server."""

from dataclasses import dataclass

from veneer.bounds import COUNT, SECONDS, WAITS, check_numbers


@dataclass(frozen=True, kw_only=True)
class LoadLimits:
    """Limits how adapters are loaded.

    at_once        adapters that are read at the same time
    slow_seconds   a load that takes longer no longer counts among these
    load_seconds   a load that takes longer has failed
    retry_seconds  time after a failure until an adapter is read again
    max_overtaken  sequences that may overtake one that finds no room
    """

    at_once: int = 2
    slow_seconds: float = 2.0
    load_seconds: float = 60.0
    retry_seconds: float = 30.0
    max_overtaken: int = 16

    def __post_init__(self) -> None:
        check_numbers(
            at_once=(COUNT, self.at_once),
            slow_seconds=(SECONDS, self.slow_seconds),
            load_seconds=(SECONDS, self.load_seconds),
            retry_seconds=(SECONDS, self.retry_seconds),
            max_overtaken=(WAITS, self.max_overtaken),
        )
