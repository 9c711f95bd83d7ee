"""Work beside a block of code: when one of them fails, the other ends, and the error is raised without its group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["beside", "first_error", "tasks"]


@asynccontextmanager
async def tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """`asyncio.TaskGroup`, but the first real error leaves it by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors.__cause__


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `work` while the block runs, and cancel it when the block ends."""
    async with tasks() as group:
        task = group.create_task(work)
        try:
            yield
        finally:
            task.cancel()


def first_error(error: BaseException) -> BaseException:
    """Return the first error of a group that is not a cancellation, however deep; any other error as it is."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    _, real = error.split(asyncio.CancelledError)
    return first_error((real or error).exceptions[0])
