"""Waits for futures with a limit, of which many under way share one timer of the event loop.

`asyncio.wait` makes a timer, two sets and a list for each, which takes longer than a small handler.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

__all__ = ["SharedTimeouts"]


class SharedTimeouts:
    """For one event loop. Its timer ends with the last wait."""

    def __init__(self) -> None:
        self._waits: dict[asyncio.Future[None], float] = {}
        """Who waits, and until when."""
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0
        """When the timer rings."""

    async def wait(self, work: asyncio.Future[Any], seconds: float) -> None:
        """Wait until `work` is done, or for so many seconds. It goes on when the waiting task is cancelled."""
        if work.done():
            return
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        until = loop.time() + seconds
        self._waits[waiter] = until
        if self._timer is None or until < self._next:
            self._ring_at(until)
        done = partial(_release, waiter)
        work.add_done_callback(done)
        try:
            await waiter
        finally:
            del self._waits[waiter]
            if not work.done():
                work.remove_done_callback(done)
            if not self._waits and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _ring_at(self, until: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._next = asyncio.get_running_loop().call_at(until, self._ring), until

    def _ring(self) -> None:
        self._timer = None
        now = max(self._next, asyncio.get_running_loop().time())  # loops may ring a little early
        for waiter, until in sorted(self._waits.items(), key=lambda each: each[1]):
            if until <= now:
                _release(waiter)
        left = [until for until in self._waits.values() if until > now]
        if left:
            self._ring_at(min(left))


def _release(waiter: asyncio.Future[None], work: object = None) -> None:
    if not waiter.done():
        waiter.set_result(None)
