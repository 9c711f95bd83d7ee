"""What is known of a process at this moment: asked of its services, relay, databases and store, and then judged.

It never shows a secret, and whoever asks often costs no more than somebody who asks twice a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import UUID

from tidings._support.room import no_room
from tidings.database.held_events import HeldCount
from tidings.delivery.owned import OwnStore
from tidings.errors import ConfigurationError, DatabaseUnavailable, LogBehind, LogChanged, StoreUnavailable
from tidings.hosting.answers import Health
from tidings.hosting.checks import is_overdue, is_still
from tidings.hosting.facts import Facts, RelayFacts, ServiceFacts, Standstill, Work
from tidings.hosting.health import judge_live, judge_ready
from tidings.logs import masked
from tidings.operations.remedies import client_for, origin_of
from tidings.protocol.position import CARRIED, carried
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.delivery.inflight import InFlight
    from tidings.hosting.hosted import Hosted
    from tidings.hosting.partition import Partition
    from tidings.hosting.running import RunningService
    from tidings.hosting.runtime import Runtime

__all__ = ["Probe"]

T = TypeVar("T")

ANSWER_SECONDS: Final = 2.0
"""Seconds that a database or store may take to answer; give probes that ask a timeout of 5 s."""
IDLE_SECONDS: Final = 10.0
"""Seconds without a write after which a probe writes, to learn whether that is possible."""
QUIET_SECONDS: Final = 30.0
"""Seconds without an append of anybody to a log on another machine after which a probe appends."""
FRESH_SECONDS: Final = 0.5
"""An answer is good for so long: whoever asks more often gets it again."""


class Probe:
    """Keeps what must be remembered between two looks. `runtime` is the process's, where the relay may run."""

    def __init__(
        self,
        services: tuple[Hosted, ...],
        runtime: Runtime | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._services = services
        self._runtime = runtime
        self._clock = clock
        self._progress: dict[str, Standstill] = {}
        self._turn = asyncio.Lock()
        self._probing = False
        self._last: tuple[float, Health] | None = None

    async def live(self) -> Health:
        """Asks nobody as long as something moves: that it answers says that the loop turns. Only before it says that a
        restart would help, it makes sure that database and store answer, which takes `ANSWER_SECONDS` at most."""
        return judge_live(Facts(tuple([await self._alive(service) for service in self._services])))

    async def _alive(self, service: Hosted) -> ServiceFacts:
        running, known = _state(service)
        if running is None or known or running.standing_by is not None or not running.partitions:
            work = _work(running.at_work()) if running is not None else ()
            return ServiceFacts(service.name, work=work, **known)
        now = self._clock()
        parts = tuple(self._still(part, running, now) for part in running.partitions)
        work = tuple(work for part in parts for work in part.work)
        if any(is_still(part) for part in parts) or any(map(is_overdue, work)):
            (_, database), (_, store) = await asyncio.gather(_answer(running.ranges()), _answer(running.store.head()))
            parts = tuple(replace(part, database=database, store=store) for part in parts)
        return ServiceFacts(
            service.name,
            work=work,
            consuming=running.consuming,
            partitions=parts,
            database=parts[0].database,
        )

    def _still(self, part: Partition, running: RunningService, now: float) -> ServiceFacts:
        """What tells whether anything moves."""
        facts = _condition(part, running)
        behind = facts.unsettled > 0 or facts.floor < facts.marker
        moves = self._of(f"{facts.name} moves")
        return replace(facts, still=moves.look(part.moves, behind=behind, now=now), work=_work(part.at_work()))

    async def ready(self) -> Health:
        """Asks the databases and the store, all at once, and then the store for what waits: no longer than
        `ANSWER_SECONDS` each time."""
        async with self._turn:
            if self._last is None or self._clock() - self._last[0] > FRESH_SECONDS:
                services = asyncio.gather(*(self._service(service) for service in self._services))
                relays, found = await asyncio.gather(self._relays(), services)
                facts = Facts(tuple(found), relays)
                self._last = self._clock(), judge_ready(facts)
            return self._last[1]

    async def _service(self, service: Hosted) -> ServiceFacts:
        from tidings.database.layout import lowest

        running, known = _state(service)
        if running is not None and not known and running.standing_by is not None:
            return await self._standby(service.name, running, running.standing_by)
        if running is None or known or not running.partitions:
            return ServiceFacts(service.name, **(known or {"starting": True}))
        await self._probe_writes(running)
        (ranges, database), (found, store), (held, _) = await asyncio.gather(
            _answer(running.ranges()), _answer(_identity(running.store)), _answer(running.held())
        )
        floors = {row.first: row.floor for row in ranges or ()}
        now = self._clock()
        parts = [self._partition(part, running, None if ranges is None else floors, now) for part in running.partitions]
        actives = {row.first: row.active for row in ranges or () if row.active != running.process}
        parts = [
            replace(found, elsewhere=actives.get(part.subscription.buckets.start))
            for found, part in zip(parts, running.partitions, strict=True)
        ]
        settled, waiting = lowest(ranges or ()), None
        log: str | None = None
        if found is not None:
            log, store = await _answer(_other_log(running, found, max(settled, running.floor)))
        if ranges is not None and found is not None and any(p.marker_age is None or p.stalled > 0 for p in parts):
            waiting, store = await _answer(_first_after(running.store, settled))
        parts = [replace(part, waiting_event=waiting) for part in parts]
        return replace(
            parts[0],
            name=service.name,
            consuming=running.consuming,
            paused=None if running.paused is None else masked(running.paused),
            bus_trouble=next((part.bus_trouble for part in parts if part.bus_trouble), None),
            all_paused=len(running.paused_handlers) >= len(service.named),
            held=_held(held or (), time.time()),
            settled=settled,
            taken=_masked(running.taken.told),
            database=database,
            database_origin=_origin(running, database),
            store=store,
            log=log,
            partitions=tuple(parts) if len(parts) > 1 else (),
        )

    async def _standby(self, name: str, running: RunningService, for_: str) -> ServiceFacts:
        """What is known of a service that stands by for another process."""
        (settled, database), (head, store) = await asyncio.gather(
            _answer(running.settled()), _answer(running.store.head())
        )
        waiting, stalled = None, 0.0
        if settled is not None and head is not None:
            waiting, store = await _answer(_first_after(running.store, settled))
            stalled = self._of(f"{name} settled").look(settled, behind=waiting is not None, now=self._clock())
        return ServiceFacts(
            name,
            standing_by=for_,
            settled=-1 if settled is None else settled,
            stalled=stalled,
            waiting_event=waiting,
            database=database,
            database_origin=_origin(running, database),
            store=store,
        )

    async def _probe_writes(self, running: RunningService) -> None:
        """Where nothing was written for a while, write something: a database that only reads, or a log whose last
        append failed, would else be noticed by the next event alone, or never be known to be well again."""
        database = running.database
        probing = [self._probe_store(running.store, well=running.consuming)]
        if time.monotonic() - database.writes.last_at > IDLE_SECONDS and running.consuming:
            probing.append(self._probe_database(database))
        await asyncio.gather(*probing)

    async def _probe_database(self, database: Database) -> None:
        await _answer(database.probe_writes())

    async def _probe_store(self, store: EventStore, *, well: bool) -> None:
        """Append after an append that failed; and to a log elsewhere if nothing else shows whether it takes appends:
        of all processes that ask, one does it each time, and the others find its event. `well`: whoever asks works."""
        if not isinstance(store, OwnStore) or self._probing:
            return
        self._probing = True
        try:
            if store.writes.error is not None:
                due = time.monotonic() - store.writes.last_at > IDLE_SECONDS
            else:
                due = well and not store.is_local and bool((await _answer(store.is_quiet(QUIET_SECONDS)))[0])
            if due:
                _, late = await _answer(store.probe_writes())
                if late is not None:
                    store.writes.failed(StoreUnavailable(f"an append was not answered within {ANSWER_SECONDS:g} s"))
        finally:
            self._probing = False

    def _partition(
        self, part: Partition, running: RunningService, floors: Mapping[int, int] | None, now: float
    ) -> ServiceFacts:
        """`floors` is what is committed, by first bucket; None where the database did not answer."""
        name = part.subscription.queue.removeprefix("tidings.")
        ours, others = self._of(f"{name} floor"), self._of(f"{name} settled")
        settled = -1 if floors is None else floors.get(part.subscription.buckets.start, -1)
        still = 0.0 if floors is None else others.look(settled, behind=True, now=now)
        facts = _condition(part, running)
        oldest = part.pipeline.oldest if part.pipeline else None
        at = part.floor if oldest is None else oldest.event.position
        return replace(
            facts,
            stalled=ours.look(at, behind=part.floor < part.marker or facts.unsettled > 0, now=now),
            work=_work(part.at_work()),
            settled=settled,
            others_idle=others.idle(now),
            others_still=still,
        )

    async def _relays(self) -> tuple[RelayFacts, ...]:
        runtime = self._runtime
        if runtime is None or not runtime.with_relay:
            return ()
        relay = runtime.relay
        if relay is None:
            return (RelayFacts(runtime.relay_name, started=False),)
        await self._probe_store(runtime.store, well=relay.leading)
        confirmed = relay.confirmed
        waiting, store = await _answer(_first_after(runtime.store, confirmed))
        stalled = self._of("relay").look(confirmed, behind=waiting is not None, now=self._clock())
        return (
            RelayFacts(
                relay.name,
                needed=relay.needed,
                leading=relay.leading,
                waiting=relay.waiting,
                marker_age=relay.marker_age,
                confirmed=confirmed,
                stalled=stalled,
                waiting_event=waiting,
                trouble=None if relay.trouble is None else masked(relay.trouble),
                trouble_is_the_stores=relay.trouble_is_the_stores,
                refusing=_masked(relay.refusals.told),
                store=store,
                store_writes=_no_appends(runtime.store),
            ),
        )

    def _of(self, name: str) -> Standstill:
        return self._progress.setdefault(name, Standstill())


def _no_appends(store: EventStore) -> str | None:
    """Why the log takes no appends, as its last one or its file system says."""
    if not isinstance(store, OwnStore):
        return None
    return _masked(store.writes.error or store.unwritable())


def _masked(text: str | None) -> str | None:
    return None if text is None else masked(text)


def _condition(part: Partition, running: RunningService) -> ServiceFacts:
    """What one partition knows of itself, without asking anybody."""
    pipeline, intake = part.pipeline, part.intake
    database = running.database
    unsettled = pipeline.unsettled if pipeline else 0
    oldest = pipeline.oldest if pipeline else None
    return ServiceFacts(
        part.subscription.queue.removeprefix("tidings."),
        consuming=part.consuming,
        healing=part.healing,
        marker_age=part.marker_age,
        marker=part.marker,
        floor=part.floor,
        database_writes=_masked(database.writes.error or (no_room(database.file) if database.file else None)),
        database_place=database.file or database.shown,
        database_client=client_for(database.engine.url),
        store_writes=_no_appends(running.store),
        bus_trouble=_masked(intake.pulse.trouble if intake else None),
        stranger=None if part.stranger is None else str(part.stranger),
        refused=_masked(part.refused),
        queue=part.subscription.queue,
        heard_age=part.heard_age,
        came_age=part.came_age,
        heard_upto=part.heard_upto,
        read_age=part.read_age,
        unsettled=unsettled,
        full=unsettled >= running.service.prefetch,
        oldest=None if oldest is None else _told(oldest),
        oldest_tried=running.failed_attempts(oldest) if oldest is not None else 0,
        resting=pipeline.resting if pipeline else 0,
    )


def _origin(running: RunningService, answered: str | None) -> str:
    """What the fault of its database, if it has one, has in common with those of others."""
    database = running.database
    error = answered or _masked(database.writes.error)
    return "" if error is None else origin_of(database.engine.url, database.shown, error)


def _told(item: InFlight) -> str:
    event = item.event
    return (
        f"event {event.id} ({event.type}, position {event.position}) of stream {event.stream!r}, for handler "
        f"{item.handler.name!r}"
    )


def _held(counts: Sequence[HeldCount], now: float) -> str | None:
    """How many events are held, since when, and what the handler that failed most says."""
    if not counts:
        return None
    since = min((count.since for count in counts if count.since is not None), default=None)
    oldest = "" if since is None else f", the oldest for {max(now - since, 0.0):.0f} s"
    first, events = counts[0], sum(count.events for count in counts)
    told = masked(f"{events} events are held{oldest}; first reason, of handler {first.handler!r}: {first.reason}")
    return str(told)


def _work(found: Iterable[InFlight]) -> tuple[Work, ...]:
    now = time.monotonic()
    return tuple(
        Work(
            work.handler.name,
            str(work.event.id),
            work.event.stream,
            work.event.position,
            now - work.since,
            work.handler.timeout,
        )
        for work in found
    )


def _state(service: Hosted) -> tuple[RunningService | None, dict[str, Any]]:
    try:
        running = service.running_now
    except ConfigurationError as error:
        # Its cause is what ended the service; without one it has not begun.
        return None, {"starting": True} if error.__cause__ is None else {"died": masked(str(error))}
    if running.stopping.is_set():
        return running, {"stopping": True}
    return running, {} if running.joined.is_set() else {"starting": True}


async def _answer(asking: Awaitable[T]) -> tuple[T | None, str | None]:
    """The answer, or what came instead of it."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await asking, None
    except TimeoutError:
        return None, f"no answer within {ANSWER_SECONDS:g} s"
    except (DatabaseUnavailable, StoreUnavailable) as error:
        return None, masked(str(error))


async def _first_after(store: EventStore, position: int) -> str | None:
    """The first event above `position` that services are to receive, in words; None when there is none."""
    found = [event async for event in store.read_all(after=position, filter=CARRIED, limit=_SOME)]
    for event in found:
        if carried(event) is not None:
            return f"event {event.id} ({event.type}, position {event.position}) of stream {event.stream!r}"
    return None


async def _identity(store: EventStore) -> tuple[UUID, int]:
    """The log's id, and its head."""
    return await store.log_id(), await store.head()


async def _other_log(running: RunningService, found: tuple[UUID, int], settled: int) -> str | None:
    """Why the log that the store holds now is not the one that the service has worked on; None where it is."""
    (log_id, head), known, owner = found, await running.log_id(), f"service {running.service.name!r}"
    if log_id != known:
        return str(LogChanged(owner, known, log_id))
    if head < settled:  # unless the events up to there were appended since its head was asked for
        head = await running.store.head()
    return str(LogBehind(owner, known, head, settled)) if head < settled else None


_SOME: Final = 10
"""Events to look at: the store's filter knows reserved streams, but not the reserved types that may be among them."""
