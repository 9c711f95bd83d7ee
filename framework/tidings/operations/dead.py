"""Dead letters, for operators: look at them, have them run again, or give them up for good.

It only moves rows. What is retried becomes a held event that is due now: the service runs it, at once or when it is
started again, in the order of its partition key and in the transaction that forgets the row, so exactly once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.contention import again_when_contended
from tidings.database.engine import Database
from tidings.database.event_rows import key_of, recorded
from tidings.database.tables import dead, held, staged
from tidings.errors import TidingsError
from tidings.operations.fencing import fence
from tidings.operations.selection import EVERYTHING, Selection

__all__ = ["DeadLetter", "DeadLetterNotFound", "DeadLetters", "NotRetriable", "held_again"]

_KEPT: Final = ("version", "ticks", "event_id", "stream", "type", "data", "metadata", "is_json", "replayed", "line")


class DeadLetterNotFound(TidingsError):
    """No dead letter of this service has the id."""

    def __init__(self, service: str, ids: Sequence[int]) -> None:
        self.ids = tuple(ids)
        super().__init__(
            f"service {service!r} has no dead letter {', '.join(map(str, ids))}: it was retried or dropped, or it "
            "belongs to another service; list them again. Nothing was changed."
        )


class NotRetriable(TidingsError):
    """A message that could not be read is no event: there is nothing to run."""

    def __init__(self, service: str, id: int, reason: str) -> None:
        super().__init__(
            f"dead letter {id} of service {service!r} is a message that is no event ({reason}): find out who published "
            "it, then drop it. Nothing was changed."
        )


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row of `tidings_dead`; what a message without an event does not have is None."""

    id: int
    kind: str
    """`handler`: an event that was given up; `message`: what could not be read; `staged`: an event that a handler
    emitted and the store refuses."""
    position: int | None
    stream: str | None
    version: int | None
    type: str | None
    event_id: str | None
    key: str | None
    holds_key: bool
    """Later events of the same partition key wait until this letter is retried or dropped."""
    handler: str | None
    attempts: int
    reason: str
    detail: str | None
    data: bytes | None
    metadata: bytes | None
    died_at: datetime


_COLUMNS: Final = [dead.c[name] for name in DeadLetter.__slots__]


class DeadLetters:
    """The dead letters of one service and one log. Every method raises `DatabaseUnavailable`."""

    def __init__(self, database: Database, service: str, log: UUID) -> None:
        self._database = database
        self._service = service
        self._log = log
        self._own = {"service": service, "log": str(log)}
        self._mine = (dead.c.service == service, dead.c.log == str(log))

    async def list(self, selection: Selection = EVERYTHING, *, limit: int = 100) -> list[DeadLetter]:
        """The oldest first."""
        query = sa.select(*_COLUMNS).where(*self._mine, *selection.where(dead)).order_by(dead.c.id).limit(limit)
        async with self._database.reading() as connection:
            return [DeadLetter(*row) for row in await connection.execute(query)]

    async def ids(self, selection: Selection = EVERYTHING, *, limit: int | None = None) -> Sequence[tuple[int, str]]:
        """Id and kind of each, the oldest first."""
        query = sa.select(dead.c.id, dead.c.kind).where(*self._mine, *selection.where(dead)).order_by(dead.c.id)
        async with self._database.reading() as connection:
            return [(row.id, row.kind) for row in await connection.execute(query.limit(limit))]

    async def count(self, selection: Selection = EVERYTHING) -> int:
        async with self._database.reading() as connection:
            query = sa.select(sa.func.count()).select_from(dead).where(*self._mine, *selection.where(dead))
            return (await connection.scalar(query)) or 0

    async def get(self, id: int) -> DeadLetter:
        """Raises `DeadLetterNotFound`."""
        async with self._database.reading() as connection:
            row = (await connection.execute(sa.select(*_COLUMNS).where(*self._mine, dead.c.id == id))).one_or_none()
        if row is None:
            raise DeadLetterNotFound(self._service, [id])
        return DeadLetter(*row)

    @again_when_contended
    async def retry(self, ids: Sequence[int]) -> int:
        """Have them run again, with their attempts counted anew; all of them or none.

        An emitted event that the store refused is appended at the next start of the service. Raises
        `DeadLetterNotFound`, `NotRetriable`.
        """
        async with self._database.transaction() as connection:
            taken = await self._take(connection, ids)
            for row in taken:
                if row.kind == "message":
                    raise NotRetriable(self._service, row.id, row.reason)
                if row.kind == "staged":
                    await connection.execute(staged.insert().values(self._staged(row)))
                    continue
                await connection.execute(held.insert().values(self._own | held_again(row, "retried")))
            # A process that goes on would not know that these rows block their keys now.
            freed = {row.bucket for row in taken if row.kind == "handler" and not row.holds_key}
            await fence(connection, self._service, self._log, freed)
        return len(taken)

    @again_when_contended
    async def drop(self, ids: Sequence[int]) -> int:
        """Forget them for good, all of them or none; what waited for their partition keys goes on. Raises
        `DeadLetterNotFound`."""
        async with self._database.transaction() as connection:
            return len(await self._take(connection, ids))

    async def _take(self, connection: AsyncConnection, ids: Sequence[int]) -> Sequence[sa.Row[Any]]:
        wanted = set(ids)
        taken = []
        for number in sorted(wanted):
            row = (await connection.execute(sa.select(dead).where(*self._mine, dead.c.id == number))).one_or_none()
            if row is not None and (await connection.execute(sa.delete(dead).where(dead.c.id == number))).rowcount == 1:
                taken.append(row)
        missing = sorted(wanted - {row.id for row in taken})
        if missing:
            raise DeadLetterNotFound(self._service, missing)
        return taken

    def _staged(self, row: sa.Row[Any]) -> dict[str, Any]:
        names = ("bucket", "event_id", "stream", "type", "data", "metadata", "is_json")
        return self._own | {"cause": row.position} | {name: getattr(row, name) for name in names}


def held_again(row: sa.Row[Any], reason: str) -> dict[str, Any]:
    """A dead letter of kind `handler` as a row of the held events that is due now, its attempts counted anew."""
    kept = {name: getattr(row, name) for name in _KEPT}
    where = {"position": row.position, "bucket": row.bucket, "key": _key_of(row), "handler": row.handler}
    return kept | where | {"attempts": 0, "tries": 0, "due": time.time(), "reason": reason, "detail": None}


def _key_of(row: sa.Row[Any]) -> str:
    """The partition key; letters of the first schema are without."""
    return str(row.key) if row.key is not None else key_of(recorded(row))
