"""Changes of one stream that compete: in one process they queue, against other processes they are tried again.

It knows neither events nor stores, only that an attempt may lose to another (`WrongExpectedVersion`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from tidings._support.backoff import Backoff
from tidings.errors import Contention, WrongExpectedVersion

__all__ = ["CHANGE_SECONDS", "Turns"]

T = TypeVar("T")

CHANGE_SECONDS: Final = 10.0
"""Seconds that a change may take, its wait in the queue included, until it gives up."""
PAUSE_SECONDS: Final = (0.002, 0.1)
"""First and longest pause after a lost attempt, in seconds; each is drawn at random from half of it to all."""


class _Queue:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()  # first come, first served
        self.users = 0


class Turns:
    """One queue per stream that is being changed; a stream that nobody changes has none."""

    def __init__(self, seconds: float = CHANGE_SECONDS) -> None:
        self.seconds = seconds
        self._queues: dict[tuple[asyncio.AbstractEventLoop, str], _Queue] = {}

    def __len__(self) -> int:
        """Return how many streams are being changed."""
        return len(self._queues)

    async def until_won(self, stream: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Make the attempt in its turn, again and again until it loses to nobody, and return what it returns.

        Raises `Contention` after `seconds`, never in the middle of an attempt, and never before one was made in turn.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.seconds
        async with self._turn(stream, deadline):
            lost, backoff = 0, Backoff(*PAUSE_SECONDS, jitter=0.5)
            while True:
                try:
                    return await attempt()
                except WrongExpectedVersion as error:
                    lost += 1
                    if loop.time() + backoff.pause >= deadline:
                        raise Contention(stream, self.seconds, lost) from error
                    await backoff.wait()

    @asynccontextmanager
    async def _turn(self, stream: str, deadline: float) -> AsyncIterator[None]:
        key = asyncio.get_running_loop(), stream
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue()
        queue.users += 1
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    await queue.lock.acquire()
            except TimeoutError:
                raise Contention(stream, self.seconds, 0) from None
            try:
                yield
            finally:
                queue.lock.release()
        finally:
            queue.users -= 1
            if not queue.users:
                del self._queues[key]
