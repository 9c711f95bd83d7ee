"""What `tidings status` shows: how far log, relay and services are, and what is unhealthy.

A log or a database that takes no writes looks healthy to a reader. So unless something else shows that it does, a look
tries a write: it appends one small event to the log, or writes a row of a database again as it is.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID

from sqlalchemy import make_url

from tidings._support.room import no_room
from tidings.buses import EventBus, Subscription, TopologyItem
from tidings.delivery.owned import OwnStore
from tidings.errors import BusUnavailable, ConfigurationError, DatabaseUnavailable
from tidings.logs import masked
from tidings.operations.causes import SHARED, Part, causes_of
from tidings.operations.looking import existing_database, subscriptions_of
from tidings.operations.remedies import STORE_WRITABLE, client_for, origin_of, writable, writes_refused
from tidings.protocol.position import CARRIED, carried
from tidings.relay.checkpoints import read_last
from tidings.settings import Settings
from tidings.stores import EventStore
from tidings.urls import redact

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.database.presence import Process
    from tidings.modelling.declaration import Declaration
    from tidings.operations.report import FailingHandler, HandlerReport
    from tidings.operations.verify import ServiceReport

__all__ = ["LOOKED", "RelayState", "ServiceState", "State", "look"]

LOOKED: Final = 10_000
"""Events of the log, at most, that one look counts."""
QUIET: Final = 10.0
"""Seconds since the last event after which a look tries to append one."""
SILENT: Final = 15.0
"""Seconds since a process last wrote its row after which a look tries to write. A process writes every 10 s."""
WRITE_SECONDS: Final = 12.0
"""Seconds that a trial write may take. A store adapter tries for 10 s."""
LOCKED: Final = "database is locked"
"""SQLite's error when another process holds the write lock."""
LATE: Final = 30.0
"""Seconds that an event may wait before that is unhealthy."""


@dataclass(frozen=True, slots=True)
class RelayState:
    """How far a relay has published. `behind` counts carried events after its checkpoint, at most `LOOKED`."""

    name: str
    checkpoint: int
    behind: int
    oldest_seconds: float | None
    """Age of the first unpublished event in seconds; None if there is none."""
    complete: bool = True
    """False if `LOOKED` ended the counting: there may be more."""
    refusing: str | None = None
    """Which queue refuses messages, and what to do, as the relay has last noted; None if none does."""


@dataclass(slots=True)
class ServiceState:
    """How far a service is. An attribute is None if the database or bus that would tell it does not answer."""

    service: str
    floor: int | None = None
    lag: int | None = None
    """Carried events above the floor, counted among `LOOKED` events."""
    oldest_seconds: float | None = None
    """Age of the first pending event in seconds; None if there is none."""
    pending: int | None = None
    """Events that its handlers have not done, counted among `LOOKED` events."""
    complete: bool = True
    """False if `LOOKED` ended the counting: more may be pending."""
    held: int | None = None
    failing: list[FailingHandler] = field(default_factory=list)
    """Handlers that the held events failed in."""
    staged: int | None = None
    dead: int | None = None
    handlers: list[HandlerReport] = field(default_factory=list)
    """Handlers that are behind, or were not given everything that the service has settled."""
    queue: str = "unknown"
    """Its queue on the bus: missing, differs, fits (of several, the worst); unknown if it cannot be seen from here."""
    ready: int | None = None
    """Messages in all of its queues that are ready to be delivered."""
    consumers: int | None = None
    """Consumers of the queue with the fewest. RabbitMQ counts only the process at work, not those standing by."""
    partitions: int = 1
    processes: list[Process] = field(default_factory=list)
    """Processes that were seen within a minute, with the version of the code that each runs."""

    @property
    def last_seen(self) -> Process | None:
        """The process that was seen last; None if none was seen within a minute."""
        return max(self.processes, key=lambda process: process.seen, default=None)


@dataclass(slots=True)
class State:
    """The result of one look. It is healthy if `problems` is empty; each problem is a cause and says what to do."""

    log: UUID
    head: int
    relay: RelayState
    services: list[ServiceState] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    effects: dict[str, list[str]] = field(default_factory=dict)
    """By problem: what only follows from it."""


