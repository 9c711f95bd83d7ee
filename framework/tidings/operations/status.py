"""What `tidings status` knows: log, relay and services as they stand, and what of it is unhealthy.

A log or a database that takes no writes looks well to whoever reads it. So where nothing shows that it does, a look
writes: one small event to the log, or a row of a database as it is.
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

from tidings.buses import EventBus, Found, Subscription
from tidings.delivery.owned import OwnStore
from tidings.errors import BusUnavailable, ConfigurationError, DatabaseUnavailable
from tidings.logs import masked
from tidings.operations.causes import SHARED, Part, explain
from tidings.operations.looking import existing_database, subscriptions_of
from tidings.operations.remedies import STORE_WRITABLE, writable, writes_refused
from tidings.protocol.position import CARRIED, carried
from tidings.relay.relay import Relay
from tidings.settings import Settings
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.database.presence import Process
    from tidings.modelling.declaration import Declaration
    from tidings.operations.report import FailingHandler, HandlerReport
    from tidings.operations.verify import ServiceReport

__all__ = ["LOOKED", "RelayState", "ServiceState", "State", "look"]

LOOKED: Final = 10_000
"""Events of the log that one look counts at most."""
QUIET: Final = 10.0
"""Seconds since the last event after which a look tries whether the log takes another one."""
SILENT: Final = 15.0
"""Seconds since a process last wrote its row after which its database may take no writes; one is due every 10 s."""
WRITE_SECONDS: Final = 12.0
"""Seconds that a trial write may take; a store adapter insists for 10."""
LATE: Final = 30.0
"""Seconds after which an event that waits is unhealthy."""


@dataclass(frozen=True, slots=True)
class RelayState:
    """How far a relay has published. `behind` counts events of the log after its checkpoint, `LOOKED` at most."""

    name: str
    checkpoint: int
    behind: int
    oldest_seconds: float | None
    """Age of the first event that is not published."""
    complete: bool = True
    """False when `LOOKED` ended the counting: there may be more behind."""


@dataclass(slots=True)
class ServiceState:
    """How far a service is. What its database or the bus would have to say, and cannot, is None."""

    service: str
    floor: int | None = None
    lag: int | None = None
    """Events above the floor that services receive; counted among `LOOKED` events."""
    oldest_seconds: float | None = None
    """Age of the first event that is pending."""
    pending: int | None = None
    """Events that its handlers have not done; counted among `LOOKED` events."""
    complete: bool = True
    """False when `LOOKED` ended the counting: there may be more pending."""
    held: int | None = None
    failing: list[FailingHandler] = field(default_factory=list)
    """What the held events failed in."""
    staged: int | None = None
    dead: int | None = None
    handlers: list[HandlerReport] = field(default_factory=list)
    """Handlers that are behind the service, or were not given all that it has settled."""
    queue: str = "unknown"
    """On the bus: missing, fits, differs (of several the worst); unknown where it cannot be seen from here."""
    ready: int | None = None
    """In all of its queues."""
    consumers: int | None = None
    """Consumers of the queue that has the fewest. Of a service's processes, RabbitMQ counts the one at work."""
    partitions: int = 1
    processes: list[Process] = field(default_factory=list)
    """Processes that were seen within a minute, with the code that each runs."""


@dataclass(slots=True)
class State:
    """One look. It is healthy when there are no `problems`, each of which is a cause, and says what to do."""

    log: UUID
    head: int
    relay: RelayState
    services: list[ServiceState] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    effects: dict[str, list[str]] = field(default_factory=dict)
    """Problem to what only follows from it."""


@dataclass(frozen=True, slots=True)
class _Problem:
    part: Part
    scope: str
    said: str


class _Found(list[_Problem]):
    """What is wrong, as it is found."""

    def say(self, part: Part, scope: str, said: str) -> None:
        self.append(_Problem(part, "" if part in SHARED else scope, said))

    def tell(self, state: State) -> None:
        """Each cause is a problem; what follows from it stands under it."""
        for cause, effects in explain(self):
            state.problems.append(cause.said)
            if effects:
                state.effects[cause.said] = [effect.said for effect in effects]


async def look(
    settings: Settings,
    store: EventStore,
    bus: EventBus,
    services: Mapping[str, Declaration],
    *,
    relay: str = "main",
    now: float | None = None,
) -> State:
    """`now` is seconds since 1970. Raises `StoreUnavailable`: without the log nothing can be said."""
    moment = time.time() if now is None else now
    wrong, store = _Found(), OwnStore.of(store)
    await _store_writes(store, moment, wrong)
    state = State(await store.log_id(), await store.head(), await _relay(store, bus, relay, moment))
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
        _queues(part, [found[each.queue] for each in parts if each.queue in found], target, wrong)
    wrong.tell(state)
    return state


async def _store_writes(store: OwnStore, now: float, wrong: _Found) -> None:
    """Whether the log takes appends: the last event says so, if it is new; else one of our own does."""
    async for event in store.read_all(backwards=True, limit=1):
        if _age(event.ticks, now) < QUIET:
            return
    error: str | None
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await store.probe_writes()
        error = store.writes.error
    except TimeoutError:
        error = f"an append was not answered within {WRITE_SECONDS:g} s"
    if error is not None:
        wrong.say(Part.STORE_WRITES, "", f"store: {masked(writes_refused(error))}; {STORE_WRITABLE}")


async def _database_writes(database: Database, name: str, wrong: _Found) -> None:
    if database.file is not None and not os.access(database.file, os.W_OK) and not _is_read_only(database.file):
        return  # this user may not write there: that says nothing of the service's
    with suppress(TimeoutError):
        async with asyncio.timeout(WRITE_SECONDS):
            await database.probe_writes()
    if database.writes.error is not None:
        said = f"{name}: its database takes no writes: {masked(database.writes.error)}"
        wrong.say(Part.DATABASE, name, f"{said}; {writable(database.file or database.shown)}")


