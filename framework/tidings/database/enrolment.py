"""Which handlers a bucket range gives its events to, in the service's database: who is new, who left, who is behind.

Each range remembers the handlers of the process that was at work on it last. A process that takes over compares them
with its own, bucket by bucket: a handler that left is behind from there on; one that comes back goes on from there; a
new one begins where it was declared to (`since`). What a handler is behind, `delivery.catchup` gives it. So a deploy, a
rollback, and two versions of a service side by side lose nothing and do nothing twice. No handler is run here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.tables import dead, floors, handlers, held, partials, partitions, spans, watermarks
from tidings.errors import Fenced
from tidings.modelling.events import wire_name
from tidings.modelling.roster import BEHIND, PAST, SKIPPED, Span, successors, under_one_name

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration
    from tidings.modelling.handlers import Handler

__all__ = [
    "Begun",
    "Enrolled",
    "Enrolment",
    "Record",
    "by_present_name",
    "enrol",
    "names_of",
    "read_records",
    "sent_back",
    "wanted",
]

log = structlog.get_logger("tidings.enrolment")


class Begun(NamedTuple):
    """How a handler began in a range."""

    since: int | None
    """The position after which it was to begin; None for one that began with what came next."""
    after: int = -1
    """It is given the events above this position, when they come."""
    first_of: Sequence[str] = ()
    """Wire names of the events whose first handler it was, sorted."""
    was: Sequence[str] = ()


Since = Mapping[str, Begun]


@dataclass(slots=True)
class Enrolled:
    """What a process that has taken over a range knows of its handlers."""

    after: dict[str, int] = field(default_factory=dict)
    """Handlers that are given events above a position only."""
    spans: list[Span] = field(default_factory=list)
    """What its handlers are behind, or were not given."""
    changed: bool = False
    """Another version of the service was at work before: whatever it still has under way can be committed no more."""


class Record(NamedTuple):
    """A handler that has been at work in a service."""

    handler: str
    since: int
    """What the service had settled up to this position was not given to it; -1 for one that has been there always."""
    seen_at: datetime


def by_present_name(noted: Mapping[str, Begun], handlers: Iterable[Handler]) -> dict[str, Begun]:
    """Return what is noted of handlers, with those that the code has under another name under their present one."""
    now = successors({name: begun.was for name, begun in noted.items()}, handlers)
    others = {now.get(name, name): begun for name, begun in noted.items()}
    return others | {name: begun for name, begun in noted.items() if now.get(name, name) == name}


def names_of(handler: Handler, noted: Mapping[str, Begun], handlers: Iterable[Handler]) -> frozenset[str]:
    """Return all names of a handler: those that it declares, and those of the version that was at work before."""
    now = successors({name: begun.was for name, begun in noted.items()}, handlers)
    return handler.names.union(name for name in noted if now.get(name) == handler.name)


def wanted(handler: Handler) -> int | None:
    """The position after which it wants events; None for whatever comes next."""
    if handler.since == "start":
        return -1
    return int(handler.since) - 1 if isinstance(handler.since, int) else None


async def read_records(connection: AsyncConnection, service: str, log_id: UUID) -> dict[str, Record]:
    """Every handler that has been at work in the service, by name."""
    columns = (handlers.c.handler, handlers.c.since, handlers.c.seen_at)
    of_log = (handlers.c.service == service, handlers.c.log == str(log_id))
    rows = await connection.execute(sa.select(*columns).where(*of_log))
    return {row.handler: Record(*row) for row in rows}


async def enrol(connection: AsyncConnection, service: Declaration, log_id: UUID, buckets: range) -> Enrolled:
    """Have the service's handlers be those of the range from now on; the process has taken it over."""
    return await Enrolment(connection, service, log_id, buckets).run()


