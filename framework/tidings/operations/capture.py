"""What a service's handlers could see when they were given one event, read from log and database. It only reads.

Nothing records which streams a handler has read. What is known: the repositories that its code uses, and the values in
the event. If such a value is the id of a stream in one of these repositories, the handler has or could have read that
stream. The rows of the service's own tables come from earlier events of the partition key, so those are read, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal
from uuid import UUID

import sqlalchemy as sa

from tidings._support.json_limits import parse
from tidings.database.engine import Database
from tidings.database.tables import dead, held
from tidings.errors import StreamDeleted, StreamNotFound, TidingsError
from tidings.modelling.handlers import Handler
from tidings.modelling.repository import Repository
from tidings.operations.lookup import Lookup, OnProgress, Target
from tidings.operations.timeline import Standing, Timeline, TracedEvent, trace
from tidings.protocol.position import carried, partition_key
from tidings.stores import EventStore, Filter, RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["Captured", "NotCapturable", "Run", "capture", "repositories_of"]

BACK: Final = 100_000
"""Events before the event, of the service's types, in which to look for its partition key."""
VALUES: Final = 50
"""Values of an event to try as ids of streams."""
LONGEST: Final = 1000
"""Events to keep of a stream or a partition key: the newest."""

State = Literal["held", "dead", "settled", "pending"]


class NotCapturable(TidingsError):
    """The event was not given to any handler whose run a test could repeat."""


@dataclass(frozen=True, slots=True)
class Run:
    """One handler's run for the event."""

    handler: Handler
    state: State
    reason: str = ""
    died_at: datetime | None = None
    emitted: tuple[RecordedEvent, ...] = ()
    """Events that it emitted, and events of aggregates that it changed, in the order of the log."""
    detail: str = ""
    """The traceback of its last attempt, if that failed."""

    @property
    def failed(self) -> bool:
        return self.state in ("held", "dead")


@dataclass(slots=True)
class Captured:
    """One event, and what its handlers could see."""

    service: Declaration
    event: RecordedEvent
    runs: list[Run]
    repositories: list[Repository[Any]]
    causes: list[RecordedEvent] = field(default_factory=list)
    """Its cause, the cause of that, and so on; the first cause comes first."""
    unknown_cause: str | None = None
    read: list[RecordedEvent] = field(default_factory=list)
    """Events of the streams that the handlers have read, in the order of the log."""
    earlier: list[RecordedEvent] = field(default_factory=list)
    """Earlier events of its partition key that the service handles, in the order of the log."""
    failed: frozenset[int] = frozenset()
    """Positions of events of its partition key that are held or dead in the service."""
    left_out: list[str] = field(default_factory=list)
    """What was left out because there is too much of it, in words."""


async def capture(
    store: EventStore,
    services: Sequence[tuple[Declaration, Database | None]],
    target: Target,
    *,
    progress: OnProgress = lambda events, position, end: None,
) -> Captured:
    """Read what one event's handlers could see, in the service in which the event failed.

    If it failed in none of them, take the only service that handles it. Raises `NotCapturable`, and what `trace`
    raises.
    """
    timeline = await trace(store, services, target, progress=progress)
    traced = timeline.event
    if traced.position is None:
        raise NotCapturable(
            f"event {traced.event_id} is not in the log, so no handler was given it: {traced.waiting}. Capture "
            f"the event that caused it: 'tidings why {traced.event_id}' names it"
        )
    service, standings = _where(traced, [service for service, _ in services])
    event = await _recorded(store, traced, progress)
    if service.view(event.type) is None:
        raise NotCapturable(
            f"service {service.name!r} declares no class for {event.type!r}, so no test can state the event "
            f"{_place(event)}. Declare a class with that wire name, and a handler of it"
        )
    runs = [_run(handler, standings) for handler in service.handlers_of(event.type) if handler.events]
    if any(run.failed for run in runs):
        runs = [run for run in runs if run.failed]
    repositories = _unique([found for run in runs for found in repositories_of(run.handler.function)])
    captured = Captured(service, event, runs, repositories, unknown_cause=timeline.unknown_cause)
    captured.causes = [await _recorded(store, cause, progress) for cause in timeline.causes]
    captured.runs = [await _with_emitted(store, captured, run, timeline, progress) for run in runs]
    await _read_streams(store, captured)
    await _read_earlier(store, captured)
    database = next(database for one, database in services if one is service)
    if database is not None:
        await _leave_out_failed(database, captured, await store.log_id())
        captured.runs = [await _with_detail(database, captured, run, await store.log_id()) for run in captured.runs]
    return captured


