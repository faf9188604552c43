"""Initial values that the base computes for a fresh adapter. initial_values.py says which methods
have them."""

from collections.abc import Callable
from dataclasses import dataclass

from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.attachment import Attachment


@dataclass(frozen=True)
class AdapterStart:
    """How a fresh adapter starts.

    config   the settings, with defaults that depend on the base resolved
    put      sets the initial values; returns a line for the screen
    prompt   the text whose values they start from
    """

    config: AdapterConfig
    put: Callable[[Attachment], str | None]
    prompt: str | None = None
