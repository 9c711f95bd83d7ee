"""What became of one event: its causes, whether it was published, its state in each service, and what it caused.

It only reads. The store has no look-up by id: if no service keeps an event in a row, the log is read backwards until
it is found. What an event caused is found by reading the log once from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.engine import Database
from tidings.database.tables import dead, held, partials, staged
from tidings.errors import StoreError
from tidings.modelling.codec import CAUSATION, CORRELATION, read_metadata
from tidings.modelling.roster import Span
from tidings.operations.handlers import read_spans
from tidings.operations.lookup import EventNotFound, Lookup, OnProgress, Target, Waiting, waiting_rows
from tidings.operations.verify import Settled, settled_in
from tidings.protocol.position import CARRIED, carried
from tidings.relay.checkpoints import read_checkpoint
from tidings.stores import EventStore, RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["EventNotFound", "TracedEvent", "Standing", "Timeline", "trace"]

BACK: Final = 100_000
"""Events before an event in which to look for its cause: handlers emit soon after the cause."""
MOST: Final = 1000
"""Caused events to keep; more are only counted."""
LOOKS: Final = 3
"""Times, at most, to read the end of the log again until nothing new is there."""
_AT_ONCE: Final = 500
"""Positions in one query: below the number of parameters that databases allow."""


@dataclass(frozen=True, slots=True)
class Standing:
    """The state of an event in one service: for all of its handlers, or for one of them."""

    service: str
    state: Literal["settled", "held", "dead", "pending", "not given", "not handled here", "not carried"]
    """`not given`: it was settled before the handler began, and the handler did not ask for earlier events."""
    handler: str | None = None
    attempts: int = 0
    reason: str = ""
    due: float | None = None
    """When a held event runs next, in seconds since 1970."""
    letter: int | None = None
    """The id of a dead letter, for `tidings dead`."""
    died_at: datetime | None = None


@dataclass(slots=True)
class TracedEvent:
    """An event in the log; or one that a handler emitted and that is not in the log, and then has no position."""

    event_id: str
    type: str
    stream: str
    version: int | None
    position: int | None
    recorded_at: datetime | None
    correlation_id: str | None
    causation_id: str | None
    handler: str | None
    """The handler that emitted it, as `service.handler`."""
    bucket: int | None
    """None for events that are not carried to services: those of the store itself, and of Tidings."""
    depth: int = 0
    waiting: str | None = None
    """Why it is not in the log, and which service emitted it: it is staged, or the store refused it."""
    actor: str | None = None
    """Who wanted it, as the producer's metadata says."""
    principal: str | None = None
    """The authenticated sender of the request that led to it, as the producer's metadata says."""
    services: list[Standing] = field(default_factory=list)
    caused: list[TracedEvent] = field(default_factory=list)

    def tree(self) -> Iterable[TracedEvent]:
        """Yield everything that it caused, directly or not, each after its cause."""
        waiting = list(reversed(self.caused))
        while waiting:
            traced = waiting.pop()
            yield traced
            waiting += reversed(traced.caused)


@dataclass(slots=True)
class Timeline:
    """One event with its causes and effects, and the relay's checkpoint.

    `causes` begins with the first known one. `checkpoint` is None if it cannot be read; `wrong` says why.
    """

    event: TracedEvent
    causes: list[TracedEvent] = field(default_factory=list)
    unknown_cause: str | None = None
    """The id of a cause that was not found."""
    relay: str = "main"
    checkpoint: int | None = None
    wrong: str | None = None
    more: int = 0
    """Number of caused events that are not in the tree."""


async def trace(
    store: EventStore,
    services: Sequence[tuple[Declaration, Database | None]],
    target: Target,
    *,
    relay: str = "main",
    progress: OnProgress = lambda events, position, end: None,
) -> Timeline:
    """Find the timeline of an event, named by its id, its global position, or its stream and version.

    Finding it by stream and version is cheap; by position, at most half of the log is read. `progress` is told the
    events read, the position, and where reading ends. Raises `EventNotFound`, which says what was searched,
    `StreamNotFound`, `StreamDeleted`, `StoreUnavailable`, `DatabaseUnavailable`.
    """
    return await _Tracer(Lookup(store, services, await store.log_id(), progress)).run(target, relay)