# ---- which service, which handlers ---------------------------------------------------


def _where(traced: TracedEvent, services: Sequence[Declaration]) -> tuple[Declaration, list[Standing]]:
    by_name = {service.name: service for service in services}
    given = [one for one in traced.services if one.state not in ("not handled here", "not carried")]
    failed = [one for one in given if one.state in ("held", "dead")]
    names = list(dict.fromkeys(one.service for one in failed or given))
    if len(names) == 1:
        return by_name[names[0]], [one for one in given if one.service == names[0]]
    if not names:
        raise NotCapturable(
            f"none of the services {', '.join(by_name)} handles {traced.type!r}, so there is no handler to test "
            f"with event {traced.event_id}. Name the one that does: --service MODULE:SERVICE"
        )
    how = "failed in" if failed else "is handled by"
    raise NotCapturable(f"event {traced.event_id} {how} several services: say --service with one of {', '.join(names)}")


def _run(handler: Handler, standings: Sequence[Standing]) -> Run:
    for one in standings:
        if one.handler in (handler.name, *handler.was) and (one.state == "held" or one.state == "dead"):
            # An event without attempts waits behind another one of its key, or an operator has ordered a retry.
            return Run(handler, one.state if one.attempts else "pending", one.reason, one.died_at)
    return Run(handler, "pending" if any(one.state == "pending" for one in standings) else "settled")


async def _with_emitted(
    store: EventStore, captured: Captured, run: Run, timeline: Timeline, progress: OnProgress
) -> Run:
    names = {f"{captured.service.name}.{name}" for name in run.handler.names}
    mine = [one for one in timeline.event.caused if one.handler in names and one.position is not None]
    emitted = [await _recorded(store, one, progress) for one in mine]
    return Run(run.handler, run.state, run.reason, run.died_at, tuple(emitted))


async def _with_detail(database: Database, captured: Captured, run: Run, log: UUID) -> Run:
    if not run.failed:
        return run
    table = dead if run.state == "dead" else held
    mine = (table.c.service == captured.service.name, table.c.log == str(log), table.c.handler.in_(run.handler.names))
    async with database.reading() as connection:
        found = await connection.scalar(
            sa.select(table.c.detail).where(*mine, table.c.position == captured.event.position).limit(1)
        )
    return replace(run, detail=found or "")


# ---- what it could read --------------------------------------------------------------


async def _read_streams(store: EventStore, captured: Captured) -> None:
    event = captured.event
    failed = any(run.failed for run in captured.runs)
    deaths = [run.died_at for run in captured.runs if run.died_at is not None]
    moment = max(deaths) if deaths and all(run.state == "dead" for run in captured.runs) else None
    own = {emitted.position for run in captured.runs for emitted in run.emitted}
    found: dict[int, RecordedEvent] = {}
    for stream in dict.fromkeys((event.stream, *_streams(captured))):
        kept: list[RecordedEvent] = []
        with suppress(StreamNotFound, StreamDeleted):
            async for one in store.read_stream(stream, backwards=True, limit=LONGEST + len(own) + 1):
                # A failed attempt came after the event, and has read what was there at that time.
                late = one.position >= event.position if not failed or stream == event.stream else False
                late = late or one.position == event.position
                if late or one.position in own or (moment is not None and one.recorded_at > moment):
                    continue
                kept.append(one)
        if len(kept) > LONGEST:
            captured.left_out.append(f"the first events of stream {stream}")
        found |= {one.position: one for one in kept[:LONGEST]}
    captured.read = [found[position] for position in sorted(found)]


def _streams(captured: Captured) -> Iterator[str]:
    """Yield names of streams that handlers may have read."""
    for value in _values(captured.event):
        for repository in captured.repositories:
            yield repository.stream_of(value)


