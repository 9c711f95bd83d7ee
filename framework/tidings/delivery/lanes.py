"""One lane for each bucket: of each, one event is under way at a time. The only way by which an event comes back.

It gives events to the gate while the gate is open. It knows no handler, and does no I/O.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

from tidings._support.timers import Timers
from tidings.delivery.crashes import Caution
from tidings.delivery.inflight import TAKEN, InFlight, State
from tidings.protocol.position import Lanes

__all__ = ["EventLanes"]


class _Gate(Protocol):
    caution: Caution
    """While this is not alert, the gate is not shut."""

    def shut(self) -> float:
        """Seconds until an event may be taken, 0 for now."""

    def take(self, item: InFlight) -> None: ...

    def take_all(self, items: Sequence[InFlight]) -> None:
        """As `take` of each, while `caution` is not alert."""


class _Puller(Protocol):
    led: bool
    """It is at work, and calls `pump` when it has nothing left to begin."""


class EventLanes:
    """The lanes of one bucket range. Closed until `open`, and after `close`."""

    def __init__(self, timers: Timers) -> None:
        self._lanes: Lanes[InFlight] = Lanes()
        self._timers = timers
        self._gate: _Gate | None = None
        self._pumping = True
        """Nothing is given out while this is set: the lanes are closed, or `pump` is at it."""
        self._look_again: asyncio.TimerHandle | None = None
        self.under_way = 0
        """Events given out whose outcome is not committed."""
        self.puller: _Puller | None = None
        """Who need not be told of what is ready while it is at work: it takes many at once, which is less work."""
        self._rests: dict[int, tuple[InFlight, asyncio.TimerHandle]] = {}
        """By bucket: the event that rests between two quick attempts, and the end of its pause."""

    def __len__(self) -> int:
        """Events in all lanes, those given out included."""
        return len(self._lanes)

    @property
    def resting(self) -> int:
        """Events that rest between two quick attempts."""
        return len(self._rests)

    def open(self, gate: _Gate) -> None:
        """Give out what is there, and what comes."""
        self._gate = gate
        self._pumping = False
        self.pump()

    def close(self) -> None:
        """Give out nothing more."""
        self._pumping = True

    def add(self, item: InFlight) -> None:
        """The last of its bucket; `pump` gives it out when its turn has come."""
        self._lanes.push(item.bucket, item)

    def pump(self) -> None:
        """Give out what is ready. What ends at once calls this again from within: once is enough."""
        lanes = self._lanes
        if self._pumping or not lanes.ready:
            return
        self._pumping = True
        gate = self._gate
        assert gate is not None
        caution = gate.caution
        while lanes.ready:
            if not caution.alert:
                items = lanes.take_all()
                self.under_way += len(items)
                for item in items:
                    item.to(TAKEN)
                gate.take_all(items)
                continue
            if gate.shut():
                break
            taken = lanes.take()
            assert taken is not None
            item = taken[1]
            self.under_way += 1
            item.to(TAKEN)
            gate.take(item)
        self._pumping = False
        if lanes.ready and self._look_again not in self._timers and (pause := gate.shut()):
            self._look_again = self._timers.later(pause, self.pump)

    def flow(self) -> None:
        """Have given out what is ready: at once, or as soon as the puller asks for it."""
        if self._lanes.ready and (self.puller is None or not self.puller.led):
            self.pump()

    def finish(self, item: InFlight) -> None:
        """It is done, held or dead: its lane goes on. Whoever commits it says so with `committed`."""
        self._lanes.finish(item.bucket)
        self.flow()

    def leave(self, item: InFlight) -> None:
        """It is left as it was, and leaves its lane without a commit."""
        self.under_way -= 1
        self.finish(item)

    def park(self, item: InFlight) -> None:
        """It cannot begin before something else of its bucket is committed: it waits in its lane until `unpark`."""
        item.to(State.WAITING)
        self.under_way -= 1

    def unpark(self, buckets: Iterable[int]) -> None:
        """What these buckets wait for is committed."""
        for bucket in buckets:
            self._lanes.again(bucket)
        self.pump()

    def undo(self, finished: Iterable[InFlight], begun: Iterable[InFlight], parked: Iterable[int]) -> None:
        """A transaction was undone: what was `finished` in it, and what it had only `begun` or taken, is given out
        again in the order of its lane. `parked` are buckets that waited for it.

        What rests behind something finished rests no longer: its next attempt comes after that one's.
        """
        again: dict[int, list[InFlight]] = {bucket: [] for bucket in parked}
        for item in finished:
            again.setdefault(item.bucket, []).append(item)
            self.park(item)
        for item in begun:
            again.setdefault(item.bucket, [])
            self.park(item)
        for bucket, items in again.items():
            if (rest := self._rests.pop(bucket, None)) is not None:
                self._timers.cancel(rest[1])
                rest[0].to(State.WAITING)
            self._lanes.put_back(bucket, items)
        self.pump()

    def rest(self, item: InFlight, seconds: float) -> None:
        """It was not done: after so many seconds it is given out again, before anything behind it."""

        def again() -> None:
            del self._rests[item.bucket]
            item.to(State.WAITING)
            self._lanes.again(item.bucket)
            self.pump()

        self.under_way -= 1
        self._rests[item.bucket] = (item, self._timers.later(seconds, again))

    def committed(self, number: int) -> None:
        """What came of so many is durable, or nobody will begin them any more."""
        self.under_way -= number
