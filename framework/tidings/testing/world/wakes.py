"""Who wakes a world up all the time: it counts the timers at which time stops, and warns of too many."""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter
from typing import Any, Final

from tidings.modelling.context import ATTEMPT
from tidings.testing.world.clock import OWNER, Clock
from tidings.testing.world.movement import happens

__all__ = ["Wakes"]

MANY: Final = 5000
"""Timers within one `advance` after which a warning is given."""
SAMPLE: Final = 100
"""Timers before the warning from which it learns who sleeps."""
DAY: Final = 86_400
"""Seconds of a day."""


class Wakes:
    """The timers of one `advance`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began = self._sampled = clock.time()
        self._number = 0
        self._who = Counter[str]()

    def note(self) -> None:
        """Count the next timer. Warn when there have been many."""
        self._number += 1
        if self._number == MANY - SAMPLE:
            self._sampled = self._clock.time()
        if MANY - SAMPLE <= self._number < MANY:
            self._who[_named(self._clock.next(happens))] += 1
        if self._number == MANY:
            (who, times), *_ = self._who.most_common(1)
            now = self._clock.time()
            warnings.warn(
                f"{MANY:,} timers in {(now - self._began) / DAY:.3g} days of World.advance(), and time stops at each: "
                f"{who} sleeps {(now - self._sampled) / times:.3g} s at a time. Let it sleep until something is due, "
                "or make its pause longer in tests",
                stacklevel=3,
            )


def _named(timer: Any) -> str:
    """Name the task that a timer wakes, and whose it is."""
    context = timer._context
    attempt, owner = context.get(ATTEMPT), context.get(OWNER)
    if attempt is not None:
        whose = f"handler {attempt.handler!r} of service {attempt.service!r}"
    else:
        whose = "the test" if owner is None else str(owner)
    timeout = getattr(timer._callback, "__self__", None)
    for task in asyncio.all_tasks():
        waits_for = getattr(task, "_fut_waiter", None)
        if getattr(timeout, "_task", None) is task or any(waits_for is each is not None for each in timer._args):
            return f"task {getattr(task.get_coro(), '__qualname__', '').split('<locals>.')[-1]!r} of {whose}"
    return f"a timer of {whose}"
