"""What a fresh adapter starts from where the base computes it: what such a method owes whoever
attaches.

Not known here: which methods want such a start (initial_values.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

from veneer.adapters.config import AdapterConfig
from veneer.adapters.placement.attachment import Attachment


@dataclass(frozen=True)
class AdapterStart:
    """config  the settings, with what depends on the base resolved
    put      moves the fresh layers there; a line that says so, for the screen
    prompt   the text whose values they start from, whole
    """

    config: AdapterConfig
    put: Callable[[Attachment], str | None]
    prompt: str | None = None
