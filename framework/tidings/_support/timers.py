"""Calls that are made after some seconds, none of which outlives the one who asked for them; and a clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

__all__ = ["Timers", "counting_sleep"]


def counting_sleep(clock: Callable[[], float]) -> Callable[[], float]:
    """Return a clock that, unlike `time.monotonic`, goes on while the machine sleeps, as laptops do.

    Any other clock is returned as it is, and so is this one where the system has none.
    """
    since_boot = getattr(time, "CLOCK_BOOTTIME", None)
    if clock is not time.monotonic or since_boot is None:
        return clock
    return partial(time.clock_gettime, since_boot)


class Timers:
    """For one event loop; `close` it there."""

    def __init__(self) -> None:
        self._set: set[asyncio.TimerHandle] = set()

    def later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        def ring() -> None:
            self._set.discard(timer)
            call()

        timer = asyncio.get_running_loop().call_later(seconds, ring)
        self._set.add(timer)
        return timer

    def __contains__(self, timer: asyncio.TimerHandle | None) -> bool:
        """It has not rung yet."""
        return timer in self._set

    def cancel(self, timer: asyncio.TimerHandle) -> None:
        """It does not ring. Harmless when it has rung."""
        timer.cancel()
        self._set.discard(timer)

    def close(self) -> None:
        for timer in self._set:
            timer.cancel()
        self._set.clear()