class _Tracer:
    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._store = lookup.store

    async def run(self, target: Target, relay: str) -> Timeline:
        found = await self._lookup.find(target)
        if isinstance(found, Waiting):
            timeline = Timeline(_staged(found, 0), relay=relay)
            timeline.causes, timeline.unknown_cause = await self._causes_of_staged(found)
        else:
            event, timeline = found, Timeline(_recorded(found, 0), relay=relay)
            timeline.causes, timeline.unknown_cause = await self._causes(event.position, timeline.event.causation_id)
        await self._look(timeline)
        try:
            timeline.checkpoint = await read_checkpoint(self._store, relay)
        except StoreError as error:
            timeline.wrong = str(error)
        return timeline

    async def _look(self, timeline: Timeline) -> None:
        """Find what the event caused, and the state of all these events in each service.

        An event may be appended after the log was read and before the staged rows are. Neither has it then. So the end
        of the log is read again, and the rows, too, if there is something new.
        """
        after = timeline.event.position
        if after is None:
            await self._stand(timeline)
            return
        for look in range(LOOKS):
            upto, found = await self._children(timeline, after)
            if look and not found:
                return
            await self._stand(timeline)
            after = upto

    # ---- before it -------------------------------------------------------------------

    async def _causes(self, position: int, wanted: str | None) -> tuple[list[TracedEvent], str | None]:
        """Return the causes of the event at `position`, the first one first, and the id of one that is not found."""
        causes: list[TracedEvent] = []
        below = 0
        if wanted is not None:
            async for event in self._lookup.backwards(-1):
                if event.position >= position:
                    continue
                below += 1
                if str(event.id) == wanted:
                    causes.insert(0, _recorded(event, 0))
                    wanted, below = causes[0].causation_id, 0
                if wanted is None or below > BACK:
                    break
        return causes, wanted

    async def _causes_of_staged(self, found: Waiting) -> tuple[list[TracedEvent], str | None]:
        cause = await self._lookup.at(found.cause)
        if cause is None:
            return [], f"at position {found.cause}"
        traced = _recorded(cause, 0)
        causes, unknown = await self._causes(cause.position, traced.causation_id)
        return [*causes, traced], unknown

    # ---- behind it -------------------------------------------------------------------

    async def _children(self, timeline: Timeline, after: int) -> tuple[int, int]:
        """Add what was caused to the tree. Return the position up to which the log was read, and how many were found.

        The log is read once, because a cause comes before what it caused.
        """
        found = 0
        traced_events = [timeline.event, *timeline.event.tree()]
        known = {traced.event_id: traced for traced in traced_events if traced.position is not None}
        end = await self._store.head()
        async for event in self._store.read_all(after=after, filter=CARRIED):
            after = event.position
            self._lookup.read(event, end)
            if _CAUSATION not in event.metadata:
                continue
            cause = known.get(_cause_of(read_metadata(event)) or "")
            if cause is None:
                continue
            found += 1
            if len(known) > MOST:
                timeline.more += 1
                continue
            child = _recorded(event, cause.depth + 1)
            cause.caused.append(child)
            known.setdefault(child.event_id, child)
        return after, found

    # ---- in the services -------------------------------------------------------------

    async def _stand(self, timeline: Timeline) -> None:
        """Read the state of each event in each service, and add what is staged to the tree."""
        for traced in [timeline.event, *timeline.event.tree()]:
            traced.services = []
            traced.caused = [caused for caused in traced.caused if caused.position is not None]
        traced_events = [timeline.event, *timeline.event.tree()]
        at = {traced.position: traced for traced in traced_events if traced.position is not None}
        known = {traced.event_id for traced in traced_events}
        for service, database in self._lookup.services:
            settled, rows, late = Settled([], {}), dict[int, dict[str, Standing]](), list[Span]()
            done: set[tuple[int, str]] = set()
            if database is not None:
                async with database.reading() as connection:
                    for waiting in await self._emitted(connection, service.name, list(at)):
                        if str(waiting.row.event_id) not in known:
                            cause = at[waiting.cause]
                            cause.caused.append(_staged(waiting, cause.depth + 1))
                    rows = await self._kept(connection, service.name, list(at))
                    late = await read_spans(connection, service, self._lookup.log)
                    halves = sa.select(partials.c.position, partials.c.handler)
                    halves = halves.where(*self._lookup.own(partials, service.name))
                    done = {(row.position, row.handler) for row in await connection.execute(halves)}
                    settled, _ = await settled_in(connection, service.name, self._lookup.log)
            for position, traced in at.items():
                mine = [span for span in late if span.bucket == traced.bucket and span.covers(position)]
                kept = rows.get(position, {})
                traced.services += _standings(service, settled, traced, position, kept, mine, done)

    async def _emitted(self, connection: AsyncConnection, service: str, positions: Sequence[int]) -> list[Waiting]:
        found = []
        for chunk in _chunks(positions):
            for table, cause in ((staged, staged.c.cause), (dead, dead.c.position)):
                query = waiting_rows(table).where(*self._lookup.own(table, service), cause.in_(chunk))
                found += [Waiting(service, row.reason, row.cause, row) for row in await connection.execute(query)]
        return found

    async def _kept(
        self, connection: AsyncConnection, service: str, positions: Sequence[int]
    ) -> dict[int, dict[str, Standing]]:
        found: dict[int, dict[str, Standing]] = {}
        for chunk in _chunks(positions):
            letters = sa.select(dead).where(
                *self._lookup.own(dead, service), dead.c.kind == "handler", dead.c.position.in_(chunk)
            )
            for row in await connection.execute(letters):
                found.setdefault(row.position, {})[row.handler] = Standing(
                    service, "dead", row.handler, row.attempts, row.reason, None, row.id, row.died_at
                )
            late = sa.select(held).where(*self._lookup.own(held, service), held.c.position.in_(chunk))
            for row in await connection.execute(late):
                standing = Standing(service, "held", row.handler, row.attempts, row.reason, row.due)
                found.setdefault(row.position, {})[row.handler] = standing
        return found


