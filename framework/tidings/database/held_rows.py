"""A service's held events of one bucket range: what blocks partition keys, and the rows as work on them goes on.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.event_rows import columns_of
from tidings.database.held_code import HeldCode
from tidings.database.held_due import DueEvents
from tidings.database.held_events import HeldEvent, Line, changing
from tidings.database.scope import Conditions, Scope
from tidings.database.tables import dead, held
from tidings.database.texts import MARK, decoded, encoded
from tidings.errors import Fenced

__all__ = ["Ended", "HeldRows"]

_CHANGING: Final = ("attempts", "tries", "due", "reason", "detail", "code")
_WAS: Final = ("attempts", "tries", "due")
_HOLD: Final = held.insert()


class Ended(NamedTuple):
    """What came of a held event that was in flight."""

    row: HeldEvent
    """As it was read."""
    postponed: HeldEvent | None = None
    """As it is held again; None where it is not."""
    dead: bool = False
    """It is a dead letter now. Without this and `postponed`, its handler has succeeded, or is not to run."""


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
        self._release: sa.Delete | sa.Update = held.delete().where(*this)
        self._postpone = _postpone(this)
        self._bury = held.delete().where(*this, _unchanged())

    async def blocked(self, connection: AsyncConnection) -> dict[int, dict[Line, int]]:
        """Return the blocked lines of each bucket, with the number of rows that block them."""
        found: dict[int, dict[Line, int]] = {}
        # Nearly all texts stand there as they are: a call of `decoded` for each would take as long as all the rest.
        for bucket, key, of, rows in (await connection.execute(self._blocked)).all():
            line = (decoded(key) if key[:8] == MARK else key), (decoded(of) if of[:8] == MARK else of)
            lines = found.get(bucket)
            if lines is None:
                found[bucket] = {line: rows}
            else:
                lines[line] = lines.get(line, 0) + rows
        return found

    async def hold(self, connection: AsyncConnection, rows: Sequence[HeldEvent]) -> None:
        """Hold events that were not held before."""
        if rows:
            await connection.execute(_HOLD, [self._scope.own | _columns(row) | changing(row) for row in rows])

    async def end(self, connection: AsyncConnection, ended: Iterable[Ended]) -> None:
        """Write what came of held events. Raises `Fenced` when another process had one of them meanwhile, when an
        operator has taken one away, or wants one tried again that is to be dead.

        What an operator, or a deploy, has said meanwhile about when an event is tried next stays.
        """
        # In the order in which operators lock them (`turns`), so that neither waits for the other for ever.
        for row, later, dead_ in sorted(ended, key=lambda each: (each.row.event.position, encoded(each.row.handler))):
            statement = self._release
            this = {"of_position": row.event.position, "of_handler": row.handler}
            if later is not None or dead_:
                statement = self._bury
                this |= {f"was_{name}": getattr(row, name) for name in _WAS}
            if later is not None:
                statement = self._postpone
                this |= {f"new_{name}": value for name, value in changing(later).items()}
            self._check(row.event.position, (await connection.execute(statement, this)).rowcount)

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
                f"service {self._scope.service!r}: the held event at position {position} is not as it was when it was "
                "read: an operator has retried, skipped or dropped it, or another process has had it; this group was "
                "rolled back, and the service joins again"
            )


def _postpone(this: Conditions) -> sa.Update:
    """Return the statement that keeps what came of an attempt. `tries` and `due` are the operator's where they are not
    what this process has read."""
    values: dict[str, Any] = {name: sa.bindparam(f"new_{name}", type_=held.c[name].type) for name in _CHANGING}
    for name in ("tries", "due"):
        values[name] = sa.case((_unchanged(), values[name]), else_=held.c[name])
    return held.update().where(*this, held.c.attempts == sa.bindparam("was_attempts")).values(values)


def _unchanged() -> sa.ColumnElement[bool]:
    """The row says of its attempts what it did when it was read."""
    return sa.and_(*(held.c[name] == sa.bindparam(f"was_{name}") for name in _WAS))


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
