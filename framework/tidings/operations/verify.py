"""Verifies that every event of the log is settled in every service, from checkpoint, floors and watermarks.

It only reads. If everything is settled, it reads a few rows per service, however long the log is. Otherwise it reads
the log above the lowest floor, up to a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.engine import Database
from tidings.database.held_code import in_code, reason_in_code
from tidings.database.held_events import held_by_handler
from tidings.database.layout import Range, ranges_of
from tidings.database.tables import dead, floors, held, staged, watermarks
from tidings.errors import StreamDeleted
from tidings.modelling.roster import Roster
from tidings.operations.handlers import read_handlers, read_spans
from tidings.operations.report import (
    NAMED,
    DeadEvent,
    FailingHandler,
    HeldSummary,
    PendingEvent,
    RelayReport,
    Report,
    ServiceReport,
    StagedSummary,
)
from tidings.protocol.position import ALL_BUCKETS, BUCKETS, CARRIED, carried
from tidings.relay.checkpoints import UnreadableCheckpoint, read_checkpoint
from tidings.stores import EventStore, RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["Baseline", "Report", "ServiceReport", "Settled", "baseline_of", "last_carried", "settled_in", "verify"]


async def verify(
    store: EventStore,
    services: Sequence[tuple[Declaration, Database | None]],
    *,
    limit: int | None = None,
    relay: str | None = None,
    baseline: Baseline | None = None,
) -> Report:
    """Look once, and report what is not settled. A service without a database has never run.

    At most `limit` events of the log are read. `relay` names the relay whose checkpoint is compared. Events that came
    after `baseline` are counted as on the way, not as pending or staged. Raises `StoreUnavailable`,
    `DatabaseUnavailable`.
    """
    log_id = await store.log_id()
    # Read the end of the log first: what services have settled can only become more.
    end = await last_carried(store)
    position = end if baseline is None else baseline.position
    views = [await _look(service, database, log_id, baseline) for service, database in services]
    publishing = None if relay is None else await _checkpoint(store, relay)
    # Read the head last: nothing that was settled before can be above it.
    head = await store.head()
    for view in views:
        view.report.beyond = view.settled.highest if view.settled.highest > head else -1
    if publishing is not None:
        _judge(publishing, views, head)
    complete = await _count(store, position, end, limit, views, publishing)
    return Report(log_id, position, [view.report for view in views], complete, publishing)


class Baseline(NamedTuple):
    """What there was at one moment, so that a later look can leave out everything newer."""

    position: int
    """Position of the last carried event."""
    staged: Mapping[str, frozenset[str]]
    """Ids of staged events by service."""


async def baseline_of(store: EventStore, services: Sequence[tuple[Declaration, Database | None]]) -> Baseline:
    """Return the baseline of this moment. Raises `StoreUnavailable`, `DatabaseUnavailable`."""
    log_id, ids = await store.log_id(), dict[str, frozenset[str]]()
    for service, database in services:
        if database is not None:
            async with database.reading() as connection:
                query = sa.select(staged.c.event_id).where(*_of(service.name, log_id)(staged))
                ids[service.name] = frozenset(await connection.scalars(query))
    return Baseline(await last_carried(store), ids)


async def last_carried(store: EventStore) -> int:
    """Return the position of the last carried event; -1 if there is none."""
    async for event in store.read_all(backwards=True, filter=CARRIED):
        if carried(event) is not None:
            return event.position
    return -1


# ---- the relay ---------------------------------------------------------------------


async def _checkpoint(store: EventStore, name: str) -> RelayReport:
    try:
        return RelayReport(name, await read_checkpoint(store, name))
    except UnreadableCheckpoint as error:
        return RelayReport(name, None, f"{error}. 'tidings verify --repair' appends one")
    except StreamDeleted as error:
        return RelayReport(name, None, f"its checkpoint can neither be read nor stored: {error} Give it another --name")


def _judge(relay: RelayReport, views: Sequence[_View], head: int) -> None:
    if relay.checkpoint is None:
        return
    if relay.checkpoint > head:
        relay.wrong = (
            f"its checkpoint {relay.checkpoint} is above the end of the log, {head}: it would publish nothing before "
            "the log comes there. Somebody else wrote it, or the log went back; 'tidings verify --repair' moves it back"
        )
        return
    for view in views:
        if view.report.floor < relay.checkpoint:
            view.report.unmarked = relay.checkpoint


async def _count(
    store: EventStore, position: int, end: int, limit: int | None, views: Sequence[_View], relay: RelayReport | None
) -> bool:
    """Read and count events that are not known to be settled or published; return False if `limit` ended that.

    Events above `position`, up to `end`, are on the way.
    """
    handling = [view for view in views if view.service.named]
    published = end
    if relay is not None and relay.checkpoint is not None:
        published = relay.checkpoint
    if limit is None:
        for handler in (handler for view in handling for handler in view.report.handlers):
            handler.pending_count = 0
    # With a limit, do not count what handlers are behind with: it may be the whole log.
    lowest = min((published, *(view.lowest if limit is None else view.report.floor for view in handling)))
    if lowest >= end:
        return True
    looked = 0
    async for event in store.read_all(after=lowest, filter=CARRIED):
        if event.position > end:
            break
        if looked == limit:
            return False
        looked += 1
        bucket = carried(event)
        if bucket is None:
            continue
        if relay is not None and event.position > published:
            relay.behind += 1
        for view in handling:
            view.compare(event, bucket, under_way=event.position > position)
    return True


# ---- a service ---------------------------------------------------------------------


class Settled:
    """How far a service is in each bucket: the floor of its range or its watermark, whichever is higher."""

    __slots__ = ("_upto", "floor", "highest", "ranges")

    def __init__(self, ranges: Sequence[Range], watermarks: dict[int, int]) -> None:
        self._upto = [-1] * BUCKETS
        for part in ranges:
            for bucket in ALL_BUCKETS[max(part.first, 0) : part.last + 1]:
                self._upto[bucket] = max(self._upto[bucket], part.floor)
        self.floor = min(self._upto)
        """The lowest floor of all buckets."""
        for bucket, position in watermarks.items():
            self._upto[bucket] = max(self._upto[bucket], position)
        self.highest = max(self._upto)
        self.ranges = len(ranges)

    def __call__(self, bucket: int, position: int) -> bool:
        """Return whether the event at `position` is settled: handled, held or dead."""
        return position <= self._upto[bucket]


async def settled_in(connection: AsyncConnection, service: str, log: UUID) -> tuple[Settled, dict[int, int]]:
    """Read how far a service is, and its watermarks by bucket."""
    found = await connection.execute(
        sa.select(watermarks.c.bucket, watermarks.c.position).where(*_of(service, log)(watermarks))
    )
    marks = {row.bucket: row.position for row in found if row.bucket in ALL_BUCKETS}
    return Settled(await ranges_of(connection, service, log), marks), marks


Own = Callable[[sa.FromClause], tuple[sa.ColumnElement[bool], ...]]


def _of(service: str, log: UUID) -> Own:
    return lambda table: (table.c.service == service, table.c.log == str(log))


@dataclass(slots=True)
class _View:
    """What one service has settled, as its database says."""

    report: ServiceReport
    service: Declaration
    settled: Settled
    roster: Roster

    @property
    def lowest(self) -> int:
        """Position up to which everything is settled for every handler."""
        return min(self.report.floor, self.roster.first) if self.roster.spans else self.report.floor

    def compare(self, event: RecordedEvent, bucket: int, *, under_way: bool) -> None:
        self.report.behind += event.position > self.report.floor
        if not self.service.handlers_of(event.type):
            return
        if self.settled(bucket, event.position):
            late = {handler.name for handler, _ in self.roster.late(event.type, bucket, event.position)}
            for handler in self.report.handlers if late else ():
                if handler.pending_count is not None:
                    handler.pending_count += handler.handler in late
            return
        if under_way:
            self.report.on_the_way += 1
            return
        self.report.pending_count += 1
        if len(self.report.pending) < NAMED:
            self.report.pending.append(
                PendingEvent(event.position, str(event.id), event.type, event.stream, event.version, event.ticks)
            )


async def _look(service: Declaration, database: Database | None, log_id: UUID, baseline: Baseline | None) -> _View:
    if database is None:
        return _View(
            ServiceReport(service.name, floor=-1, ran=False, missing=True),
            service,
            Settled([], {}),
            Roster(service.handlers_of, {}),
        )
    of = _of(service.name, log_id)
    async with database.reading() as connection:
        settled, _ = await settled_in(connection, service.name, log_id)
        found = await read_spans(connection, service, log_id)
        ranges = await ranges_of(connection, service.name, log_id)
        report = ServiceReport(service.name, settled.floor, ran=settled.ranges > 0, partitions=max(settled.ranges, 1))
        if not report.ran:
            others = sa.select(floors.c.log).where(floors.c.service == service.name).order_by(floors.c.log).limit(1)
            report.other_log = await connection.scalar(others)
        await _look_at_staged(connection, of, report, None if baseline is None else baseline.staged)
        report.held_count = await _rows(connection, held, of)
        if report.held_count:
            rows = await connection.execute(sa.select(held).where(*of(held)).order_by(held.c.position).limit(NAMED))
            report.held = [
                HeldSummary(
                    row.position,
                    row.event_id,
                    row.type,
                    row.stream,
                    row.handler,
                    row.attempts,
                    row.due,
                    reason_in_code(service, row.handler, row.type, row.reason),
                )
                for row in rows
            ]
            report.held_due = await _first_due(connection, of, service)
            counts = await held_by_handler(connection, service.name, log_id)
            report.failing = [
                FailingHandler(*count._replace(reason=reason_in_code(service, count.handler, None, count.reason)))
                for count in counts
            ]
        report.dead_count = await _rows(connection, dead, of)
        if report.dead_count:
            rows = await connection.execute(sa.select(dead).where(*of(dead)).order_by(dead.c.id).limit(NAMED))
            report.dead = [
                DeadEvent(
                    row.kind, row.position, row.event_id, row.type, row.stream, row.handler, row.attempts, row.reason
                )
                for row in rows
            ]
    report.handlers = read_handlers(service, ranges, settled.highest, found)
    roster = Roster(service.handlers_of, {})
    roster.read({}, [span for span in found if span.handler in service.named])
    return _View(report, service, settled, roster)


async def _look_at_staged(
    connection: AsyncConnection, of: Own, report: ServiceReport, before: Mapping[str, frozenset[str]] | None
) -> None:
    """Count the staged events, and name the first ones; those that were not there `before` are on the way."""
    columns = [staged.c[name] for name in StagedSummary.__slots__]
    query = sa.select(*columns).where(*of(staged)).order_by(staged.c.id)
    if before is None:
        report.staged_count = await _rows(connection, staged, of)
        found = [StagedSummary(*row) for row in await connection.execute(query.limit(NAMED))]
    else:
        rows = [StagedSummary(*row) for row in await connection.execute(query)]
        found = [row for row in rows if row.event_id in before.get(report.service, ())]
        report.staged_count = len(found)
        report.on_the_way += len(rows) - len(found)
    report.staged = found[:NAMED]


async def _first_due(connection: AsyncConnection, of: Own, service: Declaration) -> float | None:
    """Return when the first held event is due that waits only for its time and has a handler in this code."""

    def before(table: sa.FromClause) -> tuple[sa.ColumnElement[bool], ...]:
        same_line = (table.c.key == held.c.key, table.c.line == held.c.line)
        return (*of(table), *same_line, table.c.position < held.c.position)

    older = held.alias()
    waits = sa.exists().where(*before(older)) | sa.exists().where(*before(dead), dead.c.holds_key)
    first = sa.select(held.c.handler, held.c.type, sa.func.min(held.c.due).label("due")).where(*of(held), ~waits)
    rows = await connection.execute(first.group_by(held.c.handler, held.c.type))
    return min((row.due for row in rows if in_code(service, row.handler, row.type)), default=None)


async def _rows(connection: AsyncConnection, table: sa.Table, of: Own) -> int:
    return (await connection.scalar(sa.select(sa.func.count()).select_from(table).where(*of(table)))) or 0
