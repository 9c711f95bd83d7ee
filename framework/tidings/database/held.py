"""Held events: what failed for now, and what waits behind it for its partition key; each runs again when it is due.

A key is blocked while it has a held event, or a dead letter that holds it. Later events of a blocked key are held
behind, so that order stays. Only the oldest event of a key is ever due. Every write takes the connection of the
transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.engine import dead, floors, held, watermarks
from tidings.database.inbox import recorded
from tidings.errors import Fenced
from tidings.stores import RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["AT_ONCE", "HeldCount", "HeldEvent", "HeldRows", "Line", "held_by_handler", "in_code", "reason_in_code"]

AT_ONCE: Final = 256
"""Held events read at once: what is due, with its followers."""
RENEWED_RATE: Final = 50.0
"""Held events per second that become due after a deploy, so that they do not all come at once ..."""
RENEWED_SECONDS: Final = 60.0
"""... and seconds after which all of them are due, however many they are."""

_CHANGING: Final = ("attempts", "tries", "due", "reason", "detail", "code")
_HOLD: Final = held.insert()
_NONE: Final[sa.ColumnElement[int]] = sa.literal_column("0", sa.Integer)
"""As the index of those that failed has it: of a parameter no database could know that it fits."""


Line = tuple[str, str]
"""A partition key in a line of handlers (`Handler.line_of`): order is kept within it, and nothing waits for another."""


class HeldEvent(NamedTuple):
    """A row. `due` is seconds since 1970; `tries` counts attempts since it was held, `attempts` all of them."""

    event: RecordedEvent
    bucket: int
    key: str
    handler: str
    attempts: int
    tries: int
    due: float
    reason: str
    detail: str | None
    replayed: bool = False
    """It had been settled before a replay ran it again."""
    since: float | None = None
    """When it was held first, seconds since 1970; None where that was not noted."""
    code: str | None = None
    """Fingerprint of the handler's code that failed; None where that was not noted."""

    handlers_line: str = ""

    @property
    def line(self) -> Line:
        return self.key, self.handlers_line


class HeldCount(NamedTuple):
    """What one handler has failed at, and is held. Times are seconds since 1970."""

    handler: str
    events: int
    """Without those that only wait behind one of them."""
    since: float | None
    """When the oldest of them was held first."""
    due: float
    """When the next of them runs again."""
    reason: str
    """Of the one that runs next: one line, error type and message."""


async def held_by_handler(connection: AsyncConnection, service: str, log: UUID) -> list[HeldCount]:
    """Counts of held events that have failed, by handler, most first. An index answers but for one row of each."""
    tried = (held.c.service == service, held.c.log == str(log), held.c.attempts > _NONE)
    count = sa.func.count().label("events")
    counts = sa.select(held.c.handler, count, sa.func.min(held.c.since), sa.func.min(held.c.due)).where(*tried)
    found = []
    rows = await connection.execute(counts.group_by(held.c.handler).order_by(count.desc(), held.c.handler))
    for handler, events, since, due in rows.all():
        one = sa.select(held.c.reason).where(*tried, held.c.handler == handler, held.c.due == due).limit(1)
        reason = await connection.scalar(one)
        found.append(HeldCount(handler, events, since, due, (reason or "").partition("\n")[0]))
    return found


def in_code(service: Declaration, handler: str, kind: str) -> bool:
    """Whether the service, as it is declared here, gives events of this type to a handler of this name."""
    return any(known.name == handler for known in service.handlers_of(kind))


def reason_in_code(service: Declaration, handler: str, kind: str | None, reason: str) -> str:
    """Return the reason why an event is held, with what this code adds: without its handler, nobody runs it. Without a
    `kind`, the handler is looked for among those of all types."""
    known = handler in service.named if kind is None else in_code(service, handler, kind)
    if known:
        return reason
    return (
        f"its handler {handler!r} is not in this code: bring it back, or skip or drop the event, or, where a handler "
        f"is the same under a new name, declare that with was=({handler!r},); before: {reason}"
    )


