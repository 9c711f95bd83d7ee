"""What operators do with dead letters: list them, retry them, or drop them for good.

It only moves rows. A dead letter that is retried becomes a held event that is due now. The service runs it, at once or
when it is next started, in the order of its partition key. The row is deleted in the same transaction, so its effects
happen exactly once.
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

from tidings.database.contention import again_when_contended, commanding
from tidings.database.engine import Database
from tidings.database.event_rows import key_of, recorded
from tidings.database.tables import dead, held, staged
from tidings.database.watermarks import lock_service
from tidings.errors import TidingsError
from tidings.operations.fencing import fence
from tidings.operations.genuine import CHUNK, Contradicted, claims_at, contradicted
from tidings.operations.reads import Reads
from tidings.operations.selection import EVERYTHING, Selection
from tidings.stores import EventStore

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
    """The dead letter is a message that could not be read: there is no event to run."""

    def __init__(self, service: str, id: int, reason: str) -> None:
        super().__init__(
            f"dead letter {id} of service {service!r} is a message, not an event ({reason}): find out who published "
            "it, then drop it. Nothing was changed."
        )


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row of `tidings_dead`. For a message without an event, the event's attributes are None."""

    id: int
    kind: str
    """`handler`: an event that was given up; `message`: a message that could not be read; `staged`: an event that a
    handler emitted and the store refuses."""
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


class DeadLetters(Reads):
    """The dead letters of one service and one log. Every method raises `DatabaseUnavailable`."""

    def __init__(self, database: Database, service: str, log: UUID, store: EventStore | None = None) -> None:
        """`store`: whose log `check` compares letters with."""
        super().__init__(database)
        self._store = store
        self._service = service
        self._log = log
        self._own = {"service": service, "log": str(log)}
        self._mine = (dead.c.service == service, dead.c.log == str(log))

    async def list(self, selection: Selection = EVERYTHING, *, limit: int = 100) -> list[DeadLetter]:
        """List up to `limit` dead letters, the oldest first."""
        query = sa.select(*_COLUMNS).where(*self._mine, *selection.where(dead)).order_by(dead.c.id).limit(limit)
        async with self._reading() as connection:
            return [DeadLetter(*row) for row in await connection.execute(query)]

    async def ids(self, selection: Selection = EVERYTHING, *, limit: int | None = None) -> Sequence[tuple[int, str]]:
        """Return the id and kind of each, the oldest first."""
        query = sa.select(dead.c.id, dead.c.kind).where(*self._mine, *selection.where(dead)).order_by(dead.c.id)
        async with self._reading() as connection:
            return [(row.id, row.kind) for row in await connection.execute(query.limit(limit))]

    async def count(self, selection: Selection = EVERYTHING) -> int:
        """Count the dead letters of a selection."""
        async with self._reading() as connection:
            query = sa.select(sa.func.count()).select_from(dead).where(*self._mine, *selection.where(dead))
            return (await connection.scalar(query)) or 0

    async def get(self, id: int) -> DeadLetter:
        """Return one dead letter with its data. Raises `DeadLetterNotFound`."""
        async with self._reading() as connection:
            row = (await connection.execute(sa.select(*_COLUMNS).where(*self._mine, dead.c.id == id))).one_or_none()
        if row is None:
            raise DeadLetterNotFound(self._service, [id])
        return DeadLetter(*row)

    async def check(self, ids: Sequence[int]) -> None:
        """Raise `Contradicted` for letters that the log contradicts: what is retried runs as the letter has it.

        Raises `StoreUnavailable`, too.
        """
        if self._store is None:
            return
        wanted, positions = sorted(set(ids)), set[int]()
        for at in range(0, len(wanted), CHUNK):
            chosen = dead.c.id.in_(wanted[at : at + CHUNK])
            query = sa.select(dead.c.position).where(*self._mine, dead.c.kind == "handler", chosen)
            async with self._reading() as connection:
                positions |= {position for position in await connection.scalars(query) if position is not None}
        async with self._reading() as connection:
            claims = await claims_at(connection, self._service, self._log, positions, (dead,))
        names = set(map(str, wanted))
        theirs = [claim for claim in claims if claim.row.name in names]
        if found := await contradicted(self._store, theirs):
            raise Contradicted(found)

    @again_when_contended
    async def retry(self, ids: Sequence[int], *, all_or_none: bool = True) -> int:
        """Have dead letters run again, all of them or none, and return how many. Attempts are counted from 0 again.

        Without `all_or_none`, dead letters that no longer exist are left out. An emitted event that the store refused
        is appended when the service is next started. Raises `DeadLetterNotFound`, `NotRetriable`.
        """
        async with commanding(self._database) as connection:
            await lock_service(connection, self._service, self._log)
            taken = await self._take(connection, ids, all_or_none=all_or_none)
            for row in taken:
                if row.kind == "message":
                    raise NotRetriable(self._service, row.id, row.reason)
                if row.kind == "staged":
                    await connection.execute(staged.insert().values(self._staged(row)))
                    continue
                await connection.execute(held.insert().values(self._own | held_again(row, "retried")))
            # A process that is already running does not know that these rows now block their keys: fence it.
            freed = {row.bucket for row in taken if row.kind == "handler" and not row.holds_key}
            await fence(connection, self._service, self._log, freed)
        return len(taken)

    @again_when_contended
    async def drop(self, ids: Sequence[int]) -> int:
        """Delete dead letters for good, all of them or none, and return how many.

        Events that waited behind them go on. Raises `DeadLetterNotFound`.
        """
        async with commanding(self._database) as connection:
            return len(await self._take(connection, ids))

    async def _take(
        self, connection: AsyncConnection, ids: Sequence[int], *, all_or_none: bool = True
    ) -> Sequence[sa.Row[Any]]:
        wanted = set(ids)
        taken = []
        for number in sorted(wanted):
            row = (await connection.execute(sa.select(dead).where(*self._mine, dead.c.id == number))).one_or_none()
            if row is not None and (await connection.execute(sa.delete(dead).where(dead.c.id == number))).rowcount == 1:
                taken.append(row)
        missing = sorted(wanted - {row.id for row in taken})
        if missing and all_or_none:
            raise DeadLetterNotFound(self._service, missing)
        return taken

    def _staged(self, row: sa.Row[Any]) -> dict[str, Any]:
        names = ("bucket", "event_id", "stream", "type", "data", "metadata", "is_json")
        return self._own | {"cause": row.position} | {name: getattr(row, name) for name in names}


def held_again(row: sa.Row[Any], reason: str) -> dict[str, Any]:
    """Return a dead letter of kind `handler` as a held event that is due now, with its attempts counted from 0."""
    kept = {name: getattr(row, name) for name in _KEPT}
    where = {"position": row.position, "bucket": row.bucket, "key": _key_of(row), "handler": row.handler}
    return kept | where | {"attempts": 0, "tries": 0, "due": time.time(), "reason": reason, "detail": None}


def _key_of(row: sa.Row[Any]) -> str:
    """Return the partition key. Dead letters of the first schema do not store it: compute it from the event."""
    return str(row.key) if row.key is not None else key_of(recorded(row))
