"""Who sits where: events under way in their buckets, the group that has each bucket, and the seats that wait for one.

A bucket belongs to one group at a time, until that is committed or undone. Bookkeeping only; no I/O.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Final

from tidings.delivery.batch import Batch, Pending
from tidings.delivery.inflight import InFlight
from tidings.delivery.seats import Seat

__all__ = ["Group", "Seating"]

TURNS: Final = 2
"""Turns of the event loop that a group waits for a seat that is about to be asked for."""


class Group:
    """One transaction, from its first seat on."""

    def __init__(self) -> None:
        self.waiting: deque[Seat] = deque()
        """They have asked, and their bucket is the group's."""
        self.coming = 0
        """Seats in its buckets that have not asked yet."""
        self.batch = Batch()
        """What it has done."""
        self.buckets: set[int] = set()
        self.parked: set[int] = set()
        """Buckets of which the next event waits in its lane until the group is committed."""
        self.open = True
        """It takes further seats."""


class Seating:
    """The seats of one bucket range."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._seats: dict[int, Seat] = {}
        """By bucket: from the moment its event is taken out of its lane until what came of it is judged."""
        self._owners: dict[int, Group] = {}
        """By bucket."""
        self._asked: deque[Seat] = deque()
        """Their buckets are nobody's."""
        self._late: list[Seat] = []
        """Their bucket has something in the next commit, which goes before them."""
        self._resting: deque[asyncio.Future[None]] = deque()
        """Transactions that nobody has asked for."""

    def owner(self, bucket: int) -> Group | None:
        """Return the group that has the bucket."""
        return self._owners.get(bucket)

    def sit(self, item: InFlight) -> Seat:
        """Return a seat for an event that is taken out of its lane now."""
        seat = self._seats[item.bucket] = Seat(item, self._ask)
        group = self._owners.get(item.bucket)
        if group is not None:
            group.coming += 1
        return seat

    def leave(self, seat: Seat) -> None:
        """The event is judged, or goes back to its lane."""
        del self._seats[seat.item.bucket]
        if not seat.asked and (group := self._owners.get(seat.item.bucket)) is not None:
            group.coming -= 1

    def unbegun(self) -> int:
        """Forget the seats whose attempts have not begun, and return their number."""
        unbegun = [bucket for bucket, seat in self._seats.items() if seat.given is None]
        for bucket in unbegun:
            del self._seats[bucket]
        return len(unbegun)

    def ask_late(self, seat: Seat) -> None:
        """A handler that declared no session wants one."""
        self._seats[seat.item.bucket] = seat
        if self._pending.claims(seat.item.bucket):
            self._late.append(seat)
        else:
            self._put(seat)

    def committed(self) -> None:
        """The next commit is over: what waited for it may go on."""
        late, self._late = self._late, []
        for seat in late:
            self.ask_late(seat)

    async def first(self) -> tuple[Group, Seat]:
        """Wait for a seat that is nobody's, and begin a group with it."""
        while not self._asked:
            rest = asyncio.get_running_loop().create_future()
            self._resting.append(rest)
            await rest
        group = Group()
        return group, self._own(group, self._asked.popleft())

    async def following(self, group: Group) -> Seat | None:
        """Return the next seat of the group; None where nobody asks for one."""
        for turn in range(TURNS + 1):
            if group.waiting:
                return group.waiting.popleft()
            if self._asked:
                return self._own(group, self._asked.popleft())
            if group.coming <= 0 or turn == TURNS:
                return None
            await asyncio.sleep(0)
        return None

    def release(self, group: Group) -> None:
        """It is committed or undone: nobody has its buckets any more."""
        for bucket in group.buckets:
            del self._owners[bucket]

    def seats_of(self, group: Group) -> list[Seat]:
        """Return those in its buckets that are not judged."""
        return [seat for bucket in group.buckets if (seat := self._seats.get(bucket)) is not None]

    def go_on(self, waiting: Iterable[Seat]) -> None:
        """The group that they waited for is committed or undone, and released: they ask anew."""
        for seat in waiting:
            self._put(seat)

    def _own(self, group: Group, seat: Seat) -> Seat:
        group.buckets.add(seat.item.bucket)
        self._owners[seat.item.bucket] = group
        return seat

    def _ask(self, seat: Seat) -> None:
        group = self._owners.get(seat.item.bucket)
        if group is None:
            self._put(seat)
        else:
            group.coming -= 1
            group.waiting.append(seat)

    def _put(self, seat: Seat) -> None:
        self._asked.append(seat)
        while self._resting:
            rest = self._resting.popleft()
            if not rest.done():
                rest.set_result(None)
                return
