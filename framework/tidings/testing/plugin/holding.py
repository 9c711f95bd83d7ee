"""Async context managers for fixtures that are not async: entered in a thread with an event loop of its own."""

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
def held(manager: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Enter an async context manager for the block. Its loop goes on in a thread, so that a server in it answers.

    So a fixture needs no plugin for async fixtures, and works in tests of any kind.
    """
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

    thread = threading.Thread(target=run, name="tidings-fixture", daemon=True)
    thread.start()
    value, loop, leave = entered.result()
    try:
        yield value
    finally:
        loop.call_soon_threadsafe(leave.set)
        thread.join()
        ended.result()
