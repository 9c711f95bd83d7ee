"""One handler with a session inside the transaction that its group shares: its effects kept, or undone in a savepoint.

It never ends the transaction: a handler that did, or that made it unusable, breaks the group.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

from tidings.database.outages import is_outage, is_unusable
from tidings.database.transaction import drop, flush_failed, guarded, is_kept, keep
from tidings.delivery.failure import Failure
from tidings.delivery.given import Given
from tidings.errors import StatementFailed, TransactionMisuse
from tidings.modelling.handlers import Handler

__all__ = ["ConnectionLost", "FlushFailed", "GroupBroken", "in_group", "in_savepoint", "roll_back"]

Run = Callable[[], Awaitable[Failure | None]]
"""Waits until the attempt is over. It ends the attempt's context, and with it what the handler was given."""


class ConnectionLost(Exception):
    """It went while the handler was at work: nothing is known of the group's effects but that they are undone.
    `failure` is what the handler raised, if it did."""

    def __init__(self, failure: Failure | None) -> None:
        self.failure = failure


class FlushFailed(Exception):
    """A failed flush has rolled back the transaction of the group, as it would have done to a savepoint."""


class GroupBroken(Exception):
    """The transaction of the group cannot go on; `failure` is what the handler raised, if it did."""

    def __init__(self, failure: Failure | None) -> None:
        self.failure = failure


async def in_savepoint(connection: AsyncConnection, given: Given, handler: Handler, run: Run) -> Failure | None:
    """Run one handler; its effects are kept when it succeeds, undone when it fails. Raises `GroupBroken`, and
    `ConnectionLost`, whatever the handler made of the error that told it so."""
    failure: Failure | None = None
    try:
        scope = _Scope(connection, given, await connection.begin_nested())
        with guarded(connection):
            failure = await run()
            if failure is None:
                failure = await scope.flush(handler)
        if connection.invalidated:
            raise ConnectionLost(failure)
        if failure is None:
            failure = await _kept(scope, handler)
        if failure is not None:
            await scope.undo()
    except (DBAPIError, InvalidRequestError, TransactionMisuse) as error:
        if connection.invalidated:
            raise ConnectionLost(failure) from error
        if is_outage(error, connection.dialect):
            raise
        # Without its savepoint its effects cannot be told from the group's: the whole group is undone.
        await roll_back(connection)
        raise GroupBroken(failure) from error
    return failure


async def in_group(connection: AsyncConnection, given: Given, handler: Handler, run: Run) -> Failure | None:
    """Run one handler without a savepoint: when it fails, whatever its group did must be undone. Raises
    `ConnectionLost`, `FlushFailed`, and `TransactionMisuse` where it ended the transaction."""
    scope, failure = _Scope(connection, given, None), None
    try:
        with guarded(connection):
            failure = await run()
            if failure is None:
                failure = await scope.flush(handler)
    except Exception as error:
        if _is_lost(connection):
            raise ConnectionLost(failure) from error
        raise
    if _is_lost(connection):  # no statement follows that would say so, as the release of a savepoint would
        raise ConnectionLost(failure)
    if flush_failed(connection):
        raise FlushFailed
    if failure is None:
        scope.check_whole()
    if not is_in_transaction(connection):  # it went behind SQLAlchemy's back
        raise TransactionMisuse("commit or rollback")
    return failure


def is_in_transaction(connection: AsyncConnection) -> bool:
    """What the driver says, without asking the server; True for drivers that do not know."""
    known = getattr(_driver(connection), "is_in_transaction", None)  # asyncpg's
    return known is None or bool(known())


def _is_lost(connection: AsyncConnection) -> bool:
    """The connection is gone, as far as the driver knows without asking the server."""
    if connection.invalidated:
        return True
    known = getattr(_driver(connection), "is_closed", None)  # asyncpg's
    return known is not None and bool(known())


def _driver(connection: AsyncConnection) -> object:
    sync = connection.sync_connection
    assert sync is not None
    return sync.connection.driver_connection


async def _kept(scope: _Scope, handler: Handler) -> Failure | None:
    try:
        await scope.keep()
    except StatementFailed as error:
        return Failure.of(error, handler)
    return None


class _Scope:
    """One handler's part of the group's transaction."""

    def __init__(self, connection: AsyncConnection, given: Given, savepoint: AsyncTransaction | None) -> None:
        self._connection = connection
        self._given = given
        self._savepoint = savepoint
        self._whole = connection.get_transaction()
        given.open(connection)

    async def flush(self, handler: Handler) -> Failure | None:
        """Write what the handler left pending; what that raises is the handler's failure."""
        objects = self._given.objects
        try:
            if objects is not None and not is_kept(objects):
                await self._connection.run_sync(keep, objects)
        except Exception as error:
            if is_outage(error, self._connection.dialect):
                raise
            return Failure.of(error, handler)
        return None

    async def keep(self) -> None:
        self.check_whole()
        assert self._savepoint is not None
        if not self._savepoint.is_active:
            raise TransactionMisuse("rollback")
        try:
            await self._savepoint.commit()
        except DBAPIError as error:
            if not is_unusable(error):
                raise
            await self._savepoint.rollback()  # tells SQLAlchemy alone: to it, the savepoint has gone already
            raise StatementFailed from error

    async def undo(self) -> None:
        self.check_whole()
        assert self._savepoint is not None
        objects = self._given.objects
        if objects is not None:
            await self._connection.run_sync(drop, objects)
        if self._savepoint.is_active:
            await self._savepoint.rollback()
        else:
            # A failed flush has rolled back to it already; what the handler did afterwards goes too.
            await self._connection.run_sync(_rollback_to, self._savepoint.sync_transaction)

    def check_whole(self) -> None:
        """Raises `TransactionMisuse` when the handler ended the group's transaction."""
        if self._whole is None or not self._whole.is_active or self._connection.get_transaction() is not self._whole:
            raise TransactionMisuse("commit or rollback")


def _rollback_to(connection: Connection, savepoint: Any) -> None:
    connection.dialect.do_rollback_to_savepoint(connection, savepoint._savepoint)


async def roll_back(connection: AsyncConnection) -> None:
    """Undo the group's transaction. SQLAlchemy may believe that it is over, and would hand the connection back as it
    is."""
    with suppress(InvalidRequestError):
        await connection.run_sync(_roll_back)


def _roll_back(connection: Connection) -> None:
    connection.dialect.do_rollback(connection.connection)
