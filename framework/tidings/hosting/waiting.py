"""Open a store or database when a process starts, and wait for one that is away. It never waits for what only a person
can mend."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final, TypeVar

import structlog

from tidings._support.backoff import Backoff
from tidings._support.telling import Telling
from tidings.errors import DatabaseUnavailable, StoreUnavailable

__all__ = ["open_when_available"]

log = structlog.get_logger("tidings.waiting")

T = TypeVar("T")

PAUSES: Final = (0.2, 5.0)
"""Seconds of the first pause between two attempts, and of the longest; each pause is twice the one before."""


async def open_when_available(
    stack: AsyncExitStack, opening: Callable[[], AbstractAsyncContextManager[T]], what: str
) -> T:
    """Enter `opening()`, again and again until it succeeds; the stack closes it.

    Raises at once every error that waiting does not mend.
    """
    backoff, telling = Backoff(*PAUSES), Telling(log)
    while True:
        try:
            opened = await stack.enter_async_context(opening())
        except (StoreUnavailable, DatabaseUnavailable) as error:
            if not error.waiting_helps:
                raise
            telling.failed("process.waiting", error, waits_for=what, next_attempt_in=backoff.pause)
        else:
            telling.over("process.goes_on", waited_for=what)
            return opened
        await backoff.wait()
