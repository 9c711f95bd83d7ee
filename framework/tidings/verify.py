"""Is every event of the log settled in every service? Compares log, floors and watermarks, and names what is missing.

It only reads. When all is well it costs a few rows per service; otherwise it reads the log above the lowest floor, as
far as a limit allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import Database, dead, floors, held, staged, watermarks
from tidings.position import ALL_BUCKETS, CARRIED, carried
from tidings.printable import plain
from tidings.stores import EventStore, RecordedEvent

if TYPE_CHECKING:
    from tidings.service import Service

__all__ = ["DeadEvent", "HeldSummary", "PendingEvent", "Report", "ServiceReport", "StagedSummary", "verify"]

NAMED: Final = 20
"""So many of each kind are named; all are counted."""


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """In the log, handled by the service's code, and neither handled nor dead."""

    position: int
    event_id: str
    type: str
    stream: str
    version: int
    ticks: int
    """When it was recorded, as in `RecordedEvent`."""


@dataclass(frozen=True, slots=True)
class HeldSummary:
    """Failed for now, or waiting behind one of its key that did: it runs again at `due`, seconds since 1970."""

    position: int
    event_id: str
    type: str
    stream: str
    handler: str
    attempts: int
    due: float
    reason: str


@dataclass(frozen=True, slots=True)
class DeadEvent:
    """Given up, with the reason: settled, but somebody should look at it."""

    kind: str
    position: int | None
    event_id: str | None
    type: str | None
    stream: str | None
    handler: str | None
    attempts: int
    reason: str


@dataclass(frozen=True, slots=True)
class StagedSummary:
    """Emitted by a handler whose transaction was committed, and not known to be appended yet."""

    event_id: str
    type: str
    stream: str
    cause: int


@dataclass(slots=True)
class ServiceReport:
    """One service's part. The lists hold the first few; the counts hold all."""

    service: str
    floor: int
    ran: bool = True
    """Whether its database knows it; where it never ran, everything is pending."""
    beyond: int = -1
    """A floor or watermark above the end of the log: something that never was counts as settled."""
    pending_count: int = 0
    pending: list[PendingEvent] = field(default_factory=list)
    held_count: int = 0
    held: list[HeldSummary] = field(default_factory=list)
    held_due: float | None = None
    """When the first held event that waits for nothing but its time has its turn, seconds since 1970."""
    dead_count: int = 0
    dead: list[DeadEvent] = field(default_factory=list)
    staged_count: int = 0
    staged: list[StagedSummary] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.pending_count and not self.held_count and not self.staged_count and self.beyond < 0

    def lines(self, upto: int) -> Iterable[str]:
        state = f"settled up to position {upto}" if self.ok else f"NOT settled up to position {upto}"
        waiting = f", {self.held_count} held" if self.held_count else ""
        counts = f"{self.pending_count} pending{waiting}, {self.staged_count} staged, {self.dead_count} dead"
        yield f"{self.service}: {state} ({counts}; floor {self.floor})"
        if not self.ran:
            yield "  has never run on this log: its database does not know it"
        if self.beyond >= 0:
            yield f"  claims position {self.beyond}, which the log does not reach: was it restored from a backup?"
        for event in self.pending:
            where = f"{event.stream}@{event.version}, position {event.position}"
            yield f"  pending {event.type} {event.event_id} at {where}"
        if self.pending_count > len(self.pending):
            yield f"  and {self.pending_count - len(self.pending)} more pending"
        for late in self.held:
            where = f"of {late.stream}, position {late.position}, {late.attempts} attempts"
            yield f"  held {late.type} {late.event_id} {where}: {late.reason.partition(chr(10))[0]}"
        if self.held_count > len(self.held):
            yield f"  and {self.held_count - len(self.held)} more held"
        for row in self.staged:
            yield f"  staged {row.type} {row.event_id} for {row.stream}, caused by position {row.cause}"
        if self.staged_count > len(self.staged):
            yield f"  and {self.staged_count - len(self.staged)} more staged"
        for letter in self.dead:
            what = f"{letter.type} {letter.event_id} of {letter.stream}" if letter.event_id else f"a {letter.kind}"
            where = f", position {letter.position}" if letter.position is not None else ""
            yield f"  dead {what}{where}, {letter.attempts} attempts: {letter.reason.partition(chr(10))[0]}"
        if self.dead_count > len(self.dead):
            yield f"  and {self.dead_count - len(self.dead)} more dead"


@dataclass(slots=True)
class Report:
    """The answer for all services; `str` of it is for people."""

    log: UUID
    position: int
    """The last event that is carried to services; what is asked is whether everything up to it is settled."""
    services: list[ServiceReport]
    complete: bool = True
    """False when a limit ended the counting: then there may be more pending than the report says."""

    @property
    def ok(self) -> bool:
        """Every event is settled in every service: handled, or dead with its reason; and nothing is held or staged."""
        return all(service.ok for service in self.services)

    def __str__(self) -> str:
        head = f"log {self.log}: {'all settled' if self.ok else 'NOT all settled'} up to position {self.position}"
        lines = (plain(line) for service in self.services for line in service.lines(self.position))
        return "\n".join([head, *lines])


