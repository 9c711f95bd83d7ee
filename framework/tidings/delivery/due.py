"""What calls for a look at the held events: a time that has come, a line of which some have landed, an operator.

It looks at nothing itself, and does no I/O.
"""

from __future__ import annotations

import asyncio
from typing import Final

from tidings._support.timers import Timers
from tidings.database.held_events import HeldEvent, Line
from tidings.delivery.keys import Keys

__all__ = ["HELD_SECONDS", "Due"]

HELD_SECONDS: Final = 1.0
"""Seconds between looks through all held events, because operators may have changed what they wait for. What a service
knows itself (a time that has come, an event that ran) it looks for at once, and only for that."""
MANY: Final = 4_000
"""Held events from which on looks through all of them are further apart: each reads all their keys."""
LONGEST: Final = 10.0
"""Factor by which such looks are further apart than `HELD_SECONDS`, at most."""


class Due:
    """Told by the stages behind the lanes; read by who brings held events back (`tidings.delivery.revival`)."""

    def __init__(self, keys: Keys, timers: Timers) -> None:
        self._keys = keys
        self._timers = timers
        self.look = asyncio.Event()
        """Look again now, not only when the second is over."""
        self.resumed = asyncio.Event()
        """Set when a handler that was paused succeeds."""
        self.left: set[Line] = set()
        """Lines of which a held event has landed and left others behind."""
        self.whole = True
        """The next look is through all held events."""
        self.stale = False
        """Operators may have changed what blocks keys: read it again. What this process does, it knows; what another
        process does, fences it."""

    @property
    def pauses(self) -> float:
        """How many times `HELD_SECONDS` lie between two looks through all held events."""
        return min(max(1.0, self._keys.rows / MANY), LONGEST)

    def resume(self) -> None:
        """A handler that was paused has succeeded."""
        self.look_at_all()
        self.resumed.set()

    def look_at_all(self) -> None:
        """Look through all held events now: what they waited for may be over."""
        self.whole = True
        self.look.set()

    def look_in(self, seconds: float) -> None:
        """Look when so many seconds are over."""
        self._timers.later(seconds, self.look.set)

    def landed(self, row: HeldEvent) -> None:
        """What came of a held event is durable, or it was left alone."""
        if self._keys.land(row.line):
            if self._keys.blocks(row):
                self.left.add(row.line)
            self.look.set()
