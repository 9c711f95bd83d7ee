"""Whether an event may share one of several transactions under way. Pure decisions; no I/O."""

from __future__ import annotations

from tidings.delivery.batch import Pending
from tidings.delivery.hindrances import Hindrances
from tidings.delivery.inflight import InFlight, Role
from tidings.delivery.progress import Progress
from tidings.delivery.site import Joined

__all__ = ["Fitness"]


class Fitness:
    """The fitness of the events in flight of one bucket range."""

    def __init__(self, joined: Joined, hindrances: Hindrances, pending: Pending, progress: Progress) -> None:
        self._memory = joined.site.memory
        self._caution = joined.caution
        self._hindrances = hindrances
        self.pending = pending
        self._progress = progress

    def of(self, item: InFlight) -> bool:
        """It is plain, its handler has a session, and nothing hinders it."""
        return item.handler.transactional and self.is_plain(item) and self._hindrances.of(item) is None

    def is_plain(self, item: InFlight) -> bool:
        """It is new, and not suspected of anything that needs a transaction of its own."""
        if item.role > Role.SHARED or item.replayed or self._caution.alert or self._progress.spans:
            return False
        memory, turn = self._memory, item.turn
        known = turn in memory.suspected or turn in memory.condemned
        return not known and item.event.position not in memory.crashed