_CAUSATION: Final = b'"' + CAUSATION.encode() + b'"'


def _standings(
    service: Declaration,
    settled: Settled,
    traced: TracedEvent,
    position: int,
    kept: dict[str, Standing],
    late: Sequence[Span],
    done: set[tuple[int, str]],
) -> list[Standing]:
    """Return a standing for each handler, or a single one if it is the same for all handlers.

    `kept` has the held and dead rows by handler, `late` what handlers are behind with or were not given. `done` has
    position and handler of events that a handler has done while others of the event have not.
    """
    bucket = traced.bucket
    if bucket is None:
        return [Standing(service.name, "not carried")]
    names = [handler.name for handler in service.handlers_of(traced.type)]
    if not names and not kept:
        return [Standing(service.name, "not handled here")]
    found = []
    for name in (*names, *(kept.keys() - set(names))):
        spans = [span for span in late if span.handler == name]
        state: Literal["settled", "pending", "not given"]
        if spans and any(not span.open for span in spans):
            state = "not given"
        elif not spans and (settled(bucket, position) or (position, name) in done):
            state = "settled"
        else:
            state = "pending"
        found.append(kept.get(name) or Standing(service.name, state, name))
    if len({standing.state for standing in found}) == 1 and found[0].state in ("settled", "pending"):
        return [Standing(service.name, found[0].state)]
    return found


def _chunks(positions: Sequence[int]) -> Iterable[Sequence[int]]:
    return (positions[at : at + _AT_ONCE] for at in range(0, len(positions), _AT_ONCE))


def _text(document: dict[str, Any], name: str) -> str | None:
    value = document.get(name)
    return value if isinstance(value, str) else None


def _cause_of(metadata: dict[str, Any]) -> str | None:
    """Return the cause's id in lower case, as `str(UUID)` writes it. Other writers may use upper case."""
    value = _text(metadata, CAUSATION)
    return value.lower() if value is not None else None


def _recorded(event: RecordedEvent, depth: int) -> TracedEvent:
    metadata = read_metadata(event)
    return TracedEvent(
        str(event.id),
        event.type,
        event.stream,
        event.version,
        event.position,
        event.recorded_at,
        _text(metadata, CORRELATION),
        _cause_of(metadata),
        _text(metadata, "tidingsHandler"),
        carried(event),
        depth,
        actor=_text(metadata, "actor"),
        principal=_text(metadata, "principal"),
    )


def _staged(waiting: Waiting, depth: int) -> TracedEvent:
    row = waiting.row
    why = f"staged in {waiting.service}, not appended yet"
    if waiting.refused is not None:
        why = f"emitted in {waiting.service}, and refused by the store: {waiting.refused}"
    event = RecordedEvent(
        -1, row.stream, -1, row.type, row.data, row.metadata, row.is_json, UUID(row.event_id).bytes, 0
    )
    traced = _recorded(event, depth)
    traced.version = traced.position = traced.recorded_at = None
    traced.waiting = why
    return traced
