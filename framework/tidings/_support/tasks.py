"""Background tasks with the lifetime of a block: the failure of one ends the block, leaving the block ends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any, TypeVar

__all__ = ["leading", "leaves", "supervised", "task_group", "together"]

T = TypeVar("T")


class _Group(asyncio.TaskGroup):
    """It knows which of its tasks have not ended."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: set[asyncio.Task[Any]] = set()

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        task = super().create_task(coro, name=name, context=context)
        self.under_way.add(task)
        task.add_done_callback(self.under_way.discard)
        return task


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """`asyncio.TaskGroup` for whoever goes on after its errors.

    Cancelled from outside while an error ends it, Python's own forgets the cancellation (before 3.13: see asyncio in
    "What's New In Python 3.13"), so that a loop around it would never end. The count of cancellations tells that;
    the one by which the group itself ends a block is taken back only within the block, so tasks are awaited there.
    """
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        async with _Group() as tasks:
            yield tasks
            while tasks.under_way:
                await asyncio.wait(tasks.under_way)
    except BaseExceptionGroup as group:
        if task.cancelling() > before:
            raise asyncio.CancelledError from group
        raise


@asynccontextmanager
async def together(stop: asyncio.Event) -> AsyncIterator[asyncio.TaskGroup]:
    """Tasks beside the block. On leaving, `stop` is set, and they are awaited: they end side by side.

    When one fails, the others and the block are cancelled, and its own error raised, out of any exception group.
    """
    try:
        async with task_group() as tasks:
            try:
                yield tasks
            finally:
                stop.set()
    except BaseExceptionGroup as group:
        raise leading(group) from group.__cause__


@asynccontextmanager
async def supervised(work: Coroutine[Any, Any, None], *, stop: asyncio.Event | None = None) -> AsyncIterator[None]:
    """Run `work` beside the block. On leaving, `stop` is set and the work awaited; without `stop` it is cancelled.

    When the work fails, the block is cancelled and the work's own error raised, out of any exception group.
    """
    async with together(stop or asyncio.Event()) as tasks:
        task = tasks.create_task(work)
        try:
            yield
        finally:
            if stop is None:
                task.cancel()


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors that an exception group holds, however deep; an error that is no group is its own leaf."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def leading(error: BaseException) -> BaseException:
    """The first real error in a group: what the others follow from."""
    found = list(leaves(error))
    return next((leaf for leaf in found if not isinstance(leaf, asyncio.CancelledError)), found[0])
