"""The circuit breaker of a service: when everything fails, stop trying everything. Pure decisions; no I/O.

A gateway that is down, or a release that is broken, would otherwise fill the held events and then the dead letters
with what nobody did wrong. Open, it lets one attempt through from time to time, each of another bucket where there are
several; the first that succeeds closes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

__all__ = ["Breaker"]

FAILURES: Final = 20
"""So many attempts must fail in a row ..."""
KEYS: Final = 5
"""... at events of so many partition keys: one order that is broken is no outage, however often it is tried."""
CLOSE: Final = 0.01
"""Seconds: a timer may ring a little early."""
PAUSES: Final = (1.0, 30.0)
"""Seconds before the first and, doubling, at most before each further probe."""


class Breaker:
    """Told of every attempt's end; asked before every attempt."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.failures = 0
        """So many attempts in a row have failed."""
        self._keys: set[str] = set()
        self._pause = PAUSES[0]
        self._probe_at = 0.0
        self._probing = False
        self.opened_at: float | None = None
        """When it opened, by the clock; None while it is closed."""
        self.reason = ""
        """Of the last failure."""

    def admits(self) -> bool:
        """May one more attempt begin? Open, it may when a probe is due and none is under way."""
        if self.opened_at is None:
            return True
        if self._probing or self._clock() + CLOSE < self._probe_at:
            return False
        self._probing = True
        return True

    @property
    def wait(self) -> float:
        """Seconds until the next probe is due."""
        return max(0.0, self._probe_at - self._clock())

    def passed_by(self) -> None:
        """What was let through ended without an attempt: another may go in its place."""
        self._probing = False

    def succeeded(self) -> bool:
        """True when this closed it."""
        self.failures = 0
        self._keys.clear()
        closed = self.opened_at is not None
        self.opened_at, self._probing, self._pause = None, False, PAUSES[0]
        return closed

    def failed(self, key: str, reason: str) -> bool:
        """True when this opened it."""
        self.reason = reason
        if self.opened_at is not None:
            if self._probing:
                self._probing, self._pause = False, min(2 * self._pause, PAUSES[1])
                self._probe_at = self._clock() + self._pause
            return False
        self.failures += 1
        if len(self._keys) < KEYS:
            self._keys.add(key)
        if self.failures < FAILURES or len(self._keys) < KEYS:
            return False
        self.opened_at = self._clock()
        self._probe_at = self.opened_at + self._pause
        return True
