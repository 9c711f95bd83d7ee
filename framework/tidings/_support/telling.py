"""Tells the log of an outage: at once, then ever more seldom, and its end with how long it lasted. It never waits.

Loops that try again every second would fill the log of an outage with one line, thousands of times.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, Final

__all__ = ["STEADY_SECONDS", "Telling"]

STILL_SECONDS: Final = (60.0, 600.0)
"""Seconds until an outage is told again, and at most; each interval is twice the one before."""
STEADY_SECONDS: Final = 5.0
"""Seconds without a failure after which an outage is over, where a try may seem to succeed."""
KINDS: Final = 16
"""Different failures of one outage of which each is told at once."""
_VARIES: Final = re.compile(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b|0x[0-9a-f]+|\d+(?:\.\d+)?")


class Telling:
    """The outages of one loop, told to the logger `log` as warnings."""

    __slots__ = ("_attempts", "_clock", "_interval", "_kinds", "_log", "_seems_over", "_since", "_told_at")

    def __init__(self, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._log = log
        self._clock = clock
        self._kinds: set[tuple[str, str]] = set()
        self._since: float | None = None
        self._attempts = 0
        self._interval = self._told_at = 0.0
        self._seems_over: asyncio.TimerHandle | None = None

    def failed(self, event: str, error: object, *, kind: str | None = None, **facts: Any) -> None:
        """Tell of a failure, unless the same was told lately, and then with how long it has lasted, in seconds, and the
        number of attempts. The same is what has the same `kind`, by default the text of the error without its
        numbers."""
        self._cancel()
        now, same = self._clock(), (event, _VARIES.sub("", str(error)) if kind is None else kind)
        self._attempts += 1
        if self._since is None:
            self._since, self._interval = now, STILL_SECONDS[0]
        else:
            facts |= {"attempts": self._attempts, "lasting": round(now - self._since, 1)}
        if same not in self._kinds and len(self._kinds) < KINDS:
            self._kinds.add(same)
        elif now - self._told_at < self._interval:
            return
        else:
            self._interval = min(self._interval * 2, STILL_SECONDS[1])
        self._told_at = now
        self._log.warning(event, error=str(error), **facts)

    def over(self, event: str, **facts: Any) -> None:
        """What failed has succeeded: if that was an outage, tell how long it lasted, in seconds."""
        if self._since is not None:
            self._end(self._clock() - self._since, event, facts)

    def seems_over(self, event: str, **facts: Any) -> None:
        """What failed seems to succeed: tell it as `over` does, unless it fails again within `STEADY_SECONDS`, or the
        task that calls this ends."""
        if self._since is not None and self._seems_over is None:
            lasted, task = self._clock() - self._since, asyncio.current_task()
            loop = asyncio.get_running_loop()
            self._seems_over = loop.call_later(STEADY_SECONDS, self._is_steady, task, lasted, event, facts)

    def _is_steady(self, task: asyncio.Task[Any] | None, seconds: float, event: str, facts: dict[str, Any]) -> None:
        self._cancel()
        if task is None or not task.done():
            self._end(seconds, event, facts)

    def _end(self, seconds: float, event: str, facts: dict[str, Any]) -> None:
        self._cancel()
        self._log.warning(event, seconds=round(seconds, 1), attempts=self._attempts, **facts)
        self._since, self._attempts = None, 0
        self._kinds.clear()

    def _cancel(self) -> None:
        if self._seems_over is not None:
            self._seems_over.cancel()
            self._seems_over = None
