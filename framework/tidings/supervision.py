"""A background task with the lifetime of a block: its failure ends the block, leaving the block ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

__all__ = ["leading", "supervised"]


@asynccontextmanager
async def supervised(work: Coroutine[Any, Any, None], *, stop: asyncio.Event | None = None) -> AsyncIterator[None]:
    """Run `work` beside the block. On leaving, `stop` is set and the work awaited; without `stop` it is cancelled.

    When the work fails, the block is cancelled and the work's own error raised, out of any exception group.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(work)
            try:
                yield
            finally:
                if stop is None:
                    task.cancel()
                else:
                    stop.set()
    except BaseExceptionGroup as group:
        raise leading(group) from group.__cause__


def leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def leading(error: BaseException) -> BaseException:
    """The first real error in a group: what the others follow from."""
    found = list(leaves(error))
    return next((leaf for leaf in found if not isinstance(leaf, asyncio.CancelledError)), found[0])
