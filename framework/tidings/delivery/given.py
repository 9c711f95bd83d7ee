"""What one attempt is given of the database: a session, a connection, and the way to both through its context.

They may be there before the transaction is. It begins and ends none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from tidings.database.transaction import GuardedConnection, GuardedSession
from tidings.modelling.context import Context
from tidings.modelling.handlers import Inject

__all__ = ["Given"]


class Given:
    """One attempt's session and connections. All lead to the same transaction."""

    def __init__(
        self, context: Context, engine: AsyncEngine, wait: Callable[[], Awaitable[AsyncConnection]] | None = None
    ) -> None:
        """`wait` waits until `open` has been called; without it, that is before anything is provided."""
        self.context = context
        self._engine = engine
        self._wait = wait
        self._connection: AsyncConnection | None = None
        self._session: GuardedSession | None = None
        self.objects: Session | None = None
        """Behind the session, which is closed to everybody from the end of the attempt on."""
        context.opens(self.enter)
        context.ends_with(self._end)

    def _end(self) -> None:
        # Who waits and the session both know this: left to each other, they would wait for the garbage collector.
        self._wait = self._session = None

    def open(self, connection: AsyncConnection) -> None:
        """The transaction is there: what waits for it goes on."""
        self._connection = connection
        self.context.works_on(connection.sync_connection)

    def provide(self, wanted: Inject) -> Any:
        """Return what a parameter asks for, whether the transaction is there or not."""
        connection = self._connection
        if wanted is Inject.CONNECTION:
            if connection is None:
                return GuardedConnection.unopened(self._engine, self.context, self._open)
            return GuardedConnection(self._engine, self.context, connection)
        if self._session is None:
            self.context.check_alive("its session or connection")
            self._session = GuardedSession(self._engine, self.context, self._open, connection)
            self.objects = self._session.sync_session
        return self._session

    async def _open(self) -> AsyncConnection:
        if self._connection is None:
            self.context.check_alive("its session or connection")
            assert self._wait is not None
            self._connection = await self._wait()
        return self._connection

    @asynccontextmanager
    async def enter(self, _: Context) -> AsyncIterator[AsyncSession]:
        """Wait for the transaction of the attempt that this was given to, and flush at the end of the block."""
        await self._open()
        session: GuardedSession = self.provide(Inject.SESSION)
        yield session
        await session.flush()
