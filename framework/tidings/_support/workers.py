"""A fixed number of tasks that begin what they are given in order, side by side only where something has to wait.

What waits for nothing is done by one task after the other without a turn of the event loop between them; a task that
has to wait wakes the next one before. It knows neither events nor handlers, and catches nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Generic, TypeVar

__all__ = ["Workers"]

T = TypeVar("T")

TURN: Final = 64
"""Calls after which other tasks of the event loop get their turn, in case none of the calls has waited."""


class Workers(Generic[T]):
    """`begin(item)` does what can be done at once, and returns what is to be awaited then, or None."""

    def __init__(self, number: int, begin: Callable[[T], Awaitable[None] | None]) -> None:
        self._number = number
        self._begin = begin
        self._given: deque[T] = deque()
        self._resting: list[asyncio.Future[None]] = []
        self.led = False
        """One of the tasks is at the items that nobody has begun, or was woken to be. To look at only."""
        self.drained: Callable[[], None] = _nothing
        """Called when nothing is left to begin, before whoever was at it rests or waits. It may give more."""

    def give(self, item: T) -> None:
        self._given.append(item)
        if not self.led:
            self._wake()

    def give_all(self, items: Iterable[T]) -> None:
        self._given.extend(items)
        if not self.led:
            self._wake()

    def take_back(self) -> int:
        """Forget what nobody has begun, and say how many that were."""
        number = len(self._given)
        self._given.clear()
        return number

    async def run(self) -> None:
        """Until cancelled, or until one of the items raises."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._number):
                tasks.create_task(self._work())

    def _has_more(self) -> bool:
        self.drained()
        return bool(self._given)

    def _wake(self) -> None:
        while self._resting:
            rest = self._resting.pop()
            if not rest.done():  # its task was cancelled
                rest.set_result(None)
                self.led = True
                return

    async def _work(self) -> None:
        given, begin = self._given, self._begin
        while True:
            if self.led or not given:
                rest = asyncio.get_running_loop().create_future()
                self._resting.append(rest)
                await rest
            self.led = True
            left = TURN
            while given or self._has_more():
                waits = begin(given.popleft())
                if waits is not None:
                    self.led = False
                    if given:
                        self._wake()
                    else:
                        self.drained()
                    await waits
                    if self.led:
                        break
                    self.led = True
                left -= 1
                if not left:
                    left = TURN
                    await asyncio.sleep(0)
            else:
                self.led = False


def _nothing() -> None:
    """Nobody has more."""