class HeldRows:
    """One service's held events of one log and one range of buckets."""

    def __init__(self, service: str, log: UUID, buckets: range) -> None:
        self._service = service
        self._own = {"service": service, "log": str(log)}
        self._mine = self._of(held, buckets)
        holding = (*self._of(dead, buckets), dead.c.holds_key)
        # Each in the order of its index, which spares sorting all of it. A key has one bucket.
        self._blocked = sa.union_all(
            sa.select(sa.func.min(held.c.bucket), held.c.key, held.c.line, sa.func.count())
            .where(*self._mine)
            .group_by(held.c.key, held.c.line),
            sa.select(sa.func.min(dead.c.bucket), dead.c.key, dead.c.line, sa.func.count())
            .where(*holding)
            .group_by(dead.c.key, dead.c.line),
        )
        this = (
            held.c.service == service,
            held.c.log == str(log),
            held.c.position == sa.bindparam("of_position"),
            held.c.handler == sa.bindparam("of_handler"),
        )
        self._postpone = held.update().where(*this).values({name: sa.bindparam(f"new_{name}") for name in _CHANGING})
        self._release = held.delete().where(*this)
        line = sa.tuple_(held.c.key, held.c.line)
        besides = line.not_in(sa.bindparam("besides", expanding=True))
        gone: sa.BindParameter[Any] = sa.bindparam("gone", expanding=True)
        running = sa.and_(
            held.c.handler.not_in(sa.bindparam("paused", expanding=True)),
            sa.tuple_(held.c.handler, held.c.type).not_in(gone),
        )
        failed = (
            sa.select(held.c.key, held.c.line)
            .where(
                *self._mine,
                held.c.attempts > _NONE,
                (held.c.due <= sa.bindparam("now")) | (held.c.due > sa.bindparam("absurd")),
                besides,
                self._oldest(held),
                *self._free(held),
            )
            .order_by(held.c.due)
            .limit(AT_ONCE)
        )
        self._failed = {False: failed, True: failed.where(running)}
        """Without and with handlers that are paused, or not in the code."""
        self._candidates = [
            sa.select(held)
            .where(
                *self._mine,
                held.c.handler == sa.bindparam("of_handler"),
                held.c.attempts > _NONE if order is held.c.due else held.c.attempts == _NONE,
                sa.tuple_(held.c.handler, held.c.type).not_in(gone),
                besides,
                self._oldest(held),
                *self._free(held),
            )
            .order_by(order)
            .limit(1)
            for order in (held.c.position.desc(), held.c.due, held.c.position)
        ]
        """The newest that was never tried, what failed and is due first, the oldest that was never tried."""

        def turn(*where: sa.ColumnElement[bool]) -> dict[bool, sa.Select[tuple[str, str]]]:
            """Lines whose oldest event has waited for another one, which is gone."""
            waiting = (
                sa.select(
                    held.c.key,
                    held.c.line,
                    sa.func.min(held.c.position).label("position"),
                    sa.func.min(held.c.bucket).label("bucket"),
                )
                .where(*self._mine, held.c.attempts == _NONE, besides, *where)
                .group_by(held.c.key, held.c.line)
                .subquery()
            )
            free = (
                sa.select(waiting.c.key, waiting.c.line)
                .where(self._oldest(waiting), *self._free(waiting))
                .order_by(waiting.c.position)
                .limit(AT_ONCE)
            )
            first = held.alias()
            of_paused = sa.exists().where(
                first.c.service == service,
                first.c.log == str(log),
                first.c.position == waiting.c.position,
                first.c.line == waiting.c.line,
                first.c.handler.in_(sa.bindparam("paused", expanding=True))
                | sa.tuple_(first.c.handler, first.c.type).in_(gone),
            )
            return {False: free, True: free.where(~of_paused)}

        self._turn = turn()
        self._turn_after = turn(line.in_(sa.bindparam("after", expanding=True)))
        # First which rows, and that from the index: the rest of a row may be large, and many may wait behind one.
        first = (
            sa.select(held.c.position, held.c.handler)
            .where(*self._mine, line.in_(sa.bindparam("lines", expanding=True)))
            .order_by(held.c.position)
            .limit(AT_ONCE)
        )
        # A dead letter that holds its key may stand between held events, older ones having been retried.
        self._due = (
            sa.select(held)
            .where(
                held.c.service == service,
                held.c.log == str(log),
                sa.tuple_(held.c.position, held.c.handler).in_(first),
                *self._free(held),
            )
            .order_by(held.c.position)
        )

    def _oldest(self, event: sa.FromClause) -> sa.ColumnElement[bool]:
        """No held event of its line is older. Buckets are left out, so that the index answers: a key has one bucket."""
        older = held.alias()
        return ~sa.exists().where(
            older.c.service == self._own["service"],
            older.c.log == self._own["log"],
            older.c.key == event.c.key,
            older.c.line == event.c.line,
            older.c.position < event.c.position,
        )

    def _free(self, event: sa.FromClause) -> tuple[sa.ColumnElement[bool], ...]:
        """No dead letter before it holds its line; and what was held when a replay began has its turn when the replay
        comes to its position."""
        grave = dead.alias()
        holding = sa.exists().where(
            grave.c.service == self._own["service"],
            grave.c.log == self._own["log"],
            grave.c.holds_key,
            grave.c.key == event.c.key,
            grave.c.line == event.c.line,
            grave.c.position < event.c.position,
        )
        reached = sa.exists().where(
            watermarks.c.service == self._own["service"],
            watermarks.c.log == self._own["log"],
            watermarks.c.bucket == event.c.bucket,
            watermarks.c.position >= event.c.position,
        ) | sa.exists().where(
            floors.c.service == self._own["service"],
            floors.c.log == self._own["log"],
            floors.c.first_bucket <= event.c.bucket,
            floors.c.last_bucket >= event.c.bucket,
            floors.c.position >= event.c.position,
        )
        return ~holding, reached

    def _of(self, table: Any, buckets: range) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            table.c.service == self._own["service"],
            table.c.log == self._own["log"],
            table.c.bucket.between(buckets.start, buckets.stop - 1),
        )

    async def blocked(self, connection: AsyncConnection) -> dict[int, dict[Line, int]]:
        """Of each bucket the blocked lines, with the number of rows that block them."""
        found = defaultdict[int, dict[Line, int]](dict)
        for bucket, key, of, rows in await connection.execute(self._blocked):
            lines, line = found[bucket], (key, of)
            lines[line] = lines.get(line, 0) + rows
        return dict(found)

    async def due(
        self,
        connection: AsyncConnection,
        now: float,
        longest: float,
        besides: Collection[Line],
        after: Collection[Line] | None = None,
        paused: Collection[str] = (),
        gone: Collection[tuple[str, str]] = (),
    ) -> list[HeldEvent]:
        """What may run now, of other lines than `besides` and of other handlers than `paused`; each line's events in
        order, `AT_ONCE` at most. No line begins with a handler and type of `gone`.

        A due time further away than `longest` seconds was written by a clock that jumped: it counts as now. What only
        waited for an older event is looked for in the lines `after`, whose events were run, or in all of them, which
        takes as long as there are held events.
        """
        other: dict[str, Any] = {"besides": list(besides)}
        some = bool(paused or gone)
        if some:
            other |= {"paused": list(paused), "gone": list(gone)}
        lines = list(await connection.execute(self._failed[some], {"now": now, "absurd": now + longest, **other}))
        if after is None:
            lines += await connection.execute(self._turn[some], other)
        elif after:
            lines += await connection.execute(self._turn_after[some], {"after": list(after), **other})
        if not lines:
            return []
        wanted = {"lines": [tuple(line) for line in lines]}
        return [_held_event(row) for row in await connection.execute(self._due, wanted)]

    async def candidate(
        self,
        connection: AsyncConnection,
        handler: str,
        besides: Collection[Line],
        *,
        newest: bool,
        gone: Collection[tuple[str, str]] = (),
    ) -> list[HeldEvent]:
        """One event for a trial of a handler, of another line than `besides` and no handler and type of `gone`, if
        there is any: the newest that was never tried, or the one that has been due the longest."""
        wanted = {"of_handler": handler, "besides": list(besides), "gone": list(gone)}
        latest, due, oldest = self._candidates
        for query in (latest, due) if newest else (due, oldest):
            found = [_held_event(row) for row in await connection.execute(query, wanted)]
            if found:
                return found
        return []

    async def gone(self, connection: AsyncConnection, service: Declaration) -> set[tuple[str, str]]:
        """Return handler and type of held events that nobody can run, because the handler is not in the code."""
        kinds = sa.select(held.c.handler, held.c.type).where(*self._mine).distinct()
        return {(row.handler, row.type) for row in await connection.execute(kinds) if not in_code(service, *row)}

    async def outdated(self, connection: AsyncConnection, codes: Mapping[str, str]) -> dict[str, int]:
        """How many events have failed in other code than `codes` names, by handler."""
        failed = sa.select(held.c.handler, held.c.code, sa.func.count()).where(*self._mine, held.c.attempts > _NONE)
        found: dict[str, int] = {}
        for handler, code, count in await connection.execute(failed.group_by(held.c.handler, held.c.code)):
            if handler in codes and code != codes[handler]:
                found[handler] = found.get(handler, 0) + count
        return found

    async def renew(self, connection: AsyncConnection, codes: Mapping[str, str], now: float) -> int:
        """Events that have failed in other code than `codes` names, by handler, become due from `now` on, with all
        their held attempts before them again. Returns how many they are."""
        found = await self.outdated(connection, codes)
        total = sum(found.values())
        step = min(1 / RENEWED_RATE, RENEWED_SECONDS / max(total, 1))
        other = (*self._mine, held.c.attempts > _NONE, held.c.handler == sa.bindparam("of"))
        for handler in found:
            code = codes[handler]
            await connection.execute(
                held.update()
                .where(*other, (held.c.code != code) | held.c.code.is_(None))
                .values(due=now + (held.c.position % total) * step, tries=0, code=code),
                {"of": handler},
            )
        return total

    async def hold(self, connection: AsyncConnection, rows: Sequence[HeldEvent]) -> None:
        """Events that were not held before."""
        if rows:
            await connection.execute(
                _HOLD,
                [
                    self._own
                    | {
                        "position": row.event.position,
                        "bucket": row.bucket,
                        "key": row.key,
                        "version": row.event.version,
                        "ticks": row.event.ticks,
                        "event_id": str(row.event.id),
                        "stream": row.event.stream,
                        "type": row.event.type,
                        "data": row.event.data,
                        "metadata": row.event.metadata,
                        "is_json": row.event.is_json,
                        "handler": row.handler,
                        "line": row.handlers_line,
                        "replayed": row.replayed,
                        "since": row.since,
                    }
                    | _changing(row)
                    for row in rows
                ],
            )

    async def postpone(self, connection: AsyncConnection, rows: Sequence[HeldEvent]) -> None:
        """Held events that failed once more. Raises `Fenced` when another process had one of them meanwhile."""
        for row in rows:
            changes: dict[str, Any] = {f"new_{name}": value for name, value in _changing(row).items()}
            changes |= {"of_position": row.event.position, "of_handler": row.handler}
            self._one(row.event.position, (await connection.execute(self._postpone, changes)).rowcount)

    async def release(self, connection: AsyncConnection, turns: Sequence[tuple[int, str]]) -> None:
        """Held events that are settled, position and handler. Raises `Fenced` when another process had one of them
        meanwhile."""
        for position, handler in turns:
            this = {"of_position": position, "of_handler": handler}
            self._one(position, (await connection.execute(self._release, this)).rowcount)

    async def stand(self, connection: AsyncConnection, turns: Sequence[tuple[int, str]]) -> None:
        """Raises `Fenced` when another process has settled any of these held events (that it has postponed one shows
        when this one does)."""
        if turns:
            positions = {position for position, _ in turns}
            these = sa.select(held.c.position, held.c.handler).where(*self._mine, held.c.position.in_(positions))
            there = {(row.position, row.handler) for row in await connection.execute(these)}
            for turn in turns:
                self._one(turn[0], int(turn in there))

    def _one(self, position: int, rows: int) -> None:
        if rows != 1:
            raise Fenced(
                f"service {self._service!r}: the held event at position {position} was settled by another process; "
                "this group was rolled back. Are two processes of the service active at once? Stop one"
            )


def _held_event(row: sa.Row[Any]) -> HeldEvent:
    return HeldEvent(
        recorded(row),
        row.bucket,
        row.key,
        row.handler,
        row.attempts,
        row.tries,
        row.due,
        row.reason,
        row.detail,
        row.replayed,
        row.since,
        row.code,
        row.line,
    )


def _changing(row: HeldEvent) -> dict[str, Any]:
    return {
        "attempts": row.attempts,
        "tries": row.tries,
        "due": row.due,
        "reason": row.reason,
        "detail": row.detail,
        "code": row.code,
    }