@dataclass(frozen=True, slots=True)
class _Problem:
    part: Part
    scope: str
    what: str
    advice: str
    """What to do if this is a cause. If it only follows from a cause, mending the cause is enough."""
    origin: str = ""

    @property
    def said(self) -> str:
        return f"{self.what}; {self.advice}" if self.advice else self.what


class _Problems(list[_Problem]):
    """The problems found so far."""

    def say(self, part: Part, scope: str, what: str, *, advice: str = "", origin: str = "") -> None:
        self.append(_Problem(part, "" if part in SHARED else scope, what, advice, origin))

    def tell(self, state: State) -> None:
        """Write the problems to `state`: the causes, and under each what follows from it."""
        for cause, effects in causes_of(self):
            state.problems.append(cause.said)
            if effects:
                state.effects[cause.said] = [effect.what for effect in effects]


async def look(
    settings: Settings,
    store: EventStore,
    bus: EventBus,
    services: Mapping[str, Declaration],
    *,
    relay: str = "main",
    now: float | None = None,
) -> State:
    """Look at log, relay, bus and services, by target. `now` is seconds since 1970. Raises `StoreUnavailable`."""
    moment = time.time() if now is None else now
    wrong, store = _Problems(), OwnStore.of(store)
    await _store_writes(store, moment, wrong)
    state = State(await store.log_id(), await store.head(), await _relay(store, relay, moment))
    _judge_relay(state, settings, wrong)
    wanted: dict[str, list[Subscription]] = {}
    for target, service in services.items():
        part = ServiceState(service.name)
        state.services.append(part)
        await _service(settings, store, target, service, part, state, moment, wrong)
        wanted[target] = await subscriptions_of(settings, service)
    found = await _bus(settings, bus, [subscription for parts in wanted.values() for subscription in parts], wrong)
    for (target, parts), part in zip(wanted.items(), state.services, strict=True):
        part.partitions = len(parts)
        _queues(part, [found[each.queue] for each in parts if each.queue in found], target, moment, wrong)
    wrong.tell(state)
    return state


async def _store_writes(store: OwnStore, now: float, wrong: _Problems) -> None:
    """Add a problem if the log takes no appends: ask the file system, look for a recent event, else append one."""
    error = store.unwritable()
    if error is None:
        async for event in store.read_all(backwards=True, limit=1):
            if _age(event.ticks, now) < QUIET:
                return
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await store.probe_writes()
            error = store.writes.error
        except TimeoutError:
            error = f"an append was not answered within {WRITE_SECONDS:g} s"
    if error is not None:
        wrong.say(Part.STORE_WRITES, "", f"store: {masked(writes_refused(error))}", advice=STORE_WRITABLE)


async def _database_writes(database: Database) -> str | None:
    """Try a write, and return the database's error; None if the write succeeded."""
    if database.file is not None and not os.access(database.file, os.W_OK) and not _is_read_only(database.file):
        return None  # this user may not write there, but the service's user may
    with suppress(TimeoutError):
        async with asyncio.timeout(WRITE_SECONDS):
            await database.probe_writes()
    return database.writes.error or (no_room(database.file) if database.file else None)


async def _no_writes(
    error: str, place: str, settings: Settings, store: EventStore, service: Declaration, wrong: _Problems
) -> None:
    """Add a problem: the closed database takes no writes, or a handler of the service holds SQLite's write lock."""
    from tidings.operations.writer import find_holder

    name, holder = service.name, None
    if LOCKED in error and "://" not in place:
        holder = await find_holder(place, settings.database_of(name), store, service)
    if holder is None:
        url = make_url(settings.database_of(name))
        advice, origin = writable(place, client_for(url)), origin_of(url, place, error)
        what = f"{name}: its database takes no writes: {masked(error)}"
        wrong.say(Part.DATABASE, name, what, advice=advice, origin=origin)
        return
    advice = f"find out why it does not let go (its log; py-spy dump --pid {holder.pid}), or stop it: kill {holder.pid}"
    if holder.ours:
        advice = (
            "every other event of the service waits for that. The handler is cancelled when its timeout is over, and "
            f"the event is held after a few attempts; if nothing moves then: kill -9 {holder.pid}, and start it again"
        )
    wrong.say(Part.HANDLER if holder.ours else Part.DATABASE, name, f"{name}: {holder}", advice=advice)


def _is_read_only(file: str) -> bool:
    return bool(os.statvfs(file).f_flag & os.ST_RDONLY)


