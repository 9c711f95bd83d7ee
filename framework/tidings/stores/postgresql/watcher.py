"""Looks, while somebody subscribes, whether the log goes on: woken by NOTIFY, and from time to time by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from tidings._support.backoff import Backoff
from tidings.errors import StoreUnavailable
from tidings.stores.postgresql.connections import ANSWER_SECONDS, Connection, Server, discard
from tidings.stores.postgresql.log import head
from tidings.stores.postgresql.schema import CHANNEL
from tidings.stores.postgresql.troubles import is_lost, unavailable

__all__ = ["Watcher"]

POLL_SECONDS: Final = 0.5
"""Seconds between looks without a notification."""
AGAIN_SECONDS: Final = 10.0
"""Seconds without the server after which whoever waits is told."""
PAUSE_SECONDS: Final = (0.05, 0.5)


class Watcher:
    """A task with a connection of its own, as long as somebody watches. It reports the head, or why there is none."""

    def __init__(
        self, server: Server, reached: Callable[[int], None], failed: Callable[[StoreUnavailable], None]
    ) -> None:
        self._server = server
        self._reached = reached
        self._failed = failed
        self._watching = 0
        self._task: asyncio.Task[None] | None = None
        self._looked = False
        """Whether it has looked since it last lost a connection."""

    def watch(self, more: int) -> None:
        """A subscription begins (+1) or ends (-1)."""
        self._watching += more
        if not self._watching:
            self._end()

    def ensure(self) -> None:
        """Look again, if it was given up: somebody begins to wait."""
        if self._watching and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(), name="tidings-postgresql-watcher")

    def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def close(self) -> None:
        """End."""
        task = self._task
        self._watching = 0
        self._end()
        if task is not None:
            await asyncio.wait([task])

    async def _run(self) -> None:
        """Watch; through the loss of connections for `AGAIN_SECONDS`."""
        loop = asyncio.get_running_loop()
        deadline, backoff = loop.time() + AGAIN_SECONDS, Backoff(*PAUSE_SECONDS, jitter=0.5)
        while True:
            try:
                connection = await self._server.connect()
                try:
                    await self._listen(connection)
                finally:
                    discard(connection)
            except Exception as error:
                if self._looked:
                    self._looked = False
                    deadline = loop.time() + AGAIN_SECONDS
                    backoff.reset()
                passing = error.waiting_helps if isinstance(error, StoreUnavailable) else is_lost(error)
                if not passing or loop.time() + backoff.pause > deadline:
                    self._give_up(error)
                    return
                await backoff.wait()

    async def _listen(self, connection: Connection) -> None:
        notified = asyncio.Event()
        connection.add_termination_listener(lambda _: notified.set())
        async with asyncio.timeout(ANSWER_SECONDS):
            await connection.add_listener(CHANNEL, lambda *_: notified.set())
        while True:
            notified.clear()
            async with asyncio.timeout(ANSWER_SECONDS):
                self._reached(await head(connection))
            self._looked = True
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await notified.wait()

    def _give_up(self, error: Exception) -> None:
        self._task = None
        self._failed(unavailable(self._server.shown, error))
