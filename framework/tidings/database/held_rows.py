"""A service's held events of one bucket range: what blocks partition keys, and the rows as work on them goes on.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.event_rows import columns_of
from tidings.database.held_code import HeldCode
from tidings.database.held_due import DueEvents
from tidings.database.held_events import HeldEvent, Line, changing
from tidings.database.scope import Scope
from tidings.database.tables import dead, held
from tidings.database.texts import decoded
from tidings.errors import Fenced

__all__ = ["HeldRows"]

_CHANGING: Final = ("attempts", "tries", "due", "reason", "detail", "code")
_HOLD: Final = held.insert()


class HeldRows:
    """One service's held events of one log and one range of buckets."""

    def __init__(self, service: str, log: UUID, buckets: range) -> None:
        self._scope = scope = Scope(service, log, buckets)
        self.due = DueEvents(scope)
        """Which of them may run."""
        self.code = HeldCode(scope)
        """Whether the code of their handlers is still there, and still the same."""
        self._blocked = _blocked(scope)
        this = (
            *scope.of_log(held),
            held.c.position == sa.bindparam("of_position"),
            held.c.handler == sa.bindparam("of_handler"),
        )
        self._postpone = held.update().where(*this).values({name: sa.bindparam(f"new_{name}") for name in _CHANGING})
        self._release = held.delete().where(*this)

    async def blocked(self, connection: AsyncConnection) -> dict[int, dict[Line, int]]:
        """Return the blocked lines of each bucket, with the number of rows that block them."""
        found = defaultdict[int, dict[Line, int]](dict)
        for bucket, key, of, rows in (await connection.execute(self._blocked)).all():
            lines, line = found[bucket], (decoded(key), decoded(of))
            lines[line] = lines.get(line, 0) + rows
        return dict(found)

    async def hold(self, connection: AsyncConnection, rows: Sequence[HeldEvent]) -> None:
        """Hold events that were not held before."""
        if rows:
            await connection.execute(_HOLD, [self._scope.own | _columns(row) | changing(row) for row in rows])

    async def postpone(self, connection: AsyncConnection, rows: Sequence[HeldEvent]) -> None:
        """Hold events that failed once more. Raises `Fenced` when another process had one of them meanwhile."""
        for row in rows:
            changes: dict[str, Any] = {f"new_{name}": value for name, value in changing(row).items()}
            changes |= {"of_position": row.event.position, "of_handler": row.handler}
            self._check(row.event.position, (await connection.execute(self._postpone, changes)).rowcount)

    async def release(self, connection: AsyncConnection, turns: Sequence[tuple[int, str]]) -> None:
        """Forget held events that are settled, position and handler. Raises `Fenced` when another process had one of
        them meanwhile."""
        for position, handler in turns:
            this = {"of_position": position, "of_handler": handler}
            self._check(position, (await connection.execute(self._release, this)).rowcount)

    async def assert_held(self, connection: AsyncConnection, turns: Sequence[tuple[int, str]]) -> None:
        """Raise `Fenced` when another process has settled any of these held events (that it has postponed one shows
        when this one does)."""
        if turns:
            positions = {position for position, _ in turns}
            these = sa.select(held.c.position, held.c.handler)
            these = these.where(*self._scope.in_range(held), held.c.position.in_(positions))
            there = {(row.position, row.handler) for row in await connection.execute(these)}
            for turn in turns:
                self._check(turn[0], int(turn in there))

    def _check(self, position: int, rows: int) -> None:
        if rows != 1:
            raise Fenced(
                f"service {self._scope.service!r}: the held event at position {position} was settled by another "
                "process; this group was rolled back. Are two processes of the service active at once? Stop one"
            )


def _blocked(scope: Scope) -> sa.CompoundSelect[Any]:
    """Each in the order of its index, which spares sorting all of it. A key has one bucket."""
    return sa.union_all(
        *(
            sa.select(sa.func.min(rows.c.bucket), _written(rows.c.key), _written(rows.c.line), sa.func.count())
            .where(*scope.in_range(rows), *holding)
            .group_by(rows.c.key, rows.c.line)
            for rows, holding in ((held, ()), (dead, (dead.c.holds_key,)))
        )
    )


def _written(column: sa.ColumnElement[str]) -> sa.ColumnElement[str]:
    """The text as it stands in the database: to decode it in the one place that reads many rows is twice as fast."""
    return sa.type_coerce(column, sa.Text())


def _columns(row: HeldEvent) -> dict[str, Any]:
    """Return the columns that stay as they are."""
    return columns_of(row.event) | {
        "bucket": row.bucket,
        "key": row.key,
        "handler": row.handler,
        "line": row.handlers_line,
        "replayed": row.replayed,
        "since": row.since,
    }