async def verify(
    store: EventStore, services: Sequence[tuple[Service, Database | None]], *, limit: int | None = None
) -> Report:
    """Look once, now. A service without a database has never run.

    No more than `limit` events of the log are looked at. Raises `StoreUnavailable`, `DatabaseUnavailable`.
    """
    log_id = await store.log_id()
    # The log first: what is settled afterwards can only be more.
    position = await _last_carried(store)
    views = [await _look(service, database, log_id) for service, database in services]
    # The end last: what is settled by then cannot be above it.
    head = await store.head()
    for view in views:
        highest = max(view.report.floor, *view.watermarks.values(), -1)
        view.report.beyond = highest if highest > head else -1
    lowest = min((view.report.floor for view in views), default=position)
    looked, complete = 0, True
    if lowest < position and any(view.handled for view in views):
        async for event in store.read_all(after=lowest, filter=CARRIED):
            if event.position > position:
                break
            if looked == limit:
                complete = False
                break
            looked += 1
            bucket = carried(event)
            if bucket is not None:
                for view in views:
                    view.compare(event, bucket)
    return Report(log_id, position, [view.report for view in views], complete)


async def _last_carried(store: EventStore) -> int:
    async for event in store.read_all(backwards=True, filter=CARRIED):
        if carried(event) is not None:
            return event.position
    return -1


@dataclass(slots=True)
class _View:
    """What one service has settled, as its database says."""

    report: ServiceReport
    handled: frozenset[str]
    watermarks: dict[int, int]

    def compare(self, event: RecordedEvent, bucket: int) -> None:
        if event.position <= max(self.report.floor, self.watermarks.get(bucket, -1)) or event.type not in self.handled:
            return
        self.report.pending_count += 1
        if len(self.report.pending) < NAMED:
            self.report.pending.append(
                PendingEvent(event.position, str(event.id), event.type, event.stream, event.version, event.ticks)
            )


async def _look(service: Service, database: Database | None, log_id: UUID) -> _View:
    if database is None:
        return _View(ServiceReport(service.name, floor=-1, ran=False), frozenset(service.handlers), {})

    def of(table: sa.FromClause) -> tuple[sa.ColumnElement[bool], ...]:
        return table.c.service == service.name, table.c.log == str(log_id)

    async with database.reading() as connection:
        ranges = list(await connection.scalars(sa.select(floors.c.position).where(*of(floors))))
        report = ServiceReport(service.name, floor=min(ranges, default=-1), ran=bool(ranges))
        found = await connection.execute(sa.select(watermarks.c.bucket, watermarks.c.position).where(*of(watermarks)))
        marks = {row.bucket: row.position for row in found if row.bucket in ALL_BUCKETS}
        report.staged_count = await _count(connection, staged, of(staged))
        if report.staged_count:
            rows = await connection.execute(sa.select(staged).where(*of(staged)).order_by(staged.c.id).limit(NAMED))
            report.staged = [StagedSummary(row.event_id, row.type, row.stream, row.cause) for row in rows]
        report.held_count = await _count(connection, held, of(held))
        if report.held_count:
            rows = await connection.execute(sa.select(held).where(*of(held)).order_by(held.c.position).limit(NAMED))
            report.held = [
                HeldSummary(
                    row.position, row.event_id, row.type, row.stream, row.handler, row.attempts, row.due, row.reason
                )
                for row in rows
            ]
            report.held_due = await _first_due(connection, of)
        report.dead_count = await _count(connection, dead, of(dead))
        if report.dead_count:
            rows = await connection.execute(sa.select(dead).where(*of(dead)).order_by(dead.c.id).limit(NAMED))
            report.dead = [
                DeadEvent(
                    row.kind, row.position, row.event_id, row.type, row.stream, row.handler, row.attempts, row.reason
                )
                for row in rows
            ]
    return _View(report, frozenset(service.handlers), marks)


async def _first_due(
    connection: AsyncConnection, of: Callable[[sa.FromClause], tuple[sa.ColumnElement[bool], ...]]
) -> float | None:
    """Of the oldest held event of each key, where no dead letter holds the key."""

    def before(table: sa.FromClause) -> tuple[sa.ColumnElement[bool], ...]:
        return (*of(table), table.c.key == held.c.key, table.c.position < held.c.position)

    older = held.alias()
    waits = sa.exists().where(*before(older)) | sa.exists().where(*before(dead), dead.c.holds_key)
    due: float | None = await connection.scalar(sa.select(sa.func.min(held.c.due)).where(*of(held), ~waits))
    return due


async def _count(connection: AsyncConnection, table: sa.Table, where: Sequence[sa.ColumnElement[bool]]) -> int:
    return (await connection.scalar(sa.select(sa.func.count()).select_from(table).where(*where))) or 0
