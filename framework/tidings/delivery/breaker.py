"""The circuit breaker of each handler: while one handler always fails, only trials of it run. Pure decisions; no I/O.

A gateway that is down, or a release that is broken, would otherwise fill the dead letters with what nobody did wrong.
While a handler's breaker is open, its events are held without an attempt, and everything else goes on: other handlers,
their types and keys. From time to time one of the held events is tried, a *trial*. Trials go from key to key, so that
one event that can never succeed hides no recovery, and they count, so that such an event is dead in the end. The first
success closes the breaker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tidings._support.backoff import Backoff

__all__ = ["Breaker", "Breakers"]

FAILURES: Final = 20
"""Attempts in a row that must fail to open it ..."""
KEYS: Final = 5
"""... and partition keys among them: one order that is broken is no outage, however often it is tried."""
CLOSE: Final = 0.01
"""Seconds by which a timer may ring early."""
PAUSES: Final = (1.0, 30.0)
"""Seconds before the first trial and, doubling, at most before each further one."""


class Breaker:
    """The breaker of one handler: told how every attempt ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.failures = 0
        """Attempts in a row that failed."""
        self._keys: set[str] = set()
        self._backoff = Backoff(*PAUSES)
        self._trial_at = 0.0
        self.trying = False
        """A trial is under way."""
        self.trials = 0
        """Trials since it opened."""
        self.opened_at: float | None = None
        """When it opened, by the clock; None while it is closed."""
        self.reason = ""
        """Reason of the last failure."""

    @property
    def open(self) -> bool:
        """Only trials run."""
        return self.opened_at is not None

    @property
    def wait(self) -> float:
        """Seconds until the next trial is due."""
        return max(0.0, self._trial_at - self._clock())

    @property
    def wants_trial(self) -> bool:
        """A trial is due, and none is under way."""
        return self.open and not self.trying and self.wait <= CLOSE

    @property
    def takes_newest(self) -> bool:
        """The next trial is of the key that came last. They alternate with trials of what is due the longest: the
        newest shows soonest that a recovery came, and the oldest must not wait for ever."""
        return self.trials % 2 == 0

    def begin_trial(self) -> None:
        self.trying = True
        self.trials += 1

    def end_trial(self) -> None:
        """The event that was to be tried ended without an attempt: another may be tried in its place."""
        self.trying = False

    def succeeded(self) -> bool:
        """True when this closed it."""
        self.failures = self.trials = 0
        self._keys.clear()
        closed = self.open
        self.opened_at, self.trying = None, False
        self._backoff.reset()
        return closed

    def failed(self, key: str, reason: str, *, trial: bool = False) -> bool:
        """True when this opened it."""
        self.reason = reason
        if self.open:
            if trial:
                self.trying = False
                self._trial_at = self._clock() + self._backoff.step()
            return False
        self.failures += 1
        if len(self._keys) < KEYS:
            self._keys.add(key)
        if self.failures < FAILURES or len(self._keys) < KEYS:
            return False
        self.opened_at = self._clock()
        self._trial_at = self.opened_at + self._backoff.step()
        return True


class Breakers:
    """The breakers of one service's handlers, by the handler's name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.known: dict[str, Breaker] = {}
        """Those of handlers of which an attempt has failed, and none succeeded since. To look at only."""
        self.open: dict[str, Breaker] = {}
        """Those that are open. To look at only."""

    def of(self, handler: str) -> Breaker:
        """The breaker of one handler."""
        found = self.known.get(handler)
        if found is None:
            found = self.known[handler] = Breaker(self._clock)
        return found

    def succeeded(self, handler: str) -> bool:
        """An attempt succeeded. True when this closed the handler's breaker."""
        known = self.known.pop(handler, None)
        self.open.pop(handler, None)
        return known is not None and known.succeeded()

    def failed(self, handler: str, key: str, reason: str, *, trial: bool = False) -> bool:
        """An attempt failed. True when this opened the handler's breaker."""
        breaker = self.of(handler)
        opened = breaker.failed(key, reason, trial=trial)
        if opened:
            self.open[handler] = breaker
        return opened
