"""Async context managers for code that is not async: entered in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

__all__ = ["held"]

T = TypeVar("T")


@contextmanager
def held(manager: AbstractAsyncContextManager[T], name: str) -> Iterator[tuple[T, asyncio.AbstractEventLoop]]:
    """Enter an async context manager for the block, in a thread with this name. Yields what it yields, and its loop,
    which goes on until the end of the block. Raises what entering or leaving raises."""
    entered: Future[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    ended: Future[None] = Future()

    async def hold() -> None:
        leave = asyncio.Event()
        async with manager as value:
            entered.set_result((value, asyncio.get_running_loop(), leave))
            await leave.wait()

    def run() -> None:
        try:
            asyncio.run(hold())
        except BaseException as error:
            (ended if entered.done() else entered).set_exception(error)
        else:
            ended.set_result(None)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    value, loop, leave = entered.result()
    try:
        yield value, loop
    finally:
        loop.call_soon_threadsafe(leave.set)
        thread.join()
        ended.result()