class Enrolment:
    """One range, in the transaction of one process that takes it over."""

    def __init__(self, connection: AsyncConnection, service: Declaration, log_id: UUID, buckets: range) -> None:
        self._connection = connection
        self._service = service
        self._buckets = buckets
        self._log_id = log_id
        self._own: dict[str, Any] = {"service": service.name, "log": str(log_id)}

    async def run(self) -> Enrolled:
        of_range = (floors.c.first_bucket == self._buckets.start, floors.c.last_bucket == self._buckets.stop - 1)
        this = (*self._of(floors), *of_range)
        found = sa.select(floors.c.handlers).where(*this)
        row = (await self._connection.execute(found)).one_or_none()
        if row is None:
            raise Fenced(f"service {self._service.name!r} was resized, and this process has not heard of it yet")
        before: Since | None = None
        if row.handlers is not None:
            before = {name: Begun(*begun) for name, begun in json.loads(row.handlers).items()}
        if before is not None and self._is_unchanged(before):
            return Enrolled(_positions(before), await self._spans())
        # One range after the other: all note the same handlers.
        layout = sa.select(partitions.c.epoch).where(partitions.c.service == self._service.name)
        await self._connection.execute(layout.with_for_update())
        settled = await self._settled()
        since = await (self._begin(settled) if before is None else self._compare(before, settled))
        since = {
            name: begun._replace(first_of=sorted(self._service.named[name].first_of), was=self._service.named[name].was)
            for name, begun in since.items()
        }
        for handler in self._service.named.values():
            await self._set_lines(handler)
        text = json.dumps(since, sort_keys=True)
        await self._connection.execute(floors.update().where(*this).values(handlers=text))
        changed = before is not None or max(settled.values()) >= 0
        if changed:
            await self.fence()
        return Enrolled(_positions(since), await self._spans(), changed)

    async def fence(self) -> None:
        """Whoever was at work before, with another version of the service, can commit nothing any more."""
        marks = watermarks.update().where(*self._of(watermarks), self._in_range(watermarks))
        await self._connection.execute(marks.values(replays=watermarks.c.replays + 1))

    async def leave(self, name: str, settled: Mapping[int, int]) -> None:
        """The code does not have the handler any more: it is behind from here on, should it come back. In a bucket
        whose next event waits for other handlers only, this one is done with that event already."""
        part = (*self._of(partials), self._in_range(partials), partials.c.handler == name, ~partials.c.again)
        columns = (partials.c.bucket, sa.func.max(partials.c.position).label("position"))
        done = await self._connection.execute(sa.select(*columns).where(*part).group_by(partials.c.bucket))
        further = {row.bucket: row.position for row in done}
        await self._add(name, BEHIND, {at: max(position, further.get(at, -1)) for at, position in settled.items()})
        log.warning("handler.left", service=self._service.name, handler=name, advice="if it comes back, it goes on")

    def _is_unchanged(self, before: Since) -> bool:
        """The range gives to exactly these handlers, and none of them wants more of its past."""
        named = self._service.named
        return before.keys() == named.keys() and all(
            (frozenset(before[name].first_of), tuple(before[name].was)) == (handler.first_of, handler.was)
            and not _wants_more(handler, before)
            for name, handler in named.items()
        )

    async def _set_lines(self, handler: Handler) -> None:
        """What it held or gave up is in the line in which the code keeps the order now. Events of types that it does
        not handle any more stay where they are."""
        kinds = {wire_name(event) for event in handler.events}
        for table in (held, dead):
            its = (*self._of(table), self._in_range(table), table.c.handler == handler.name)
            further = table.c.type.in_(kinds - handler.first_of) if kinds else sa.true()
            for line, these in (("", table.c.type.in_(handler.first_of)), (handler.line, further)):
                moved = table.update().where(*its, these, table.c.line != line)
                await self._connection.execute(moved.values(line=line))

    async def _begin(self, settled: Mapping[int, int]) -> Since:
        """Nobody noted the range's handlers: it is new, or Tidings was older. No handler is known to be new."""
        since: dict[str, Begun] = {}
        for name, handler in self._service.named.items():
            after = wanted(handler)
            since[name] = Begun(after, -1 if after is None else after)
            await self._record(name, since[name].after)
            await self._skip(name, settled, since[name].after)
        return since

    async def _skip(self, name: str, buckets: Iterable[int], upto: int) -> None:
        if upto >= 0:
            await self._add(name, SKIPPED, dict.fromkeys(buckets, -1), dict.fromkeys(buckets, upto))

    async def _compare(self, before: Since, settled: Mapping[int, int]) -> Since:
        known = await read_records(self._connection, self._service.name, self._log_id)
        before = await self._rename(before, known)
        named = self._service.named
        for name in before.keys() - named.keys():
            await self.leave(name, settled)
        since: dict[str, Begun] = {}
        for name, handler in named.items():
            if name not in before:
                since[name] = await self._join(handler, settled)
            elif _wants_more(handler, before):
                since[name] = await self._add_past(handler, before[name])
            else:
                since[name] = before[name]
        return since

    async def _join(self, handler: Handler, settled: Mapping[int, int]) -> Begun:
        """The handler is not one of those that the range gave its events to. Where it is behind already, it goes on."""
        name, after = handler.name, wanted(handler)
        there = {row.bucket for row in await self._spans(name) if row.kind == BEHIND}
        fresh = {bucket: position for bucket, position in settled.items() if bucket not in there}
        highest = max(settled.values())
        told = {"service": self._service.name, "handler": name, "settled": highest}
        if there:
            log.warning("handler.came_back", **told, advice="it goes on where it left: 'tidings verify' says how far")
        if fresh and highest >= 0:
            if after is None:
                await self._add(name, SKIPPED, dict.fromkeys(fresh, -1), fresh)
                await self._record(name, highest)
            else:
                await self._add(name, BEHIND, {at: after for at, position in fresh.items() if position > after})
                await self._record(name, after)
            if not there:
                self._tell(handler, told, after)
        else:
            await self._record(name, -1 if after is None else after)
        begun = Begun(after, -1 if after is None else after)
        await self._skip(name, fresh, begun.after)
        return begun

    def _tell(self, handler: Handler, told: dict[str, Any], after: int | None) -> None:
        if after is not None:
            advice = "the past comes first: 'tidings verify' says how far it is"
        elif handler.since == "now":
            advice = "what the service had settled before is not given to it, as it was declared"
        else:
            advice = (
                "what the service had settled before is not given to it. If it is to have that, declare it with "
                "since='start' or since=POSITION, and start the service again; since='now' says that this is meant"
            )
        log.warning("handler.begins", **told, advice=advice)

    async def _add_past(self, handler: Handler, old: Begun) -> Begun:
        """What the handler was not given, and now wants, is its past. One past after the other."""
        after, rows = wanted(handler), await self._spans(handler.name)
        assert after is not None
        if any(row.kind == PAST for row in rows):
            return old
        missing = [row for row in rows if row.kind == SKIPPED and row.upto > after]
        await self._add(
            handler.name,
            PAST,
            {row.bucket: after for row in missing},
            {row.bucket: row.upto for row in missing},
        )
        this = (*self._of(spans), self._in_range(spans), spans.c.handler == handler.name, spans.c.kind == SKIPPED)
        await self._connection.execute(spans.delete().where(*this, spans.c.upto > after))
        await self._skip(handler.name, [row.bucket for row in missing], after)
        record = (*self._of(handlers), handlers.c.handler == handler.name, handlers.c.since > after)
        await self._connection.execute(handlers.update().where(*record).values(since=after))
        log.warning(
            "handler.past_added",
            service=self._service.name,
            handler=handler.name,
            after=after,
            advice="it is given what it had not, beside what comes, so not in the order of the log: 'tidings verify' "
            "says how far it is",
        )
        return old._replace(since=after)

    async def _rename(self, before: Since, known: Mapping[str, Record]) -> Since:
        """Whatever was noted under another name of a handler is noted under its present one. That is a former name, or
        when a deploy is rolled back, the one that the deploy gave it."""
        handlers = self._service.named.values()
        renames: dict[str, str] = {}
        for handler in handlers:
            names = names_of(handler, before, handlers)
            renames |= dict.fromkeys(names - {handler.name}, handler.name)
            if len(names) > 1:
                await self._unite(handler.name, names, before)
        for former, name in renames.items():
            for table in (held, partials, dead):
                this = (*self._of(table), self._in_range(table), table.c.handler == former)
                other = table.alias()
                # It may have the event under both names; an event is held, or done in part, once for a handler.
                twice = sa.exists().where(
                    other.c.service == table.c.service,
                    other.c.log == table.c.log,
                    other.c.position == table.c.position,
                    other.c.handler == name,
                )
                unique = () if table is dead else (~twice,)
                await self._connection.execute(table.update().where(*this, *unique).values(handler=name))
            if former in known:
                await self._record(name, known[former].since)
        return by_present_name(before, handlers)

    async def _unite(self, name: str, names: Collection[str], before: Since) -> None:
        """What was noted of the handler under several names is noted under one."""
        rows = [row for each in sorted(names) for row in await self._spans(each)]
        united = under_one_name(rows, name, [each for each in before if each in names])
        if sorted(rows) == sorted(united):
            return
        theirs = (*self._of(spans), self._in_range(spans), spans.c.handler.in_(names))
        await self._connection.execute(spans.delete().where(*theirs))
        if united:
            await self._connection.execute(spans.insert(), [self._own | row._asdict() for row in united])

    async def _record(self, name: str, since: int) -> None:
        known = (*self._of(handlers), handlers.c.handler == name)
        if await self._connection.scalar(sa.select(handlers.c.since).where(*known)) is None:
            row = self._own | {"handler": name, "since": since, "seen_at": datetime.now(UTC)}
            await self._connection.execute(handlers.insert().values(row))

    async def _add(self, name: str, kind: str, done: Mapping[int, int], upto: Mapping[int, int] | None = None) -> None:
        """Rows by bucket; where there is one of that kind already, it stays."""
        there = {row.bucket for row in await self._spans(name) if row.kind == kind}
        rows = [
            self._own
            | {"bucket": at, "handler": name, "kind": kind, "done": position, "upto": (upto or {}).get(at, -1)}
            for at, position in done.items()
            if at not in there
        ]
        if rows:
            await self._connection.execute(spans.insert(), rows)

    async def _settled(self) -> dict[int, int]:
        """Return how far each bucket of the range is. It stays so until the end of the transaction: what the version
        before has under way is waited for, and counts. What it begins afterwards is fenced."""
        columns = (watermarks.c.bucket, watermarks.c.position)
        of_range = sa.select(*columns).where(*self._of(watermarks), self._in_range(watermarks))
        # In the order in which groups move them. Whoever raises the floor has a lock on one of them, too.
        rows = (await self._connection.execute(of_range.order_by(watermarks.c.bucket).with_for_update())).all()
        first, last = floors.c.first_bucket == self._buckets.start, floors.c.last_bucket == self._buckets.stop - 1
        of_floor = sa.select(floors.c.position).where(*self._of(floors), first, last)
        floor = (await self._connection.execute(of_floor)).scalar_one()
        return dict.fromkeys(self._buckets, floor) | {row.bucket: max(row.position, floor) for row in rows}

    async def _spans(self, name: str | None = None) -> list[Span]:
        names = list(self._service.named) if name is None else [name]
        columns = [spans.c[column] for column in Span._fields]
        of_range = (*self._of(spans), self._in_range(spans), spans.c.handler.in_(names))
        return [Span(*row) for row in await self._connection.execute(sa.select(*columns).where(*of_range))]

    def _of(self, table: sa.Table) -> tuple[sa.ColumnElement[bool], ...]:
        return table.c.service == self._own["service"], table.c.log == self._own["log"]

    def _in_range(self, table: sa.Table) -> sa.ColumnElement[bool]:
        return table.c.bucket.between(self._buckets.start, self._buckets.stop - 1)


