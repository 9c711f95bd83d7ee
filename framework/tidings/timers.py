"""Calls that are made after some seconds, none of which outlives the one who asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Timers"]


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

    def close(self) -> None:
        for timer in self._set:
            timer.cancel()
        self._set.clear()
