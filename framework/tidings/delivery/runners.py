"""Gives an event to the handlers of its kind: those with a session share transactions, the others run side by side."""

from __future__ import annotations

from collections.abc import Sequence

from tidings.delivery.concurrent_groups import ConcurrentGroups
from tidings.delivery.groups import Groups
from tidings.delivery.inflight import InFlight
from tidings.delivery.seats import Seat
from tidings.delivery.side_by_side import SideBySide

__all__ = ["Runners"]


class Runners:
    """The way to each kind of handler, for one bucket range."""

    def __init__(self, side_by_side: SideBySide, groups: Groups, concurrent: ConcurrentGroups | None) -> None:
        self.side_by_side = side_by_side
        self.groups = groups
        self.concurrent = concurrent
        """None on a database with one writer."""
        side_by_side.ask = self.ask

    def give(self, item: InFlight) -> None:
        """Run it as soon as there is room."""
        if item.handler.transactional:
            self.groups.give(item)
        else:
            self.side_by_side.give(item)

    def give_all(self, items: Sequence[InFlight]) -> None:
        """As `give` of each."""
        if any(item.handler.transactional for item in items):
            for item in items:
                self.give(item)
        else:
            self.side_by_side.give_all(items)

    def ask(self, seat: Seat) -> None:
        """Give a handler that declared no session, and is at work, the next transaction that has room."""
        if self.concurrent is None or not self.concurrent.ask_late(seat):
            self.groups.ask(seat)

    def take_back(self) -> int:
        """Forget what nobody has begun, and say how many that were."""
        others = self.concurrent.take_back() if self.concurrent is not None else 0
        return self.side_by_side.take_back() + self.groups.take_back() + others
