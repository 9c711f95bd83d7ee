"""The session and connection that a handler is given: everything of SQLAlchemy's, except ending the transaction.

They may be there before the transaction is: their first statement waits for it (`Opening`). Both end with the handler's
attempt: from then on every use of them raises `AttemptEnded`. What they are is said by their class, which changes, so
that nothing is checked, and nothing costs time, while the handler is at work.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NoReturn

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, AsyncTransaction
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from tidings.errors import TransactionMisuse
from tidings.modelling.context import ATTEMPT, Context

__all__ = [
    "GuardedConnection",
    "GuardedSession",
    "Opening",
    "TransactionGoesOn",
    "drop",
    "flush_failed",
    "guarded",
    "is_kept",
    "keep",
    "watch",
]

Opening = Callable[[], Awaitable[AsyncConnection]]
"""Waits for the transaction of the handler's group, and returns its connection; the same one each time."""

_GUARDED: Final = "tidings_guarded"
_FLUSHING: Final = "tidings_flushing"
_FLUSH_FAILED: Final = "tidings_flush_failed"
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
    """The connection of one handler, inside its group's transaction."""

    def __init__(self, engine: AsyncEngine, context: Context, connection: AsyncConnection | None = None) -> None:
        super().__init__(engine, None if connection is None else connection.sync_connection)
        self._context = context
        context.ends_with(self._end)

    @classmethod
    def unopened(cls, engine: AsyncEngine, context: Context, opening: Opening) -> GuardedConnection:
        """Return one whose first statement waits for the transaction."""
        made = _UnopenedConnection(engine, context)
        made.opening = opening
        return made

    def _end(self) -> None:
        self.__class__ = _EndedConnection


class _UnopenedConnection(GuardedConnection):
    """Whatever needs the database opens it. It is an ordinary `GuardedConnection` from then on."""

    opening: Opening

    async def open(self) -> GuardedConnection:
        """Wait for the transaction."""
        connection = await self.opening()
        if self.__class__ is _UnopenedConnection:  # else another task of the handler was first
            self.sync_connection = self._assign_proxied(connection.sync_connection)
            self.__class__ = GuardedConnection  # type: ignore[assignment]
        return self

    async def start(self, is_ctxmanager: bool = False) -> AsyncConnection:
        return await self.open()

    async def execute(self, *arguments: Any, **options: Any) -> Any:
        return await (await self.open()).execute(*arguments, **options)

    async def exec_driver_sql(self, *arguments: Any, **options: Any) -> Any:
        return await (await self.open()).exec_driver_sql(*arguments, **options)

    async def run_sync(self, *arguments: Any, **options: Any) -> Any:
        return await (await self.open()).run_sync(*arguments, **options)

    async def execution_options(self, **options: Any) -> Any:
        return await (await self.open()).execution_options(**options)

    async def get_isolation_level(self) -> Any:
        return await (await self.open()).get_isolation_level()

    async def get_raw_connection(self) -> Any:
        return await (await self.open()).get_raw_connection()

    def stream(self, *arguments: Any, **options: Any) -> Any:
        return _UnopenedStream(self, "stream", arguments, options)

    def stream_scalars(self, *arguments: Any, **options: Any) -> Any:
        return _UnopenedStream(self, "stream_scalars", arguments, options)

    def begin_nested(self) -> AsyncTransaction:
        return _UnopenedSavepoint(self, nested=True)

    def in_transaction(self) -> bool:
        return True

    def in_nested_transaction(self) -> bool:
        return False

    @property
    def closed(self) -> bool:
        return False

    @property
    def invalidated(self) -> bool:
        return False

    @property  # type: ignore[misc]
    def dialect(self) -> Any:
        return self.engine.dialect


class _UnopenedSavepoint(AsyncTransaction):
    async def start(self, is_ctxmanager: bool = False) -> AsyncTransaction:
        if isinstance(self.connection, _UnopenedConnection):
            await self.connection.open()
        return await super().start(is_ctxmanager)


