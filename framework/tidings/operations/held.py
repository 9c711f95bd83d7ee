"""What operators do with held events: list them, retry them, skip them, or drop them.

It only moves rows, in one transaction per command. A process that is running the same event at that moment cannot
commit its effects: it is fenced, joins again, and then sees what the operator ordered.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.contention import again_when_contended, commanding
from tidings.database.engine import Database
from tidings.database.held_events import HeldCount, held_by_handler, lock_held, turns
from tidings.database.tables import dead, held
from tidings.delivery.failure_memory import SKIPPED
from tidings.errors import TidingsError
from tidings.operations.genuine import Contradicted, claims_at, contradicted
from tidings.operations.reads import Reads
from tidings.operations.selection import EVERYTHING, Selection
from tidings.stores import EventStore

__all__ = ["HeldNotFound", "HeldOperations", "HeldEntry", "as_skipped"]

CHUNK: Final = 500
"""Rows to move in one statement."""


class HeldNotFound(TidingsError):
    """The service does not hold the event."""

    def __init__(self, service: str, event: str) -> None:
        super().__init__(
            f"service {service!r} does not hold the event {event}: it was handled, is dead, or was never held; list "
            "them again. Nothing was changed."
        )

    @classmethod
    def at(cls, service: str, positions: Sequence[int]) -> HeldNotFound:
        return cls(service, f"at position {', '.join(map(str, positions))}")


@dataclass(frozen=True, slots=True)
class HeldEntry:
    """A row of `tidings_held`. Times are seconds since 1970."""

    position: int
    stream: str
    version: int
    type: str
    event_id: str
    key: str
    handler: str
    attempts: int
    """0 for one that waits behind another event of its key, or was retried by an operator."""
    tries: int
    """Attempts since it was held, or retried."""
    since: float | None
    due: float
    reason: str
    detail: str | None
    data: bytes
    metadata: bytes


_COLUMNS: Final = [held.c[name] for name in HeldEntry.__slots__]
_BRIEF: Final = [column if column.key not in ("data", "metadata") else sa.literal(b"") for column in _COLUMNS]


class HeldOperations(Reads):
    """The held events of one service and one log. Every method raises `DatabaseUnavailable`."""

    def __init__(self, database: Database, service: str, log: UUID, store: EventStore | None = None) -> None:
        """`store`: whose log `check` compares held events with."""
        super().__init__(database)
        self._store = store
        self._service = service
        self._log = log
        self._mine = (held.c.service == service, held.c.log == str(log))

    async def list(self, selection: Selection = EVERYTHING, *, limit: int = 100) -> list[HeldEntry]:
        """List up to `limit` held events in the order of the log, without their data and metadata."""
        query = sa.select(*_BRIEF).where(*self._mine, *selection.where(held)).order_by(held.c.position).limit(limit)
        async with self._reading() as connection:
            return [HeldEntry(*row) for row in await connection.execute(query)]

    async def count(self, selection: Selection = EVERYTHING) -> int:
        """Count the held events of a selection, one for each handler that holds the event."""
        query = sa.select(sa.func.count()).select_from(held).where(*self._mine, *selection.where(held))
        async with self._reading() as connection:
            return (await connection.scalar(query)) or 0

    async def by_handler(self) -> Sequence[HeldCount]:
        """Count held events by handler."""
        async with self._reading() as connection:
            return await held_by_handler(connection, self._service, self._log)

    async def get(self, position: int) -> HeldEntry:
        """Return the held event at a position, with its data. Raises `HeldNotFound`."""
        async with self._reading() as connection:
            query = sa.select(*_COLUMNS).where(*self._mine, held.c.position == position).order_by(held.c.handler)
            row = (await connection.execute(query)).first()
        if row is None:
            raise HeldNotFound.at(self._service, [position])
        return HeldEntry(*row)

    async def find(self, name: str | tuple[str, int]) -> int:
        """Return the position of a held event by its id, or by stream and version. Raises `HeldNotFound`."""
        if isinstance(name, str):
            which: tuple[sa.ColumnElement[bool], ...] = (held.c.event_id == name,)
        else:
            which = (held.c.stream == name[0], held.c.version == name[1])
        async with self._reading() as connection:
            position = await connection.scalar(sa.select(held.c.position).where(*self._mine, *which))
        if position is None:
            shown = name if isinstance(name, str) else f"{name[0]}@{name[1]}"
            raise HeldNotFound(self._service, shown)
        return int(position)

    async def positions(self, selection: Selection = EVERYTHING, *, limit: int | None = None) -> Sequence[int]:
        """Return the positions of the events, each once, in the order of the log."""
        query = sa.select(held.c.position).where(*self._mine, *selection.where(held)).distinct()
        async with self._reading() as connection:
            return list(await connection.scalars(query.order_by(held.c.position).limit(limit)))

    async def check(self, positions: Sequence[int]) -> None:
        """Raise `Contradicted` for held events that the log contradicts: what is retried runs as its row has it.

        Raises `StoreUnavailable`, too.
        """
        if self._store is None or not positions:
            return
        async with self._reading() as connection:
            claims = await claims_at(connection, self._service, self._log, positions, (held,))
        if found := await contradicted(self._store, claims):
            raise Contradicted(found)

    @again_when_contended
    async def retry_these(self, selection: Selection, positions: Sequence[int]) -> int:
        """Retry events at these positions that are still held and in the selection, and return how many."""
        async with commanding(self._database) as connection:
            these = (*self._mine, held.c.position.in_(positions), *selection.where(held))
            await lock_held(connection, *these)
            return (await connection.execute(held.update().where(*these).values(due=time.time(), tries=0))).rowcount

    @again_when_contended
    async def retry(
        self, selection: Selection = EVERYTHING, *, positions: Sequence[int] | None = None, limit: int | None = None
    ) -> int:
        """Have held events run now, and return how many. Their tries are counted from 0 again.

        With `positions`, retry those, all of them or none. An event that waits behind another one of its key goes on
        waiting. Raises `HeldNotFound`.
        """
        count = 0
        async with commanding(self._database) as connection:
            async for rows in self._chosen(connection, selection, positions, limit):
                these = (*self._mine, _turns(rows))
                await connection.execute(held.update().where(*these).values(due=time.time(), tries=0))
                count += len(rows)
        return count

    @again_when_contended
    async def skip(
        self, selection: Selection = EVERYTHING, *, positions: Sequence[int] | None = None, limit: int | None = None
    ) -> int:
        """Turn held events into dead letters that block nothing, and return how many. Chooses them as `retry` does."""
        count = 0
        async with commanding(self._database) as connection:
            async for rows in self._chosen(connection, selection, positions, limit):
                await connection.execute(dead.insert(), [as_skipped(row) for row in rows])
                await self._delete(connection, rows)
                count += len(rows)
        return count

    @again_when_contended
    async def drop(
        self, selection: Selection = EVERYTHING, *, positions: Sequence[int] | None = None, limit: int | None = None
    ) -> int:
        """Delete held events for good, and return how many. Chooses them as `retry` does; events behind them go on."""
        count = 0
        async with commanding(self._database) as connection:
            async for rows in self._chosen(connection, selection, positions, limit):
                await self._delete(connection, rows)
                count += len(rows)
        return count

    async def _delete(self, connection: AsyncConnection, rows: Sequence[sa.Row[Any]]) -> None:
        await connection.execute(held.delete().where(*self._mine, _turns(rows)))

    async def _chosen(
        self, connection: AsyncConnection, selection: Selection, positions: Sequence[int] | None, limit: int | None
    ) -> AsyncIterator[Sequence[sa.Row[Any]]]:
        """Yield rows, a chunk at a time, locked until the transaction ends.

        If a process is running one of the events, either it commits first, and the row is not yielded; or it commits
        later, and finds the row gone.
        """
        order = turns(connection)
        if positions is not None:
            wanted = sorted(set(positions))
            for start in range(0, len(wanted), CHUNK):
                some = wanted[start : start + CHUNK]
                query = sa.select(held).where(*self._mine, held.c.position.in_(some)).order_by(*order)
                rows = (await connection.execute(query.with_for_update())).all()
                if missing := sorted(set(some) - {row.position for row in rows}):
                    raise HeldNotFound.at(self._service, missing)
                yield rows
            return
        after, left = (-1, ""), limit
        while left is None or left > 0:
            query = (
                sa.select(held)
                .where(*self._mine, held.c.position >= after[0], sa.tuple_(*order) > after, *selection.where(held))
                .order_by(*order)
                .limit(CHUNK if left is None else min(CHUNK, left))
                .with_for_update()
            )
            if not (rows := (await connection.execute(query)).all()):
                return
            after = rows[-1].position, rows[-1].handler
            left = None if left is None else left - len(rows)
            yield rows


def _turns(rows: Sequence[sa.Row[Any]]) -> sa.ColumnElement[bool]:
    """Return the condition for exactly these rows: by position and handler, as several may hold the same event."""
    return sa.tuple_(held.c.position, held.c.handler).in_([(row.position, row.handler) for row in rows])


_ALIKE: Final = (
    *("service", "log", "position", "bucket", "key", "version", "ticks", "event_id", "stream", "type", "data"),
    *("metadata", "is_json", "handler", "line", "attempts", "replayed"),
)


def as_skipped(row: sa.Row[Any]) -> dict[str, Any]:
    """Return a held event as a dead letter: the error that it failed with becomes the detail."""
    before = "\n".join(filter(None, (row.reason, row.detail)))
    return {name: getattr(row, name) for name in _ALIKE} | {
        "kind": "handler",
        "reason": SKIPPED,
        "detail": before or None,
        "died_at": datetime.now(UTC),
        "holds_key": False,
    }