def _is_read_only(file: str) -> bool:
    return bool(os.statvfs(file).f_flag & os.ST_RDONLY)


async def _relay(store: EventStore, bus: EventBus, name: str, now: float) -> RelayState:
    checkpoint = await Relay(store, bus, name=name).checkpoint()
    looked, behind, oldest = 0, 0, None
    async for event in store.read_all(after=checkpoint, filter=CARRIED, limit=LOOKED):
        looked += 1
        if carried(event) is not None:
            behind += 1
            oldest = _age(event.ticks, now) if oldest is None else oldest
    return RelayState(name, checkpoint, behind, oldest, complete=looked < LOOKED)


def _age(ticks: int, now: float) -> float:
    """Seconds since then. The store's clock may be ahead of this one."""
    return max(now - ticks / 1e7, 0.0)


def _judge_relay(state: State, settings: Settings, wrong: _Found) -> None:
    relay = state.relay
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
            f"{relay.oldest_seconds:.0f} s; {remedy}",
        )


async def _bus(
    settings: Settings, bus: EventBus, subscriptions: Sequence[Subscription], wrong: _Found
) -> Mapping[str, Found]:
    """By queue; nothing where the bus lives in another process, or cannot be reached."""
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
            wrong.say(Part.QUEUE, "", f"bus: exchange {exchange.name} is missing; {remedy}")
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
    wrong: _Found,
) -> None:
    from tidings.database.presence import present
    from tidings.operations.verify import verify

    async with AsyncExitStack() as stack:
        database: Database | None
        try:
            database = await stack.enter_async_context(existing_database(settings, service.name))
            report = await verify(store, [(service, database)], limit=LOOKED)
            if database is not None:
                part.processes = await present(database, service.name, now)
                wrote_lately = any(now - process.seen < SILENT for process in part.processes)
                # SQLite's one writer is not to be disturbed without need; elsewhere a look costs the service nothing.
                if not (wrote_lately and database.one_writer):
                    await _database_writes(database, service.name, wrong)
        except (DatabaseUnavailable, ConfigurationError) as error:
            wrong.say(Part.DATABASE, service.name, f"{service.name}: {error}")
            return
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
    _judge_service(view, report.complete, target, state.log, now, wrong)


def _judge_service(view: ServiceReport, complete: bool, target: str, log: UUID, now: float, wrong: _Found) -> None:
    name = view.service
    if view.other_log is not None:
        wrong.say(
            Part.PROCESS,
            name,
            f"{name}: its database follows log {view.other_log}, but TIDINGS_STORE holds log {log}: is "
            f"TIDINGS_STORE right? After a restore: tidings log adopt {target}",
        )
        return
    if not view.ran:
        wrong.say(Part.PROCESS, name, f"{name}: has never run on this log; tidings run {target}")
        return
    if view.beyond >= 0:
        wrong.say(
            Part.PROCESS,
            name,
            f"{name}: claims position {view.beyond}, which the log does not reach; was the log restored from a backup?",
        )
    late = _age(view.pending[0].ticks, now) if view.pending else 0.0
    if late > LATE:
        wrong.say(
            Part.PROGRESS,
            name,
            f"{name}: {_count(view.pending_count, complete)} events are pending, the oldest for {late:.0f} s; if the "
            f"number does not fall: is it running (tidings run {target})? Then its log says what holds it",
        )
    for failing in view.failing:
        for_ = "" if failing.since is None else f", the oldest for {max(now - failing.since, 0.0):.0f} s"
        wrong.say(
            Part.HELD,
            name,
            f"{name}: handler {failing.handler} failed at {failing.events} events, which are held{for_}; the next one: "
            f"{failing.reason}; tidings held list {target}",
        )
    overdue = now - view.held_due if view.held_due is not None else 0.0
    if overdue > LATE:
        wrong.say(
            Part.PROGRESS,
            name,
            f"{name}: of {view.held_count} held events the first was due {overdue:.0f} s ago, and nobody ran it; is it "
            f"running (tidings run {target})? Then its log says what holds it",
        )
    for handler in view.handlers:
        if handler.state == "to begin" and not handler.ok:
            for line in handler.lines(target):
                wrong.say(Part.PROCESS, name, f"{name}: {line}")
    if view.dead_count:
        wrong.say(Part.DEAD, name, f"{name}: {view.dead_count} dead letters; tidings dead list {target}")


_WORST: Final = ("missing", "differs", "fits")


def _queues(part: ServiceState, found: Sequence[Found], target: str, wrong: _Found) -> None:
    if not found:
        return
    part.queue = min((each.state for each in found), key=_WORST.index)
    part.ready = sum(each.messages or 0 for each in found) if part.queue != "missing" else None
    part.consumers = min(each.consumers or 0 for each in found) if part.queue != "missing" else None
    for each in found:
        if each.state == "missing":
            wrong.say(
                Part.QUEUE, part.service, f"{part.service}: queue {each.name} is missing; tidings run {target} makes it"
            )
        elif each.state == "differs":
            wrong.say(Part.QUEUE, part.service, f"{part.service}: {each.detail}")
        elif not each.consumers:
            wrong.say(  # its processes are not connected: the queue itself is well
                Part.CONNECTION,
                part.service,
                f"{part.service}: nobody consumes queue {each.name}; tidings run {target}",
            )


def _count(number: int, complete: bool) -> str:
    return str(number) if complete else f"{number} or more"