def _wants_more(handler: Handler, before: Since) -> bool:
    after, old = wanted(handler), before[handler.name].since
    return after is not None and (old is None or after < old)


def _positions(since: Since) -> dict[str, int]:
    return {name: begun.after for name, begun in since.items() if begun.after >= 0}


async def sent_back(
    connection: AsyncConnection, service: Declaration, log_id: UUID, before: int, names: Sequence[str]
) -> None:
    """A replay sends the service back to after `before`: these handlers are given everything from there on again, and
    what they had not been given for the first time."""
    of_log = (spans.c.service == service.name, spans.c.log == str(log_id), spans.c.handler.in_(names))
    await connection.execute(spans.delete().where(*of_log, spans.c.kind == PAST, spans.c.done >= before))
    await connection.execute(
        spans.update().where(*of_log, spans.c.kind == PAST, spans.c.upto > before).values(upto=before)
    )
    await connection.execute(
        spans.update().where(*of_log, spans.c.kind == BEHIND, spans.c.done > before).values(done=before)
    )
    wants = {name: wanted(handler) for name, handler in service.named.items()}
    filtered = [name for name, after in wants.items() if after is not None and after >= 0]
    given = (*of_log, spans.c.kind == SKIPPED, spans.c.handler.not_in(filtered))
    await connection.execute(spans.update().where(*given, spans.c.upto > before).values(upto=before))
    await connection.execute(spans.delete().where(*given, spans.c.upto < 0))
    ours = (partials.c.service == service.name, partials.c.log == str(log_id), partials.c.handler.in_(names))
    await connection.execute(partials.update().where(*ours, partials.c.position > before).values(again=True))