async def _relay(store: EventStore, name: str, now: float) -> RelayState:
    checkpoint, refusing = await read_last(store, name)
    looked, behind, oldest = 0, 0, None
    async for event in store.read_all(after=checkpoint, filter=CARRIED, limit=LOOKED):
        looked += 1
        if carried(event) is not None:
            behind += 1
            oldest = _age(event.ticks, now) if oldest is None else oldest
    return RelayState(name, checkpoint, behind, oldest, looked < LOOKED, refusing)


def _age(ticks: int, now: float) -> float:
    """Return the seconds since `ticks`, at least 0: the store's clock may be ahead of this one."""
    return max(now - ticks / 1e7, 0.0)


def _judge_relay(state: State, settings: Settings, wrong: _Problems) -> None:
    relay = state.relay
    if relay.refusing is not None:
        wrong.say(Part.QUEUE, "", f"relay {relay.name}: {masked(relay.refusing)}")
    if relay.oldest_seconds is not None and relay.oldest_seconds > LATE:
        remedy = (
            "with this bus it runs where the services do: tidings run, or tidings dev"
            if settings.embedded_bus
            else f"is one running? tidings relay --name {relay.name}"
        )
        wrong.say(
            Part.RELAY,
            "",
            f"relay {relay.name}: {_count(relay.behind, relay.complete)} events are not published, the oldest for "
            f"{relay.oldest_seconds:.0f} s",
            advice=remedy,
        )


async def _bus(
    settings: Settings, bus: EventBus, subscriptions: Sequence[Subscription], wrong: _Problems
) -> Mapping[str, TopologyItem]:
    """Return what the bus has, by queue; nothing if the bus is in another process or cannot be reached."""
    if settings.embedded_bus:
        return {}
    try:
        found = await bus.inspect(subscriptions)
    except BusUnavailable as error:
        wrong.say(Part.BUS, "", f"bus: {error}")
        return {}
    for exchange in found:
        if exchange.kind == "exchange" and exchange.state == "missing":
            remedy = "a relay or service makes it when it starts"
            wrong.say(Part.QUEUE, "", f"bus: exchange {exchange.name} is missing", advice=remedy)
        elif exchange.kind == "exchange" and exchange.state == "differs":
            wrong.say(Part.QUEUE, "", f"bus: {exchange.detail}")
    return {thing.name: thing for thing in found if thing.kind == "queue"}


async def _service(
    settings: Settings,
    store: EventStore,
    target: str,
    service: Declaration,
    part: ServiceState,
    state: State,
    now: float,
    wrong: _Problems,
) -> None:
    from tidings.database.presence import present
    from tidings.operations.verify import verify

    error, place = None, ""
    async with AsyncExitStack() as stack:
        database: Database | None
        try:
            database = await stack.enter_async_context(existing_database(settings, service.name))
            report = await verify(store, [(service, database)], limit=LOOKED)
            if database is not None:
                part.processes = await present(database, service.name, now)
                wrote_lately = any(now - process.seen < SILENT for process in part.processes)
                # Do not take SQLite's write lock without need. Other databases have several writers.
                if not (wrote_lately and database.one_writer):
                    error, place = await _database_writes(database), database.file or database.shown
        except (DatabaseUnavailable, ConfigurationError) as unavailable:
            url, said = settings.database_of(service.name), str(unavailable)
            origin = origin_of(make_url(url), redact(url), said) if isinstance(unavailable, DatabaseUnavailable) else ""
            wrong.say(Part.DATABASE, service.name, f"{service.name}: {said}", origin=origin)
            return
    if error is not None:
        await _no_writes(error, place, settings, store, service, wrong)
    view = report.services[0]
    part.complete, part.handlers = report.complete, view.handlers
    part.floor, part.lag, part.failing = view.floor, view.behind, view.failing
    part.oldest_seconds = _age(view.pending[0].ticks, now) if view.pending else None
    part.pending, part.held, part.staged, part.dead = (
        view.pending_count,
        view.held_count,
        view.staged_count,
        view.dead_count,
    )
    _judge_service(view, report.complete, target, part, state.log, now, wrong)


