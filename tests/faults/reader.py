"""Asks a PostgreSQL server, from a thread: conditions are looked at in the middle of a loop. It writes nothing."""

from __future__ import annotations

import asyncio
import itertools
import re
from threading import Thread
from typing import Any, Final

import asyncpg

__all__ = ["reader"]

PATIENCE: Final = 2.0
"""Seconds to connect, and to answer."""
AWAY: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.UndefinedTableError,
)
"""Errors of a server that is down, is starting, or has no tables yet."""


class _Reader:
    """Reads databases, with one connection for each."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: dict[str, Any] = {}

    def ask(self, url: str, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows; none while the server does not answer or has no such table."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            Thread(target=self._loop.run_forever, name="reader", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(self._ask(url, sql, values), self._loop).result()

    async def _ask(self, url: str, sql: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        number = itertools.count(1)
        numbered = re.sub(r"\?", lambda _: f"${next(number)}", sql)
        try:
            if url not in self._connections:
                place = url.replace("postgresql+asyncpg://", "postgresql://")
                self._connections[url] = await asyncpg.connect(place, timeout=PATIENCE)
            rows = await self._connections[url].fetch(numbered, *values, timeout=PATIENCE)
        except AWAY:
            if (connection := self._connections.pop(url, None)) is not None:
                connection.terminate()
            return []
        return [tuple(row) for row in rows]


reader: Final = _Reader()
