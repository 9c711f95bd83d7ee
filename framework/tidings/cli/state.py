"""What `tidings status` knows: log, relay and services as they stand, and what of it is unhealthy. It only reads."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID

from tidings.buses import EventBus, Found, Subscription
from tidings.cli.looking import existing_database, subscriptions_of
from tidings.errors import BusUnavailable, ConfigurationError, DatabaseUnavailable
from tidings.position import CARRIED, carried
from tidings.relay import Relay
from tidings.settings import Settings
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.database import Database
    from tidings.handler_report import HandlerReport
    from tidings.presence import Process
    from tidings.report import FailingHandler
    from tidings.service import Service
    from tidings.verify import ServiceReport

__all__ = ["LOOKED", "RelayState", "ServiceState", "State", "look"]

LOOKED: Final = 10_000
"""Events of the log that one look counts at most."""
LATE: Final = 30.0
"""Seconds after which an event that nobody has moved on is a reason to worry."""


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
    """Of the queue that has the fewest; of several processes of a service RabbitMQ counts only the one at work."""
    partitions: int = 1
    processes: list[Process] = field(default_factory=list)
    """Those that were seen within a minute, with the code that each runs."""


@dataclass(slots=True)
class State:
    """One look. It is healthy when there are no `problems`, each of which says what to do."""

    log: UUID
    head: int
    relay: RelayState
    services: list[ServiceState] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def look(
    settings: Settings,
    store: EventStore,
    bus: EventBus,
    services: Mapping[str, Service],
    *,
    relay: str = "main",
    now: float | None = None,
) -> State:
    """`now` is seconds since 1970. Raises `StoreUnavailable`: without the log nothing can be said."""
    moment = time.time() if now is None else now
    state = State(await store.log_id(), await store.head(), await _relay(store, bus, relay, moment))
    _judge_relay(state, settings)
    wanted: dict[str, list[Subscription]] = {}
    for target, service in services.items():
        part = ServiceState(service.name)
        state.services.append(part)
        await _service(settings, store, target, service, part, state, moment)
        wanted[target] = await subscriptions_of(settings, service)
    found = await _bus(settings, bus, [subscription for parts in wanted.values() for subscription in parts], state)
    for (target, parts), part in zip(wanted.items(), state.services, strict=True):
        part.partitions = len(parts)
        _queues(part, [found[each.queue] for each in parts if each.queue in found], target, state)
    return state


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


def _judge_relay(state: State, settings: Settings) -> None:
    relay = state.relay
    if relay.oldest_seconds is not None and relay.oldest_seconds > LATE:
        remedy = (
            "with this bus it runs where the services do: tidings run, or tidings dev"
            if settings.embedded_bus
            else f"is one running? tidings relay --name {relay.name}"
        )
        state.problems.append(
            f"relay {relay.name}: {_count(relay.behind, relay.complete)} events are not published, the oldest for "
            f"{relay.oldest_seconds:.0f} s; {remedy}"
        )


async def _bus(
    settings: Settings, bus: EventBus, subscriptions: Sequence[Subscription], state: State
) -> Mapping[str, Found]:
    """By queue; nothing where the bus lives in another process, or cannot be reached."""
    if settings.embedded_bus:
        return {}
    try:
        found = await bus.inspect(subscriptions)
    except BusUnavailable as error:
        state.problems.append(f"bus: {error}")
        return {}
    for exchange in found:
        if exchange.kind == "exchange" and exchange.state == "missing":
            remedy = "a relay or service makes it when it starts"
            state.problems.append(f"bus: exchange {exchange.name} is missing; {remedy}")
        elif exchange.kind == "exchange" and exchange.state == "differs":
            state.problems.append(f"bus: {exchange.detail}")
    return {thing.name: thing for thing in found if thing.kind == "queue"}


async def _service(
    settings: Settings, store: EventStore, target: str, service: Service, part: ServiceState, state: State, now: float
) -> None:
    from tidings.presence import present
    from tidings.verify import verify

    async with AsyncExitStack() as stack:
        database: Database | None
        try:
            database = await stack.enter_async_context(existing_database(settings, service.name))
            report = await verify(store, [(service, database)], limit=LOOKED)
            if database is not None:
                part.processes = await present(database, service.name, now)
        except (DatabaseUnavailable, ConfigurationError) as error:
            state.problems.append(f"{service.name}: {error}")
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
    _judge_service(view, report.complete, target, state, now)


def _judge_service(view: ServiceReport, complete: bool, target: str, state: State, now: float) -> None:
    name = view.service
    if view.other_log is not None:
        state.problems.append(
            f"{name}: its database follows log {view.other_log}, but TIDINGS_STORE holds log {state.log}: is "
            "TIDINGS_STORE right? If the log was restored or replaced on purpose, see 'tidings log --help'"
        )
        return
    if not view.ran:
        state.problems.append(f"{name}: has never run on this log; tidings run {target}")
        return
    if view.beyond >= 0:
        state.problems.append(
            f"{name}: claims position {view.beyond}, which the log does not reach; was the log restored from a backup?"
        )
    late = _age(view.pending[0].ticks, now) if view.pending else 0.0
    if late > LATE:
        state.problems.append(
            f"{name}: {_count(view.pending_count, complete)} events are pending, the oldest for {late:.0f} s; if the "
            f"number does not fall: is it running (tidings run {target})? Then its log says what holds it"
        )
    for failing in view.failing:
        for_ = "" if failing.since is None else f", the oldest for {max(now - failing.since, 0.0):.0f} s"
        state.problems.append(
            f"{name}: handler {failing.handler} failed at {failing.events} events, which are held{for_}; the next one: "
            f"{failing.reason}; tidings held list {target}"
        )
    overdue = now - view.held_due if view.held_due is not None else 0.0
    if overdue > LATE:
        state.problems.append(
            f"{name}: of {view.held_count} held events the first was due {overdue:.0f} s ago, and nobody ran it; is it "
            f"running (tidings run {target})? Then its log says what holds it"
        )
    for handler in view.handlers:
        if handler.state == "to begin" and not handler.ok:
            state.problems += [f"{name}: {line}" for line in handler.lines(target)]
    if view.dead_count:
        state.problems.append(f"{name}: {view.dead_count} dead letters; tidings dead list {target}")


_WORST: Final = ("missing", "differs", "fits")


def _queues(part: ServiceState, found: Sequence[Found], target: str, state: State) -> None:
    if not found:
        return
    part.queue = min((each.state for each in found), key=_WORST.index)
    part.ready = sum(each.messages or 0 for each in found) if part.queue != "missing" else None
    part.consumers = min(each.consumers or 0 for each in found) if part.queue != "missing" else None
    for each in found:
        if each.state == "missing":
            state.problems.append(f"{part.service}: queue {each.name} is missing; tidings run {target} makes it")
        elif each.state == "differs":
            state.problems.append(f"{part.service}: {each.detail}")
        elif not each.consumers:
            state.problems.append(f"{part.service}: nobody consumes queue {each.name}; tidings run {target}")


def _count(number: int, complete: bool) -> str:
    return str(number) if complete else f"{number} or more"