def _values(event: RecordedEvent) -> list[str]:
    """Return the values of an event that may be ids: its partition key, then its strings and whole numbers."""
    try:
        document = parse(event.data)
    except ValueError:
        document = None
    found = [partition_key(event)]
    waiting = [document]
    while waiting and len(found) < VALUES * 4:
        value = waiting.pop(0)
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str | int) and not isinstance(value, bool) and str(value):
            found.append(str(value))
    return list(dict.fromkeys(found))[:VALUES]


async def _read_earlier(store: EventStore, captured: Captured) -> None:
    """Read the earlier events of the partition key, the newest first, up to `LONGEST` events or `BACK` looked at."""
    event, service = captured.event, captured.service
    key, found, looked = partition_key(event), list[RecordedEvent](), 0
    types = tuple(name for name, handlers in service.handlers.items() if handlers)
    async for one in store.read_all(backwards=True, filter=Filter(types=types)):
        if one.position >= event.position:
            continue
        looked += 1
        if looked > BACK or len(found) == LONGEST:
            captured.left_out.append(f"events of partition key {key} below position {one.position}")
            break
        if carried(one) is not None and partition_key(one) == key:
            found.append(one)
    captured.earlier = found[::-1]


async def _leave_out_failed(database: Database, captured: Captured, log: UUID) -> None:
    """Leave out earlier events that are held or dead in the service: they had no effects."""
    service = captured.service.name
    failed: set[int] = set()
    async with database.reading() as connection:
        for table in (dead, held):
            query = sa.select(table.c.position).where(table.c.service == service, table.c.log == str(log))
            failed |= set(await connection.scalars(query.where(table.c.key == partition_key(captured.event))))
    captured.earlier = [event for event in captured.earlier if event.position not in failed]
    captured.failed = frozenset(failed)


async def _recorded(store: EventStore, traced: TracedEvent, progress: OnProgress) -> RecordedEvent:
    """Read a timeline's event with its data. Raises `NotCapturable` if retention has removed it."""
    assert traced.version is not None
    with suppress(StreamNotFound, StreamDeleted):
        async for event in store.read_stream(traced.stream, start=traced.version, limit=1):
            if str(event.id) == traced.event_id:
                return event
    assert traced.position is not None
    # The stream hides it, but the log may still show it.
    found = await Lookup(store, (), await store.log_id(), progress).at(traced.position)
    if found is not None:
        return found
    raise NotCapturable(
        f"event {traced.event_id} at {traced.stream}@{traced.version} is not in the log any more: retention "
        "has removed it"
    )


def _place(event: RecordedEvent) -> str:
    return f"{event.stream}@{event.version}, position {event.position}"


# ---- which repositories its code uses ------------------------------------------------


def repositories_of(function: Callable[..., Any]) -> list[Repository[Any]]:
    """Return the repositories that a handler uses, itself or through functions of its own package."""
    found: list[Repository[Any]] = []
    seen: set[int] = set()
    waiting: list[Any] = [function]
    home = str(getattr(_plain(function), "__module__", "")).partition(".")[0]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Repository):
            found.append(one)
            continue
        body = _plain(one)
        if not inspect.isfunction(body):
            if callable(one) and not isinstance(one, type):
                waiting += [*getattr(one, "__dict__", {}).values(), type(one).__call__]
            continue
        if str(body.__module__).partition(".")[0] == home:
            waiting += _named(body.__code__, body.__globals__)
            waiting += [cell.cell_contents for cell in body.__closure__ or () if _is_filled(cell)]
    return _unique(found)


def _named(code: CodeType, variables: dict[str, Any]) -> Iterator[Any]:
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named(constant, variables)
    for name in names:
        value = variables.get(name)
        if isinstance(value, ModuleType):
            members = (getattr(value, other, None) for other in names)
            yield from (member for member in members if isinstance(member, Repository) or inspect.isfunction(member))
        elif isinstance(value, Repository) or inspect.isfunction(value):
            yield value


def _plain(function: Any) -> Any:
    while hasattr(function, "func"):
        function = function.func
    return inspect.unwrap(getattr(function, "__func__", function)) if callable(function) else function


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _unique(repositories: Sequence[Repository[Any]]) -> list[Repository[Any]]:
    return list({id(one): one for one in repositories}.values())
