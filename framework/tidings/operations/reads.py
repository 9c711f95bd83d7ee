"""Reads a service's rows for a command: each time as they are now, or several times as they were at one moment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.engine import Database

__all__ = ["Reads"]


class Reads:
    """The base of operations on rows, with which several of them can see the same moment."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._moment: AsyncConnection | None = None

    @asynccontextmanager
    async def at_one_moment(self) -> AsyncIterator[None]:
        """Let every read within the block see the rows as the first one did. Do not write within it.

        Raises `DatabaseUnavailable`.
        """
        async with self._database.reading() as self._moment:
            try:
                yield
            finally:
                self._moment = None

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        if self._moment is not None:
            yield self._moment
            return
        async with self._database.reading() as connection:
            yield connection
