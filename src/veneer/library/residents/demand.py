"""What sequences ask for in a round of the decoding thread, and what may be evicted meanwhile."""

from collections.abc import Iterable
from dataclasses import dataclass

from veneer.decoding.schedule.block_names import Identity
from veneer.library.residents.resident import Resident, Tier


@dataclass
class PendingLoad:
    """Waits for an identity to be loaded. by_hand: not for a request. since: number of grants when
    it first found no room, None if it has not been tried.
    """

    by_hand: bool = False
    since: int | None = None


class Demand:
    """Records the identities that were asked for. Contents that were reported as ready stay until
    the round ends; those of the last round, and announced ones, count as wanted."""

    def __init__(self) -> None:
        self.requested: set[Identity] = set()
        self._offered: set[str] = set()
        self._wanted: set[str] = set()

    def announce(self, resident: Resident) -> None:
        """Expects a request for it in the next round."""
        resident.unwanted = False
        self._wanted.add(resident.content)

    def offer(self, residents: Iterable[Resident]) -> None:
        """Keeps residents that were reported as ready."""
        self._offered.update(resident.content for resident in residents)

    def end_round(self) -> set[Identity]:
        """Returns what was requested in this round."""
        requested, self.requested = self.requested, set()
        self._offered.clear()
        self._wanted = {content for identity in requested for content, _ in identity}
        return requested

    def may_evict(self, resident: Resident) -> bool:
        waited_for = resident.fresh and resident.content in self._wanted
        return resident.tier is Tier.READY and not (
            resident.holders or waited_for or resident.content in self._offered
        )

    def is_unwanted(self, resident: Resident) -> bool:
        """Returns whether a resident that is to be unloaded is not in use either."""
        in_use = resident.pinned or resident.holders
        asked_for = resident.content in self._offered or resident.content in self._wanted
        return resident.unwanted and not (in_use or asked_for)
