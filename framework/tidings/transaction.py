"""The session that a handler is given: everything of SQLAlchemy's, except ending the transaction."""

from __future__ import annotations

from typing import Any, NoReturn

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session

from tidings.errors import TransactionMisuse

__all__ = ["GuardedConnection", "GuardedSession"]


class GuardedConnection(AsyncConnection):
    """Works inside the savepoint of one handler."""

    def __init__(self, connection: AsyncConnection) -> None:
        super().__init__(connection.engine, connection.sync_connection)

    async def commit(self) -> NoReturn:
        raise TransactionMisuse("commit")

    async def rollback(self) -> NoReturn:
        raise TransactionMisuse("rollback")

    async def close(self) -> NoReturn:
        raise TransactionMisuse("close")

    async def invalidate(self, exception: BaseException | None = None) -> NoReturn:
        raise TransactionMisuse("invalidate")

    def begin(self) -> NoReturn:
        raise TransactionMisuse("begin")


def _keep(session: Session) -> None:
    session.commit()
    session.close()


class GuardedSession(AsyncSession):
    """A session on a connection that is in a savepoint: a failed flush rolls back so far, no further."""

    def __init__(self, connection: AsyncConnection) -> None:
        super().__init__(connection, join_transaction_mode="rollback_only", expire_on_commit=False)

    async def commit(self) -> NoReturn:
        raise TransactionMisuse("commit")

    async def rollback(self) -> NoReturn:
        raise TransactionMisuse("rollback")

    async def close(self) -> NoReturn:
        raise TransactionMisuse("close")

    async def reset(self) -> NoReturn:
        raise TransactionMisuse("reset")

    async def invalidate(self) -> NoReturn:
        raise TransactionMisuse("invalidate")

    def begin(self) -> NoReturn:
        raise TransactionMisuse("begin")

    async def connection(
        self, bind_arguments: Any = None, execution_options: Any = None, **options: Any
    ) -> AsyncConnection:
        connection = await super().connection(bind_arguments, execution_options, **options)
        return GuardedConnection(connection)

    async def keep(self) -> None:
        """The handler returned: flush what is pending. The transaction around it goes on."""
        if self.in_transaction():
            await self.run_sync(_keep)

    async def drop(self) -> None:
        """The handler failed: forget what is pending. The savepoint around it is rolled back by who made it."""
        await AsyncSession.close(self)