def _unknown(view: ServiceReport, target: str, log: UUID) -> tuple[str, str] | None:
    """Return why the service's database knows nothing of this log, and what to do; None if it does know it."""
    if view.other_log is not None:
        return (
            f"its database follows log {view.other_log}, but TIDINGS_STORE holds log {log}",
            f"is TIDINGS_STORE right? After a restore: tidings log adopt {target}",
        )
    if view.missing:
        advice = (
            "if it has run before, find its database first (TIDINGS_DATABASE; was the file moved?): with a new one it "
            f"does everything again. If it never has: tidings run {target}"
        )
        return "there is no database of it where the settings say", advice
    return None if view.ran else ("has never run on this log", f"tidings run {target}")


def _judge_service(
    view: ServiceReport, complete: bool, target: str, part: ServiceState, log: UUID, now: float, wrong: _Problems
) -> None:
    name, at_work = view.service, part.last_seen
    if (astray := _unknown(view, target, log)) is not None:
        what, advice = astray
        wrong.say(Part.PROCESS, name, f"{name}: {what}", advice=advice)
        return
    if view.beyond >= 0:
        wrong.say(
            Part.PROCESS,
            name,
            f"{name}: claims position {view.beyond}, which the log does not reach",
            advice="was the log restored from a backup? docs/restoring.md",
        )
    late = _age(view.pending[0].ticks, now) if view.pending else 0.0
    if late > LATE:
        wrong.say(
            Part.PROGRESS,
            name,
            f"{name}: {_count(view.pending_count, complete)} events are pending, the oldest for {late:.0f} s",
            advice=f"if the number does not fall: {_does_it_run(target, at_work)}",
        )
    for failing in view.failing:
        for_ = "" if failing.since is None else f", the oldest for {max(now - failing.since, 0.0):.0f} s"
        wrong.say(
            Part.HELD,
            name,
            f"{name}: handler {failing.handler} failed at {failing.events} events, which are held{for_}; the next one: "
            f"{failing.reason}",
            advice=f"tidings held list {target}",
        )
    overdue = now - view.held_due if view.held_due is not None else 0.0
    if overdue > LATE:
        wrong.say(
            Part.PROGRESS,
            name,
            f"{name}: of {view.held_count} held events the first was due {overdue:.0f} s ago",
            advice=f"if the number does not fall: {_does_it_run(target, at_work)}",
        )
    for handler in view.handlers:
        if handler.state == "to begin" and not handler.ok:
            for line in handler.lines(target):
                wrong.say(Part.PROCESS, name, f"{name}: {line}")
    if view.dead_count:
        wrong.say(
            Part.DEAD,
            name,
            f"{name}: {view.dead_count} dead letters",
            advice=f"tidings dead list {target}",
        )


def _does_it_run(target: str, at_work: Process | None) -> str:
    if at_work is None:
        return f"is it running (tidings run {target})? Then its log says what holds it"
    return f"the log of process {at_work.pid} on {at_work.host} says what holds it"


_WORST: Final = ("missing", "differs", "fits")


def _queues(part: ServiceState, found: Sequence[TopologyItem], target: str, now: float, wrong: _Problems) -> None:
    if not found:
        return
    part.queue = min((each.state for each in found), key=_WORST.index)
    part.ready = sum(each.messages or 0 for each in found) if part.queue != "missing" else None
    part.consumers = min(each.consumers or 0 for each in found) if part.queue != "missing" else None
    for each in found:
        if each.state == "missing":
            wrong.say(
                Part.QUEUE,
                part.service,
                f"{part.service}: queue {each.name} is missing",
                advice=f"tidings run {target} makes it",
            )
        elif each.state == "differs":
            wrong.say(Part.QUEUE, part.service, f"{part.service}: {each.detail}")
        elif not each.consumers:
            wrong.say(  # its processes are not connected: the queue itself is well
                Part.CONNECTION,
                part.service,
                f"{part.service}: nobody consumes queue {each.name}",
                advice=_why_nobody(part.last_seen, target, now),
            )


def _why_nobody(process: Process | None, target: str, now: float) -> str:
    if process is None:
        return f"tidings run {target}"
    return (
        f"process {process.pid} on {process.host} runs it, and wrote last {max(now - process.seen, 0.0):.0f} s ago: it "
        "connects again, or something in it blocks (its log: loop.blocked). Does its /live answer? If not: kill -9 "
        f"{process.pid}, and start it again"
    )


def _count(number: int, complete: bool) -> str:
    return str(number) if complete else f"{number} or more"