class _UnopenedStream:
    """What `stream` returns: to be awaited, or entered."""

    def __init__(
        self, connection: _UnopenedConnection, name: str, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._connection = connection
        self._call = name, arguments, options
        self._entered: Any = None

    async def _open(self) -> Any:
        connection: Any = await self._connection.open()
        name, arguments, options = self._call
        return getattr(connection, name)(*arguments, **options)

    def __await__(self) -> Generator[Any, Any, Any]:
        async def start() -> Any:
            return await (await self._open())

        return start().__await__()

    async def __aenter__(self) -> Any:
        self._entered = await self._open()
        return await self._entered.__aenter__()

    async def __aexit__(self, *raised: Any) -> Any:
        return await self._entered.__aexit__(*raised)


class _EndedConnection(GuardedConnection):
    def __getattribute__(self, name: str) -> Any:
        return _of_the_dead(self, name, "the injected connection")


class _HandlerSession(Session):
    """The synchronous session behind a handler's session; `run_sync` passes it on."""

    context: Context
    opening: Opening
    whole: Engine
    """What it says it is bound to before there is a connection, to who only asks for the dialect."""
    group: Connection | None = None
    """The group's connection, once the transaction is there."""

    def get_bind(self, *arguments: Any, **options: Any) -> Engine | Connection:
        if self.group is None:
            if not in_greenlet():
                return self.whole
            self.group = await_only(self.opening()).sync_connection
            assert self.group is not None
        return self.group

    def in_transaction(self) -> bool:
        return self.group is not None or super().in_transaction()

    def rollback(self) -> None:
        if self.group is not None and self.get_transaction() is None:
            raise TransactionMisuse("rollback")  # what it has passed on is part of the group's
        super().rollback()

    def leaves_alone(self, statement: Any) -> bool:
        """Return whether it would only pass a statement on to the connection: the statement names no mapped class,
        nothing waits to be flushed before it, nobody listens, and no transaction of the session's own has begun."""
        return (
            not getattr(statement, "_propagate_attrs", True)
            and self.get_transaction() is None
            and self._is_clean()
            and not (self.dispatch.do_orm_execute or self.dispatch.after_begin)
        )

    def flush(self, objects: Any = None) -> None:
        """As usual. One that fails rolls back to the handler's savepoint; without one, the group's transaction, which
        is then undone and run again."""
        if self._is_clean():
            return
        bind = self.get_bind()
        info: dict[str, Any] = bind.info if isinstance(bind, Connection) else {}
        info[_FLUSHING] = True
        try:
            super().flush(objects)
        finally:
            info.pop(_FLUSHING, None)


class _EndedHandlerSession(_HandlerSession):
    def __getattribute__(self, name: str) -> Any:
        return _of_the_dead(self, name, "the injected session", "context")


class GuardedSession(_Guarded, AsyncSession):
    """The session of one handler. A failed flush rolls back to the handler's savepoint, no further."""

    sync_session_class = _HandlerSession

    def __init__(
        self, engine: AsyncEngine, context: Context, opening: Opening, connection: AsyncConnection | None = None
    ) -> None:
        """With `connection`, the transaction is there; else the first statement waits for it."""
        super().__init__(join_transaction_mode="rollback_only", expire_on_commit=False)
        self.bind = connection or engine
        self._context = context
        self._opening = opening
        sync: Any = self.sync_session
        sync.context, sync.opening, sync.whole = context, opening, engine.sync_engine
        if connection is not None:
            sync.group = connection.sync_connection
        context.ends_with(self._end)

    def _end(self) -> None:
        self.__class__ = _EndedSession

    async def execute(self, statement: Any, params: Any = None, **options: Any) -> Any:
        """As usual; but a statement that the session would only pass on takes the direct way, which takes half the
        time."""
        sync: Any = self.sync_session
        if options or not sync.leaves_alone(statement):
            return await super().execute(statement, params, **options)
        connection = await self._opening()
        sync.group = connection.sync_connection
        return await connection.execute(statement, params)

    async def reset(self) -> NoReturn:
        raise TransactionMisuse("reset")

    async def connection(
        self, bind_arguments: Any = None, execution_options: Any = None, **options: Any
    ) -> AsyncConnection:
        # Not by way of `super`: it would find any proxy of the group's connection, also one of an ended attempt.
        def begun(session: Session) -> None:
            session.connection(bind_arguments=bind_arguments, execution_options=execution_options, **options)

        await self.run_sync(begun)
        connection = await self._opening()
        return GuardedConnection(connection.engine, self._context, connection)


class _EndedSession(GuardedSession):
    def __getattribute__(self, name: str) -> Any:
        return _of_the_dead(self, name, "the injected session")


def _of_the_dead(dead: Any, name: str, used: str, context: str = "_context") -> Any:
    """Return attributes that Python itself needs, `__class__` for one; raise `AttemptEnded` for any other."""
    if not name.startswith("__"):
        object.__getattribute__(dead, context).check_alive(used)
    return object.__getattribute__(dead, name)


def is_kept(session: Session) -> bool:
    """Return whether nothing is pending, so that `keep` would do nothing; then the session is closed."""
    plain = session.is_active and not session.in_nested_transaction() and not session.dispatch.before_commit
    if not plain or session.new or session.deleted or session.dirty:
        return False
    session.close()
    _bury(session)
    return True


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
    # It knows the session: left to each other, they would wait for the garbage collector.
    session.__dict__.pop("opening", None)
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
        info.pop(_GUARDED, None)  # that of a lost connection is empty


def flush_failed(connection: AsyncConnection) -> bool:
    """Return whether a failed flush has rolled back the whole transaction since this was asked last."""
    info = connection.sync_connection.info if connection.sync_connection is not None else {}
    return bool(info.pop(_FLUSH_FAILED, False))


def watch(engine: Engine) -> None:
    """Have what would end a guarded transaction of this engine refused."""
    sa.event.listen(engine, "before_cursor_execute", _refuse_statement)
    sa.event.listen(engine, "commit", partial(_refuse, "commit"))
    sa.event.listen(engine, "rollback", partial(_refuse, "rollback"))


def _refuse(operation: str, connection: sa.Connection) -> None:
    # One that was lost has no info, and ending it is for the best.
    if connection.invalidated or _GUARDED not in connection.info:
        return
    if _FLUSHING not in connection.info:
        raise TransactionMisuse(operation)
    connection.info[_FLUSH_FAILED] = True


def _refuse_statement(
    connection: sa.Connection, cursor: object, statement: str, parameters: object, context: object, many: bool
) -> None:
    if (attempt := ATTEMPT.get()) is not None:
        attempt.check_statement(connection)
    found = _ENDS_TRANSACTION.match(statement)
    if found is not None and _GUARDED in connection.info:
        raise TransactionMisuse(found[1].lower())
