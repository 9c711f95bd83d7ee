"""The handlers that a bucket range gives its events to: which are new, which have left, and which are behind.

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

from tidings.database.held_events import lock_held
from tidings.database.scope import Scope
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
    """Where a handler began in a range."""

    since: int | None
    """The position after which it was declared to begin; None where nothing was declared."""
    after: int = -1
    """The handler gets the events above this position as they come."""
    first_of: Sequence[str] = ()
    """Wire names of the event types whose first handler it is, sorted."""
    was: Sequence[str] = ()


Since = Mapping[str, Begun]


@dataclass(slots=True)
class Enrolled:
    """What a process that has taken over a range knows about its handlers."""

    after: dict[str, int] = field(default_factory=dict)
    """Handlers that get events above a position only, with this position."""
    spans: list[Span] = field(default_factory=list)
    """What its handlers are behind with, or were never given."""
    changed: bool = False
    """Whether another version of the service was at work before. It has been fenced: it can commit nothing any more."""


class Record(NamedTuple):
    """The record of a handler that has run in a service."""

    handler: str
    since: int
    """The handler was not given what the service had settled up to here; -1 for a handler from the beginning."""
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
    """Return the position after which the handler wants events; None for those that come next."""
    if handler.since == "start":
        return -1
    return int(handler.since) - 1 if isinstance(handler.since, int) else None


async def read_records(connection: AsyncConnection, service: str, log_id: UUID) -> dict[str, Record]:
    """Return every handler that has ever run in the service, by name."""
    columns = (handlers.c.handler, handlers.c.since, handlers.c.seen_at)
    of_log = (handlers.c.service == service, handlers.c.log == str(log_id))
    rows = await connection.execute(sa.select(*columns).where(*of_log))
    return {row.handler: Record(*row) for row in rows}


async def enrol(connection: AsyncConnection, service: Declaration, log_id: UUID, buckets: range) -> Enrolled:
    """Let the range give its events to the service's handlers from now on, after the process has taken it over."""
    return await Enrolment(connection, service, log_id, buckets).run()


