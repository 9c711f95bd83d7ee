"""What is away when a process starts is waited for, as it would be later; what only a person can mend is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final, TypeVar

import structlog

from tidings.errors import DatabaseUnavailable, StoreUnavailable

__all__ = ["opened"]

log = structlog.get_logger("tidings.opening")

T = TypeVar("T")

PAUSES: Final = (0.2, 5.0)
"""Seconds after the first failure and, doubling, at most after each further one."""


async def opened(stack: AsyncExitStack, opening: Callable[[], AbstractAsyncContextManager[T]], what: str) -> T:
    """Enter `opening()`, as often as it takes; the stack closes it.

    Raises `StoreUnavailable` and `DatabaseUnavailable` that no waiting mends, and everything else, at once.
    """
    pause, longest = PAUSES
    while True:
        try:
            return await stack.enter_async_context(opening())
        except (StoreUnavailable, DatabaseUnavailable) as error:
            if not error.waiting_helps:
                raise
            log.warning("process.waiting", waits_for=what, error=str(error), next_attempt_in=pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, longest)
