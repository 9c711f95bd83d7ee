"""Replays: a service is sent back to a position, so that its handlers run again. Here no handler is run.

Watermarks and floors are lowered in one transaction, which counts up `replays` in every watermark. A process that
joined before cannot commit any more, joins again, and its next marker starts a pass over the log. Up to where a bucket
had been settled is kept for good: up to there, handlers with `replay=False` are passed over, and what was emitted is
not appended again. What was never done keeps its row: a held event has its turn when the replay comes to it, and a
dead one, unless its handler has `replay=False`, becomes held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.contention import again_when_contended
from tidings.database.engine import Database
from tidings.database.enrolment import sent_back
from tidings.database.layout import ranges_of
from tidings.database.tables import dead, floors, held, replays, staged, watermarks
from tidings.database.watermarks import lock_service
from tidings.errors import TidingsError
from tidings.modelling.handlers import Handler
from tidings.modelling.roster import Span
from tidings.operations.authors import Stranger, may_emit, strangers
from tidings.operations.dead import held_again
from tidings.operations.handlers import read_handlers, read_spans
from tidings.protocol.position import ALL_BUCKETS, CARRIED, carried
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["NothingToReplay", "Plan", "Share", "Start", "find_start", "plan", "send_back"]

NAMED: Final = 20
"""Streams with missing events that are named; all are counted."""


class NothingToReplay(TidingsError):
    """The service has settled nothing from there on."""


class Start(NamedTuple):
    """Where a replay begins."""

    position: int
    """The first event that services receive, at or above what was asked for."""
    before: int
    """The one before it, -1 for none: positions between them belong to nobody, and stores do not begin to read there.
    """
    recorded_at: datetime


@dataclass(slots=True)
class Share:
    """What a replay means for one handler and one type of event, as far as the service has settled them."""

    handler: str
    type: str
    replay: bool
    may_emit: bool
    """It takes a `Context`."""
    run: int = 0
    """Events that are run again."""
    passed_over: int = 0
    never_given: int = 0
    """Events that were settled before the handler began, or while it was away: they run for the first time."""
    held: int = 0
    """Held, or dead and to be held: these have not been done, and each runs in its turn."""
    first: int | None = None
    """Position of the first event counted here."""
    last: int | None = None


@dataclass(slots=True)
class Plan:
    """What a replay would do, when this was looked at."""

    service: str
    log: UUID
    start: Start
    upto: int = -1
    """The highest position that the service has settled, in whatever bucket."""
    shares: list[Share] = field(default_factory=list)
    held: int = 0
    """Held events from the start on: they stay."""
    dead_again: int = 0
    """Dead letters from the start on that become held."""
    dead_stay: int = 0
    staged: int = 0
    """Emitted events that are still to be appended: they stay."""
    missing: int = 0
    """The least number of events, from the start on, that were in the log once and are not any more."""
    missing_streams: list[str] = field(default_factory=list)
    """The first of the streams that lack some."""
    strangers: list[Stranger] = field(default_factory=list)
    """Names of handlers in the log that nobody answers to any more: a replay appends again what they emitted, unless
    it is said who they are (`was=`), or that they are gone."""

    @property
    def run(self) -> int:
        return sum(share.run for share in self.shares)


async def find_start(store: EventStore, wanted: int | datetime) -> Start | None:
    """The first event at or above a position, or after the last that was recorded before a moment; None for none.

    It reads the log backwards from its end, so it costs as much as what is replayed. Raises `StoreUnavailable`.
    """
    position, recorded_at, before = -1, None, -1
    async for event in store.read_all(backwards=True, filter=CARRIED):
        if carried(event) is None:
            continue
        if event.position < wanted if isinstance(wanted, int) else event.recorded_at < wanted:
            before = event.position
            break
        position, recorded_at = event.position, event.recorded_at
    return None if recorded_at is None else Start(position, before, recorded_at)


async def plan(store: EventStore, database: Database, service: Declaration, start: Start) -> Plan:
    """What a replay from there would do. It only reads: the rows, and the log up to where the service has come.

    It remembers a number for each stream on the way. Raises `NothingToReplay`, `StoreUnavailable`,
    `DatabaseUnavailable`.
    """
    log_id = await store.log_id()
    found = Plan(service.name, log_id, start)
    own = _Own(service.name, log_id)
    async with database.reading() as connection:
        state = await own.state(connection)
        rows = await connection.execute(
            sa.select(held.c.position, held.c.handler).where(*own.above(held, start.before))
        )
        waiting = {(row.position, row.handler) for row in rows}
        found.held = len(waiting)
        letters = (
            await connection.execute(
                sa.select(dead.c.position, dead.c.handler).where(
                    *own.above(dead, start.before), dead.c.kind == "handler"
                )
            )
        ).all()
        late = await read_spans(connection, service, log_id)
        ranges = await ranges_of(connection, service.name, log_id)
        waits = sa.select(sa.func.count()).select_from(staged).where(*own.of(staged))
        found.staged = (await connection.scalar(waits)) or 0
    run_again = _run_again(service)
    again = {(letter.position, letter.handler) for letter in letters if letter.handler in run_again}
    found.dead_again, found.dead_stay = len(again), len(letters) - len(again)
    found.upto = state.highest
    if found.upto < start.position:
        raise NothingToReplay(_nothing(service.name, start))
    reports = read_handlers(service, ranges, state.highest, late)
    new = {report.handler for report in reports if report.state == "to begin"}
    spans: dict[tuple[int, str], list[Span]] = {}
    for span in late:
        spans.setdefault((span.bucket, span.handler), []).append(span)

    def never_given(handler: str, bucket: int, position: int) -> bool:
        return handler in new or any(span.covers(position) for span in spans.get((bucket, handler), ()))

    await _count(store, service, found, state, waiting | again, never_given)
    found.strangers = await strangers(store, service, start.before)
    return found


async def _count(
    store: EventStore,
    service: Declaration,
    found: Plan,
    state: _State,
    undone: set[tuple[int, str]],
    never_given: Callable[[str, int, int], bool],
) -> None:
    shares = {
        (name, handler.name): _share(handler, name)
        for name, handlers in service.handlers.items()
        for handler in handlers
    }
    versions: dict[str, int] = {}
    lacking: dict[str, None] = {}
    marks = {position for position in state.marks.values() if position > found.start.before}
    async for event in store.read_all(after=found.start.before, filter=CARRIED):
        if event.position > found.upto:
            break
        bucket = carried(event)
        if bucket is None:
            continue
        # From the log's beginning, every stream's first version is known too.
        expected = versions.get(event.stream, 0 if found.start.before < 0 else event.version)
        if event.version > expected:
            found.missing += event.version - expected
            lacking[event.stream] = None
        versions[event.stream] = event.version + 1
        marks.discard(event.position)
        if event.position > state.upto(bucket):
            continue
        for handler in service.handlers_of(event.type):
            share = shares.get((event.type, handler.name))
            if share is None:  # a type that only `on_any` handles
                share = shares[event.type, handler.name] = _share(handler, event.type)
            if (event.position, handler.name) in undone:
                share.held += 1
            elif share.replay and never_given(handler.name, bucket, event.position):
                share.never_given += 1
            elif share.replay:
                share.run += 1
            else:
                share.passed_over += 1
            share.first = event.position if share.first is None else share.first
            share.last = event.position
    # A watermark above the start stands at an event that was handled; there may be no later one of its stream.
    found.missing = max(found.missing, len(marks))
    found.missing_streams = list(lacking)[:NAMED]
    found.shares = list(shares.values())


@again_when_contended
async def send_back(database: Database, service: Declaration, log: UUID, start: Start) -> None:
    """Do it: durable when this returns, and the service begins within seconds, at once or when it is started again.

    Raises `NothingToReplay`; `DatabaseUnavailable`, after which a look at `plan` says whether it was done.
    """
    own, before = _Own(service.name, log), start.before
    async with database.turn, database.transaction() as connection:
        await lock_service(connection, service.name, log)
        await connection.execute(
            watermarks.update().where(*own.of(watermarks)).values(replays=watermarks.c.replays + 1)
        )
        state = await own.state(connection)
        if state.highest < start.position:
            raise NothingToReplay(_nothing(service.name, start))
        await connection.execute(replays.delete().where(*own.of(replays)))
        await connection.execute(
            replays.insert(),
            [
                {"service": service.name, "log": str(log), "bucket": bucket, "upto": state.upto(bucket)}
                for bucket in ALL_BUCKETS
            ],
        )
        for table in (watermarks, floors):
            await connection.execute(table.update().where(*own.above(table, before)).values(position=before))
        await sent_back(connection, service, log, before, _run_again(service))
        await _revive(connection, own, before, _run_again(service))


async def _revive(connection: AsyncConnection, own: _Own, before: int, names: Sequence[str]) -> None:
    """Dead letters become held events: their event may be in no other place any more."""
    rows = await connection.execute(sa.select(held.c.position, held.c.handler).where(*own.above(held, before)))
    there = {(row.position, row.handler) for row in rows}
    chosen = (*own.above(dead, before), dead.c.kind == "handler", dead.c.handler.in_(names))
    for row in (await connection.execute(sa.select(dead).where(*chosen).order_by(dead.c.id))).all():
        if (row.position, row.handler) not in there:
            there.add((row.position, row.handler))
            await connection.execute(
                held.insert().values(own.values | held_again(row, "dead until a replay; waits for its turn in it"))
            )
    await connection.execute(dead.delete().where(*chosen))


class _State(NamedTuple):
    """How far a service is, or was before the replay that is under way."""

    marks: Mapping[int, int]
    floors: Sequence[tuple[range, int]]
    before: Mapping[int, int]

    def upto(self, bucket: int) -> int:
        ranges = (floor for buckets, floor in self.floors if bucket in buckets)
        return max(self.marks.get(bucket, -1), self.before.get(bucket, -1), *ranges, -1)

    @property
    def highest(self) -> int:
        return max(self.upto(bucket) for bucket in ALL_BUCKETS)


class _Own:
    """The rows of one service about one log."""

    def __init__(self, service: str, log: UUID) -> None:
        self.values: dict[str, Any] = {"service": service, "log": str(log)}

    def of(self, table: sa.Table) -> tuple[sa.ColumnElement[bool], ...]:
        return table.c.service == self.values["service"], table.c.log == self.values["log"]

    def above(self, table: sa.Table, before: int) -> tuple[sa.ColumnElement[bool], ...]:
        return (*self.of(table), table.c.position > before)

    async def state(self, connection: AsyncConnection) -> _State:
        marks = await connection.execute(
            sa.select(watermarks.c.bucket, watermarks.c.position).where(*self.of(watermarks))
        )
        ranges = await connection.execute(sa.select(floors).where(*self.of(floors)).with_for_update())
        before = await connection.execute(sa.select(replays.c.bucket, replays.c.upto).where(*self.of(replays)))
        return _State(
            {row.bucket: row.position for row in marks},
            [(range(row.first_bucket, row.last_bucket + 1), row.position) for row in ranges],
            {row.bucket: row.upto for row in before},
        )


def _run_again(service: Declaration) -> list[str]:
    return [name for name, handler in service.named.items() if handler.replay]


def _share(handler: Handler, type: str) -> Share:
    return Share(handler.name, type, handler.replay, may_emit(handler))


def _nothing(service: str, start: Start) -> str:
    return (
        f"service {service!r} has settled nothing at position {start.position} or above, so there is nothing to run "
        "again; what it has not come to, it runs in any case. Nothing was changed."
    )