class Enrolment:
    """The comparison of one range's handlers with those of the process that takes it over, in one transaction."""

    def __init__(self, connection: AsyncConnection, service: Declaration, log_id: UUID, buckets: range) -> None:
        self._connection = connection
        self._service = service
        self._scope = Scope(service.name, log_id, buckets)

    async def run(self) -> Enrolled:
        """Compare, write what has changed, and fence the version that was at work before."""
        this = self._scope.of_floor()
        found = sa.select(floors.c.handlers).where(*this)
        row = (await self._connection.execute(found)).one_or_none()
        if row is None:
            raise self._resized()
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
        if await self._failed_before():
            await lock_held(self._connection, *self._scope.in_range(held))
            for handler in self._service.named.values():
                await self._set_lines(handler)
        text = json.dumps(since, sort_keys=True)
        await self._connection.execute(floors.update().where(*this).values(handlers=text))
        changed = before is not None or max(settled.values()) >= 0
        if changed:
            await self.fence()
        return Enrolled(_positions(since), await self._spans(), changed)

    async def fence(self) -> None:
        """Fence every process that has joined before: it can commit nothing any more."""
        marks = watermarks.update().where(*self._scope.in_range(watermarks))
        await self._connection.execute(marks.values(replays=watermarks.c.replays + 1))

    async def leave(self, name: str, settled: Mapping[int, int]) -> None:
        """Note that the code has lost the handler, and that it is behind from here on if it comes back.

        In a bucket whose next event waits for other handlers only, it is done with that event already.
        """
        part = (*self._scope.in_range(partials), partials.c.handler == name, ~partials.c.again)
        columns = (partials.c.bucket, sa.func.max(partials.c.position).label("position"))
        done = await self._connection.execute(sa.select(*columns).where(*part).group_by(partials.c.bucket))
        further = {row.bucket: row.position for row in done}
        await self._add(name, BEHIND, {at: max(position, further.get(at, -1)) for at, position in settled.items()})
        log.warning("handler.left", service=self._service.name, handler=name, advice="if it comes back, it goes on")

    def _is_unchanged(self, before: Since) -> bool:
        """Return whether the range gives its events to exactly these handlers and none wants more of its past."""
        named = self._service.named
        return before.keys() == named.keys() and all(
            (frozenset(before[name].first_of), tuple(before[name].was)) == (handler.first_of, handler.was)
            and not _wants_more(handler, before)
            for name, handler in named.items()
        )

    async def _failed_before(self) -> bool:
        """Return whether anything is held or dead in the range."""
        there = [sa.exists().where(*self._scope.in_range(table)) for table in (held, dead)]
        return bool(await self._connection.scalar(sa.select(sa.or_(*there))))

    async def _set_lines(self, handler: Handler) -> None:
        """Move what the handler holds or gave up to the line in which the code keeps its order now. Events of types
        that it does not handle any more stay where they are."""
        kinds = {wire_name(event) for event in handler.events}
        for table in (held, dead):
            its = (*self._scope.in_range(table), table.c.handler == handler.name)
            further = table.c.type.in_(kinds - handler.first_of) if kinds else sa.true()
            for line, these in (("", table.c.type.in_(handler.first_of)), (handler.line, further)):
                moved = table.update().where(*its, these, table.c.line != line)
                await self._connection.execute(moved.values(line=line))

    async def _begin(self, settled: Mapping[int, int]) -> Since:
        """Note the handlers of a range without a note: it is new, or of an older Tidings. No handler counts as new."""
        since: dict[str, Begun] = {}
        for name, handler in self._service.named.items():
            after = wanted(handler)
            since[name] = Begun(after, -1 if after is None else after)
            await self._skip(name, settled, since[name].after)
        await self._record_all({name: begun.after for name, begun in since.items()})
        return since

    async def _skip(self, name: str, buckets: Iterable[int], upto: int) -> None:
        if upto >= 0:
            await self._add(name, SKIPPED, dict.fromkeys(buckets, -1), dict.fromkeys(buckets, upto))

    async def _compare(self, before: Since, settled: Mapping[int, int]) -> Since:
        known = await read_records(self._connection, self._service.name, self._scope.log)
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
        """Add a handler that the range did not give its events to. Where it is behind already, it goes on there."""
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
        """Give the handler, as its past, what it was not given before and wants now. There is one past at a time."""
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
        this = (*self._scope.in_range(spans), spans.c.handler == handler.name, spans.c.kind == SKIPPED)
        await self._connection.execute(spans.delete().where(*this, spans.c.upto > after))
        await self._skip(handler.name, [row.bucket for row in missing], after)
        record = (*self._scope.of_log(handlers), handlers.c.handler == handler.name, handlers.c.since > after)
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
        """Note under the present name of a handler what was noted under another: a former name or, when a deploy is
        rolled back, the name that the deploy gave it."""
        handlers = self._service.named.values()
        renames: dict[str, str] = {}
        for handler in handlers:
            names = names_of(handler, before, handlers)
            renames |= dict.fromkeys(names - {handler.name}, handler.name)
            if len(names) > 1:
                await self._unite(handler.name, names, before)
        for former, name in renames.items():
            for table in (held, partials, dead):
                this = (*self._scope.in_range(table), table.c.handler == former)
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
        """Note under one name what was noted of the handler under several."""
        rows = [row for each in sorted(names) for row in await self._spans(each)]
        united = under_one_name(rows, name, [each for each in before if each in names])
        if sorted(rows) == sorted(united):
            return
        theirs = (*self._scope.in_range(spans), spans.c.handler.in_(names))
        await self._connection.execute(spans.delete().where(*theirs))
        if united:
            await self._connection.execute(spans.insert(), [self._scope.own | row._asdict() for row in united])

    async def _record(self, name: str, since: int) -> None:
        await self._record_all({name: since})

    async def _record_all(self, since: Mapping[str, int]) -> None:
        """Note handlers that have never run in the service."""
        theirs = (*self._scope.of_log(handlers), handlers.c.handler.in_(list(since)))
        known = set(await self._connection.scalars(sa.select(handlers.c.handler).where(*theirs)))
        now = datetime.now(UTC)
        rows = [
            self._scope.own | {"handler": name, "since": at, "seen_at": now}
            for name, at in since.items()
            if name not in known
        ]
        if rows:
            await self._connection.execute(handlers.insert(), rows)

    async def _add(self, name: str, kind: str, done: Mapping[int, int], upto: Mapping[int, int] | None = None) -> None:
        """Add spans by bucket. Where there is one of that kind already, it stays."""
        there = {row.bucket for row in await self._spans(name) if row.kind == kind}
        rows = [
            self._scope.own
            | {"bucket": at, "handler": name, "kind": kind, "done": position, "upto": (upto or {}).get(at, -1)}
            for at, position in done.items()
            if at not in there
        ]
        if rows:
            await self._connection.execute(spans.insert(), rows)

    def _resized(self) -> Fenced:
        return Fenced(f"service {self._service.name!r} was resized, and this process has not heard of it yet")

    async def _settled(self) -> dict[int, int]:
        """Return how far each bucket of the range is. It stays so until the end of the transaction: what the version
        before has under way is waited for, and counts. What it begins afterwards is fenced."""
        columns = (watermarks.c.bucket, watermarks.c.position)
        of_range = sa.select(*columns).where(*self._scope.in_range(watermarks))
        # In the order in which groups move them. Whoever raises the floor has a lock on one of them, too.
        rows = (await self._connection.execute(of_range.order_by(watermarks.c.bucket).with_for_update())).all()
        of_floor = sa.select(floors.c.position).where(*self._scope.of_floor())
        floor = await self._connection.scalar(of_floor)
        if floor is None:  # between the first look and the first lock
            raise self._resized()
        return dict.fromkeys(self._scope.buckets, floor) | {row.bucket: max(row.position, floor) for row in rows}

    async def _spans(self, name: str | None = None) -> list[Span]:
        names = list(self._service.named) if name is None else [name]
        columns = [spans.c[column] for column in Span._fields]
        of_range = (*self._scope.in_range(spans), spans.c.handler.in_(names))
        return [Span(*row) for row in await self._connection.execute(sa.select(*columns).where(*of_range))]


def _wants_more(handler: Handler, before: Since) -> bool:
    after, old = wanted(handler), before[handler.name].since
    return after is not None and (old is None or after < old)


def _positions(since: Since) -> dict[str, int]:
    return {name: begun.after for name, begun in since.items() if begun.after >= 0}


async def sent_back(
    connection: AsyncConnection, service: Declaration, log_id: UUID, before: int, names: Sequence[str]
) -> None:
    """Set spans back for a replay of everything after `before`: these handlers get all of it again, and for the first
    time what they had never been given."""
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
