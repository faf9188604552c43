"""One version of an adapter as a server has it, and as it shows it."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from veneer.adapters.placement.attachment import Attachment
from veneer.errors import VeneerError
from veneer.library.residents.memory import HELD_ITEM_BYTES, MemoryEntry


class Tier(Enum):
    DISK = "disk"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class VersionFiles:
    """Where a version lies. content_hash: of its tensors and config, which reading it checks. made:
    changes whenever the folder is another one."""

    reference: str
    folder: Path
    content_hash: str
    parameters: int
    made: tuple[int, ...]

    @property
    def bytes_needed(self) -> int:
        return self.parameters * HELD_ITEM_BYTES


@dataclass(kw_only=True, eq=False)
class Resident(MemoryEntry):
    """bytes: taken, or promised while it is loading. All but `content` is changed under its tiers'
    lock alone.

    places    of its trained prefix
    holders   sequences that have blocks
    fresh     it has come for a request, and none has had it yet
    draining  gets no new sequences, so that it can go
    unwanted  goes as soon as nobody asks for it
    load      number of the last one; what an older one brings is dropped
    begun     when a thread began with that; None: it waits for one. reading: threads that read
    moment    of its last use, or of its failure
    """

    content: str
    """Id of all its files (library/objects.py): versions that differ in veneer.json alone are asked
    differently."""
    files: VersionFiles
    tier: Tier = Tier.DISK
    attachment: Attachment | None = None
    places: int = 0
    holders: int = 0
    fresh: bool = False
    draining: bool = False
    unwanted: bool = False
    error: VeneerError | None = None
    load: int = 0
    begun: float | None = None
    reading: int = 0
    moment: float = 0.0


@dataclass(frozen=True)
class ResidentStatus:
    """A version that is in memory, on its way, or broken. version: its content_hash. idle_seconds:
    since it was last used."""

    reference: str
    content: str
    version: str
    tier: Tier
    bytes: int
    holders: int
    pinned: bool
    idle_seconds: float
    error: VeneerError | None
