"""One version of an adapter in a server's memory, and its status for clients."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from veneer.adapters.placement.attachment import Attachment
from veneer.errors import BudgetFullError, VeneerError
from veneer.library.residents.eviction import HELD_ITEM_BYTES, MemoryEntry


class Tier(Enum):
    DISK = "disk"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class VersionFiles:
    """Locates a version. content_hash: of its tensors and config, checked on reading. made:
    identity of the folder, which changes when it is replaced.
    """

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
    """Holds the state of one version. All but `content` changes only under the lock of its Tiers.

    bytes     in use, or reserved while it loads

    places    positions of its trained prefix
    holders   sequences with blocks
    fresh     loaded for a request that has not used it yet
    draining  gets no new sequences, so that it can be evicted
    unwanted  evicted as soon as nobody asks for it
    load      number of its last load; results of older loads are dropped
    begun     time when a thread began that load; None while it waits. reading: threads that read
    moment    time of its last use or failure
    """

    content: str
    """Id of all its files (library/objects.py); versions that differ only in veneer.json differ
    here.
    """
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

    def status(self, now: float) -> "ResidentStatus":
        return ResidentStatus(
            self.files.reference,
            self.content,
            self.files.content_hash,
            self.tier,
            self.bytes,
            self.holders,
            self.pinned,
            now - self.moment,
            self.error,
        )

    def start_loading(self, number: int) -> None:
        """Reserves the bytes that it needs."""
        self.tier, self.load, self.begun = Tier.LOADING, number, None
        self.bytes = self.files.bytes_needed

    def fail(self, fault: VeneerError, now: float) -> None:
        fault.__traceback__ = fault.__cause__ = fault.__context__ = None  # frees their frames
        self.tier, self.error, self.bytes, self.moment = Tier.FAILED, fault, 0, now

    def evict(self) -> str:
        """Leaves it on disk alone; returns the name to detach from the base."""
        assert self.attachment is not None
        name = self.attachment.name
        self.tier, self.attachment, self.bytes, self.unwanted = Tier.DISK, None, 0, False
        return name


@dataclass(frozen=True)
class ResidentStatus:
    """Reports a version that is in memory, loading, or failed. version: its content_hash."""

    reference: str
    content: str
    version: str
    tier: Tier
    bytes: int
    holders: int
    pinned: bool
    idle_seconds: float
    error: VeneerError | None


def budget_error(
    wanted: Collection[Resident], residents: Collection[Resident], budget_bytes: int
) -> BudgetFullError:
    """Returns the error that these residents find no room, with what is in the way."""
    needed = sum(resident.bytes or resident.files.bytes_needed for resident in wanted)
    unmovable = [
        resident
        for resident in residents
        if resident.bytes and resident not in wanted and (resident.pinned or resident.holders)
    ]
    return BudgetFullError(
        f"{', '.join(resident.files.reference for resident in wanted)}: {needed:,} bytes, and"
        f" adapters have {budget_bytes:,}",
        [
            f"{resident.files.reference}: {resident.bytes:,} bytes,"
            f" {'pinned' if resident.pinned else 'in use'}"
            for resident in unmovable
        ],
        "Unpin or unload some, or raise the budget.",
    )
