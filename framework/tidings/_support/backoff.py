"""Pauses between attempts that grow while attempts keep failing. It decides how long to wait, never whether to go on.

Libraries for retries (tenacity, stamina) own the loop and count its attempts. The loops of Tidings run for
days: they start over at the first pause as soon as they got anywhere, tell the log how long the next
pause is, and end a pause early when the process is asked to stop.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

__all__ = ["Backoff", "becomes_true", "nth_pause"]


def nth_pause(
    number: int,
    first: float,
    longest: float,
    *,
    factor: float = 2.0,
    jitter: float = 0.0,
    random: Callable[[], float] = random.random,
) -> float:
    """Return the seconds of pause `number` (from 1): `first * factor**(number - 1)`, `longest` at most.

    `jitter`, 0 to 1, is the share of the pause by which it may be shortened at random; `random` returns 0 to 1.
    """
    try:
        full = min(first * float(factor) ** (number - 1), longest)
    except OverflowError:
        full = longest if first else 0.0
    return full * (1 - jitter * random()) if jitter else full


class Backoff:
    """Pauses of one loop, from `first` to `longest` seconds.

    Each is `factor` times the one before, shortened at random by up to the share `jitter` (0 to 1) of itself. Time
    passes by the clock of the running event loop, so that a test or a simulation with a loop of its own decides it.
    """

    __slots__ = ("_factor", "_first", "_jitter", "_longest", "_number", "_random", "pause")

    def __init__(
        self,
        first: float,
        longest: float,
        *,
        factor: float = 2.0,
        jitter: float = 0.0,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._first = first
        self._longest = longest
        self._factor = factor
        self._jitter = jitter
        self._random = random
        self._number = 1
        self.pause = self._drawn()
        """Seconds of the next pause."""

    def reset(self) -> None:
        """Begin again with the first pause: an attempt got somewhere."""
        self._number = 1
        self.pause = self._drawn()

    def step(self) -> float:
        """Return the seconds to pause now, and make the next pause a longer one."""
        now = self.pause
        self._number += 1
        self.pause = self._drawn()
        return now

    async def wait(self, until: asyncio.Event | None = None) -> None:
        """Pause, and make the next pause a longer one. The pause ends early when `until` is set."""
        seconds = self.step()
        if until is None:
            await asyncio.sleep(seconds)
            return
        try:
            async with asyncio.timeout(seconds):
                await until.wait()
        except TimeoutError:
            pass

    def _drawn(self) -> float:
        return nth_pause(
            self._number, self._first, self._longest, factor=self._factor, jitter=self._jitter, random=self._random
        )


async def becomes_true(ask: Callable[[], Awaitable[bool]], timeout: float, backoff: Backoff) -> bool:
    """Ask again and again, with pauses, and return True once the answer is; False when `timeout` seconds would pass
    before the next answer. It asks at least once, and raises what `ask` raises."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    while not await ask():
        if loop.time() + backoff.pause > deadline:
            return False
        await backoff.wait()
    return True
