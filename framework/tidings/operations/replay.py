"""Sends a service back to a position, so that its handlers run again. It runs no handler itself.

One transaction lowers watermarks and floors, and increments `replays` in every watermark. A process that joined before
that can no longer commit: it joins again, and the next marker starts a pass over the log. The position up to which each
bucket had been settled is kept for good. Up to that position, handlers with `replay=False` are passed over, and events
that were emitted are not appended again. An event that was never done keeps its row: a held event runs when the replay
comes to it, and a dead one becomes held, unless its handler has `replay=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.contention import again_when_contended, commanding
from tidings.database.engine import Database
from tidings.database.enrolment import sent_back
from tidings.database.layout import ranges_of
from tidings.database.tables import dead, floors, held, replays, staged, watermarks
from tidings.database.watermarks import lock_service, lower
from tidings.errors import TidingsError
from tidings.modelling.handlers import Handler
from tidings.modelling.roster import Span
from tidings.operations.authors import UnknownAuthor, may_emit, unknown_authors
from tidings.operations.dead import held_again
from tidings.operations.genuine import Counterfeit, Genuine, claims_at, contradicted, genuine
from tidings.operations.handlers import read_handlers, read_spans
from tidings.protocol.position import ALL_BUCKETS, CARRIED, carried
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["NothingToReplay", "Plan", "Share", "Start", "find_start", "plan", "send_back"]

NAMED: Final = 20
"""Streams with missing events to name; all are counted."""


class NothingToReplay(TidingsError):
    """The service has settled nothing from the start of the replay on."""


class Start(NamedTuple):
    """Where a replay begins."""

    position: int
    """The first carried event at or above what was asked for."""
    before: int
    """The carried event before it, -1 for none. Stores begin to read at an event sooner than between two of them."""
    recorded_at: datetime


@dataclass(slots=True)
class Share:
    """What a replay means for one handler and one type of event that the service has settled."""

    handler: str
    type: str
    replay: bool
    may_emit: bool
    """Whether the handler takes a `Context`."""
    run: int = 0
    """Events that run again."""
    passed_over: int = 0
    never_given: int = 0
    """Events that were settled before the handler began, or while it was away: they run for the first time."""
    held: int = 0
    """Events that are held, or dead and become held: they were never done, and each runs in its turn."""
    first: int | None = None
    """Position of the first event counted here."""
    last: int | None = None


@dataclass(slots=True)
class Plan:
    """What a replay would do, as of the moment at which `plan` looked."""

    service: str
    log: UUID
    start: Start
    upto: int = -1
    """The highest position that the service has settled in any bucket."""
    shares: list[Share] = field(default_factory=list)
    held: int = 0
    """Held events from the start on; they stay held."""
    dead_again: int = 0
    """Dead letters from the start on that become held."""
    dead_stay: int = 0
    staged: int = 0
    """Emitted events that are not appended yet; they stay staged."""
    missing: int = 0
    """Events from the start on that are no longer in the log: at least this many."""
    missing_streams: list[str] = field(default_factory=list)
    """The first few streams with missing events."""
    forged: list[Counterfeit] = field(default_factory=list)
    """Held events and dead letters whose content differs from the log. The replay would run them as they are."""
    unknown_authors: list[UnknownAuthor] = field(default_factory=list)
    """Handler names in the log that no handler has any more. A replay appends what they emitted again, unless `was=`
    says which handlers they are."""

    @property
    def run(self) -> int:
        return sum(share.run for share in self.shares)


async def find_start(store: EventStore, wanted: int | datetime) -> Start | None:
    """Find the first carried event at or above a position, or after the last one recorded before a moment.

    Returns None if there is none. Reads the log backwards from its end, so it costs as much as reading what is
    replayed. Raises `StoreUnavailable`.
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
    """Find out what a replay from `start` would do. It only reads rows, and the log up to what the service has settled.

    It keeps a number in memory for each stream that it reads. Raises `NothingToReplay`, `StoreUnavailable`,
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

    undone = waiting | again
    known = await _count(store, service, found, state, undone, never_given)
    async with database.reading() as connection:
        claims = await claims_at(connection, service.name, log_id, {position for position, _ in undone})
    found.forged = await contradicted(store, claims, known)
    found.unknown_authors = await unknown_authors(store, service, start.before)
    return found


async def _count(
    store: EventStore,
    service: Declaration,
    found: Plan,
    state: _State,
    undone: set[tuple[int, str]],
    never_given: Callable[[str, int, int], bool],
) -> dict[int, Genuine]:
    """Return what the log has at the positions of what is undone."""
    at, known = {position for position, _ in undone}, dict[int, Genuine]()
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
        # If the replay begins with the log, every stream must begin with version 0.
        expected = versions.get(event.stream, 0 if found.start.before < 0 else event.version)
        if event.version > expected:
            found.missing += event.version - expected
            lacking[event.stream] = None
        versions[event.stream] = event.version + 1
        marks.discard(event.position)
        if event.position in at:
            known[event.position] = genuine(event)
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
    # A watermark above the start names an event that was handled. If it was removed, no later event of its stream may
    # show that.
    found.missing = max(found.missing, len(marks))
    found.missing_streams = list(lacking)[:NAMED]
    found.shares = list(shares.values())
    return known


@again_when_contended
async def send_back(database: Database, service: Declaration, log: UUID, start: Start) -> None:
    """Send the service back. This is durable when the function returns; the service begins within seconds if it runs.

    Raises `NothingToReplay`, and `DatabaseUnavailable`, after which `plan` shows whether it was done.
    """
    own, before = _Own(service.name, log), start.before
    async with database.turn, commanding(database) as connection:
        await lock_service(connection, service.name, log)
        await connection.execute(
            watermarks.update().where(*own.of(watermarks)).values(replays=watermarks.c.replays + 1)
        )
        state = await own.state(connection, locked=True)
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
        await lower(connection, service.name, log, before)
        await sent_back(connection, service, log, before, _run_again(service))
        await _revive(connection, own, before, _run_again(service))


async def _revive(connection: AsyncConnection, own: _Own, before: int, names: Sequence[str]) -> None:
    """Turn dead letters into held events: retention may have removed their events from the log."""
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
    """How far a service is, or was before a replay that is under way."""

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

    async def state(self, connection: AsyncConnection, *, locked: bool = False) -> _State:
        marks = await connection.execute(
            sa.select(watermarks.c.bucket, watermarks.c.position).where(*self.of(watermarks))
        )
        parts = sa.select(floors).where(*self.of(floors))
        ranges = await connection.execute(parts.with_for_update() if locked else parts)
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
