"""A world on real servers: real time, a real broker and, if asked for, the log in EventStoreDB's protocol."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, NoReturn

from tidings.adapters import open_bus, open_store
from tidings.buses import EventBus
from tidings.errors import BusUnavailable, StoreUnavailable
from tidings.stores import EventStore
from tidings.testing.world import place
from tidings.testing.world.threads import Threads
from tidings.urls import redact

if TYPE_CHECKING:
    from tidings.testing.world.store import InlineStore

__all__ = ["RealClock", "only_in_memory", "open_servers"]

LOOK: Final = 0.05
"""Seconds between two looks at whether a world is settled."""


def only_in_memory(what: str) -> NoReturn:
    """Skip a test for what real servers cannot do."""
    import pytest

    pytest.skip(f"{what} needs a World in memory and virtual time; this one is on real servers ({place.WHERE.name})")


class RealClock:
    """Real time, asked in the words of `Clock`."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._loop: Any = None
        self.limit: float | None = None
        self.horizon: Callable[[float], float] = lambda moment: moment

    def start(self) -> None:
        """Real time runs already. Calls that the loop runs in threads are run in those of the world."""
        loop: Any = asyncio.get_running_loop()
        self._loop, loop.run_in_executor = loop, self._run_in_executor

    def _run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        runs = self._threads.instead_of(executor)
        work: asyncio.Future[Any] = type(self._loop).run_in_executor(self._loop, runs, function, *args)
        return work

    def stop(self) -> None:
        """It goes on."""
        loop, self._loop = self._loop, None
        if loop is not None:
            del loop.run_in_executor

    def disown(self, owner: object) -> None:
        """Nothing waits for threads in real time."""

    def time(self) -> float:
        """Return seconds, as `time.monotonic`."""
        return time.monotonic()

    def wall(self) -> float:
        """Return seconds since 1970."""
        return time.time()

    async def quiet(self) -> None:
        """Give others a turn."""
        await asyncio.sleep(0)

    async def step(self) -> None:
        """Wait a little."""
        await asyncio.sleep(LOOK)

    def at(self, moment: float) -> asyncio.TimerHandle:
        """Skip: nobody can let real time stop."""
        only_in_memory("advance()")

    def freeze(self, owner: object) -> None:
        """Skip: it would stop the test, too."""
        only_in_memory("pause()")

    def thaw(self, owner: object) -> None:
        """Nothing is frozen."""

    def is_frozen(self, owner: object) -> bool:
        """Return False."""
        return False


async def open_servers(stack: AsyncExitStack, inline: Callable[[], InlineStore]) -> tuple[EventStore, EventBus]:
    """Open a bus without queues, and an empty log."""
    try:
        url = await stack.enter_async_context(place.WHERE.rabbitmq().isolated())
    except Exception as error:
        named = redact(os.environ.get("TIDINGS_TEST_AMQP", "the one that was started"))
        raise BusUnavailable(
            f"no World on RabbitMQ: {named} does not let tests in: {type(error).__name__}: {error}. Start it, name "
            "another in TIDINGS_TEST_AMQP, or run the test in memory, without --tidings"
        ) from error
    bus = await stack.enter_async_context(open_bus(url))
    if place.WHERE.name == place.RABBITMQ:
        store: EventStore = inline()
        stack.push_async_callback(store.close)
        return store, bus
    named = redact(os.environ.get("TIDINGS_TEST_ESDB", "the one that was started"))
    try:
        if place.WHERE.unavailable is not None:
            raise place.WHERE.unavailable
        log = await stack.enter_async_context(place.WHERE.eventstoredb().isolated())
        return await stack.enter_async_context(open_store(log)), bus
    except Exception as error:
        if "TIDINGS_TEST_ESDB" in os.environ:  # one for all tests
            place.WHERE.unavailable = error
        raise StoreUnavailable(
            f"no World with its log in EventStoreDB's protocol: {named} does not let tests in: {type(error).__name__}: "
            f"{error}. Start it, name another in TIDINGS_TEST_ESDB, or run the test with --tidings=rabbitmq"
        ) from error
