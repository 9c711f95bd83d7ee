"""The session and connection that a handler is given: everything of SQLAlchemy's, except ending the transaction.

Both end with the handler's attempt: from then on every use of them raises `AttemptEnded`. They are made to raise by
changing their class, so that nothing is checked, and nothing costs time, while the handler is at work.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NoReturn

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from tidings.errors import TransactionMisuse
from tidings.modelling.context import ATTEMPT, Context

__all__ = ["GuardedConnection", "GuardedSession", "TransactionGoesOn", "drop", "guarded", "keep", "watch"]

_GUARDED: Final = "tidings_guarded"
_ENDS_TRANSACTION: Final = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*"
    r"(BEGIN|START\s+TRANSACTION|COMMIT|END|ABORT|ROLLBACK(?!\s+(?:TRANSACTION\s+|WORK\s+)?TO\b))\b",
    re.IGNORECASE | re.DOTALL,
)


class TransactionGoesOn:
    """Refusals in place of SQLAlchemy's methods that end a transaction: name it before the class that has them."""

    async def commit(self) -> NoReturn:
        raise TransactionMisuse("commit")

    async def rollback(self) -> NoReturn:
        raise TransactionMisuse("rollback")

    def begin(self) -> NoReturn:
        raise TransactionMisuse("begin")


class _Guarded(TransactionGoesOn):
    """Refusals of what would end more than the handler's own part."""

    async def close(self) -> NoReturn:
        raise TransactionMisuse("close")

    async def invalidate(self, exception: BaseException | None = None) -> NoReturn:
        raise TransactionMisuse("invalidate")


class GuardedConnection(_Guarded, AsyncConnection):
    """The connection of one handler, inside its savepoint."""

    def __init__(self, connection: AsyncConnection, context: Context) -> None:
        super().__init__(connection.engine, connection.sync_connection)
        self._context = context
        context.ends_with(self._end)

    def _end(self) -> None:
        self.__class__ = _EndedConnection


class _EndedConnection(GuardedConnection):
    def __getattribute__(self, name: str) -> Any:
        return _of_the_dead(self, name, "the injected connection")


class _HandlerSession(Session):
    """The synchronous session behind a handler's session; `run_sync` passes it on."""

    context: Context


class _EndedHandlerSession(_HandlerSession):
    def __getattribute__(self, name: str) -> Any:
        return _of_the_dead(self, name, "the injected session", "context")


class GuardedSession(_Guarded, AsyncSession):
    """The session of one handler. A failed flush rolls back to the handler's savepoint, no further."""

    sync_session_class = _HandlerSession

    def __init__(self, connection: AsyncConnection, context: Context) -> None:
        super().__init__(connection, join_transaction_mode="rollback_only", expire_on_commit=False)
        self._context = context
        self._group = connection
        self.sync_session.context = context  # type: ignore[attr-defined]
        context.ends_with(self._end)

    def _end(self) -> None:
        self.__class__ = _EndedSession

    async def reset(self) -> NoReturn:
        raise TransactionMisuse("reset")

    async def connection(
        self, bind_arguments: Any = None, execution_options: Any = None, **options: Any
    ) -> AsyncConnection:
        # Not by way of `super`: it would find any proxy of the group's connection, also one of an ended attempt.
        def begun(session: Session) -> None:
            session.connection(bind_arguments=bind_arguments, execution_options=execution_options, **options)

        await self.run_sync(begun)
        return GuardedConnection(self._group, self._context)


class _EndedSession(GuardedSession):
    def __getattribute__(self, name: str) -> Any:
        return _of_the_dead(self, name, "the injected session")


def _of_the_dead(dead: Any, name: str, used: str, context: str = "_context") -> Any:
    """Return attributes that Python itself needs, `__class__` for one; raise `AttemptEnded` for any other."""
    if not name.startswith("__"):
        object.__getattribute__(dead, context).check_alive(used)
    return object.__getattribute__(dead, name)


def keep(connection: Connection, session: Session) -> None:
    """Flush what is pending, after the handler has returned. The transaction around it goes on."""
    if session.in_transaction():
        session.commit()
    session.close()
    _bury(session)


def drop(connection: Connection, session: Session) -> None:
    """Forget what is pending, after the handler has failed. Whoever made the savepoint around it rolls that back."""
    if not isinstance(session, _EndedHandlerSession):
        session.close()
        _bury(session)


def _bury(session: Session) -> None:
    session.__class__ = _EndedHandlerSession


@contextmanager
def guarded(connection: AsyncConnection) -> Iterator[None]:
    """Refuse, within the block, whatever would end the transaction: it raises `TransactionMisuse` before it reaches the
    database."""
    info = connection.sync_connection.info if connection.sync_connection is not None else {}
    info[_GUARDED] = True
    try:
        yield
    finally:
        del info[_GUARDED]


def watch(engine: Engine) -> None:
    """Have what would end a guarded transaction of this engine refused."""
    sa.event.listen(engine, "before_cursor_execute", _refuse_statement)
    sa.event.listen(engine, "commit", partial(_refuse, "commit"))
    sa.event.listen(engine, "rollback", partial(_refuse, "rollback"))


def _refuse(operation: str, connection: sa.Connection) -> None:
    # One that was lost has no info, and ending it is for the best.
    if not connection.invalidated and _GUARDED in connection.info:
        raise TransactionMisuse(operation)


def _refuse_statement(
    connection: sa.Connection, cursor: object, statement: str, parameters: object, context: object, many: bool
) -> None:
    if (attempt := ATTEMPT.get()) is not None:
        attempt.check_statement(connection)
    found = _ENDS_TRANSACTION.match(statement)
    if found is not None and _GUARDED in connection.info:
        raise TransactionMisuse(found[1].lower())
