"""Whatever fails, dies, is retried, dropped, fenced or cut off, and when: effects happen once, in order per key.

Keys share buckets and streams of two kinds of events: one kind's handler writes with a session, the other's emits
without. Everything that goes wrong is drawn from a seeded generator; in the end nothing fails any more, an operator
retries what is dead, and what happened is compared with what was appended, but for what the operator dropped.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count as numbers
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from tests.integration.embedded import Happened, audit, settings_for, tables, until
from tests.integration.served import open_log
from tidings import Context, Event, EventStore, Hold, Relay, Retry, Service, Settings, open_bus
from tidings._support.tasks import supervised
from tidings.buses.memory import MemoryBus
from tidings.database.engine import Database, open_database
from tidings.errors import DatabaseUnavailable
from tidings.hosting.running import RunningService
from tidings.operations.dead import DeadLetterNotFound, DeadLetters
from tidings.operations.verify import verify
from tidings.protocol.position import bucket_of

pytestmark = [pytest.mark.served, pytest.mark.postgresql]

EVENTS = 160
BUCKETS = (3, 77, 200)
PATIENCE = 90.0
STRUCK = 60
"""Transactions, of which some were struck."""
SEEDS = 2


class Told(Event, key="key"):
    """An event whose handler has no session and emits."""

    key: str
    n: int = 0


class Passed(Event, key="key"):
    """The event that the handler of `Told` emits."""

    key: str
    n: int = 0


class Refused(Exception):
    """An error that no retry heals, but an operator does."""


Done = dict[str, list[int]]


class Fate:
    """The faults, and the effects outside the database."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.kind = True
        """End all faults."""
        self.outage = False
        self.finished: Done = defaultdict(list)
        self.dropped: set[tuple[str, int]] = set()
        self.operations = self.transactions = 0

    def befall(self, event: Happened | Told) -> None:
        if self.kind:
            return
        chance = self.random.random()
        if self.outage or chance < 0.15:
            raise ConnectionError("for now")
        if chance < 0.2:
            raise Refused("for good")

    def service(self) -> Service:
        service = Service("audit", tables=tables, prefetch=40)
        retry = Retry(
            attempts=2, delay=0.001, permanent=(Refused,), hold=Hold(attempts=3, delay=0.02, factor=1.5, maximum=0.1)
        )

        @service.on(Happened, retry=retry)
        async def write(event: Happened, session: AsyncSession) -> None:
            await session.execute(sa.insert(audit).values(key=event.key, n=event.n))
            self.befall(event)
            self.finished[event.key].append(event.n)

        @service.on(Told, retry=retry)
        async def emit(event: Told, context: Context) -> None:
            await asyncio.sleep(self.random.random() / 500)
            context.emit(f"passed-{event.key}", Passed(key=event.key, n=event.n))
            self.befall(event)
            self.finished[event.key].append(event.n)

        return service

    def strike(self, database: Database) -> None:
        """Let some transactions fail from now on, before or after their commit: the process cannot tell which."""
        transaction = database.transaction

        @asynccontextmanager
        async def striking() -> AsyncIterator[AsyncConnection]:
            nth = 0
            if not self.kind:
                nth = self.transactions = self.transactions + 1
            async with transaction() as connection:
                yield connection
                if nth % 23 == 22:
                    raise DatabaseUnavailable("struck before the commit")
            if nth % 29 == 28:
                raise DatabaseUnavailable("struck after the commit")

        database.transaction = striking  # type: ignore[method-assign]

    async def operate(self, letters: DeadLetters) -> None:
        """Act as an operator in another process, who retries most dead letters and drops some."""
        while True:
            await asyncio.sleep(self.random.random() / 30)
            found = await letters.list()
            if not found:
                continue
            letter = self.random.choice(found)
            with suppress(DeadLetterNotFound):
                self.operations += 1
                if self.kind or self.operations % 3 != 1:
                    await letters.retry([letter.id])
                else:
                    await letters.drop([letter.id])
                    told = Happened.model_validate_json(letter.data or b"")
                    self.dropped.add((told.key, told.n))


def keys() -> list[str]:
    """Return four keys of each bucket."""
    found: dict[int, list[str]] = {bucket: [] for bucket in BUCKETS}
    for number in numbers():
        mine = found.get(bucket_of(f"k{number}"))
        if mine is not None and len(mine) < 4:
            mine.append(f"k{number}")
        if all(len(some) == 4 for some in found.values()):
            return [key for some in found.values() for key in some]
    raise AssertionError


async def emitted(store: EventStore) -> list[tuple[str, int]]:
    found = []
    async for event in store.read_all():
        if event.type == "Passed":
            passed = Passed.model_validate_json(event.data)
            found.append((passed.key, passed.n))
    return found


def assert_once_in_order(what: str, found: Iterable[tuple[str, int]], expected: Iterable[tuple[str, int]]) -> None:
    seen: Done = defaultdict(list)
    wanted: Done = defaultdict(list)
    for key, n in found:
        seen[key].append(n)
    for key, n in expected:
        wanted[key].append(n)
    for key in sorted(seen.keys() | wanted.keys()):
        assert seen[key] == wanted[key], f"{what} of {key}"


def assert_none_began_before_its_turn(finished: Done, expected: Iterable[tuple[str, int]]) -> None:
    """Effects outside the database may happen again, but first times happen in order."""
    wanted: Done = defaultdict(list)
    for key, n in expected:
        wanted[key].append(n)
    for key, ran in finished.items():
        first = list(dict.fromkeys(n for n in ran if n in wanted[key]))
        assert first == wanted[key], f"first times of {key}"


@asynccontextmanager
async def lives(fate: Fate, settings: Settings, store: EventStore, bus: MemoryBus) -> AsyncIterator[RunningService]:
    async with fate.service().running(settings, store=store, bus=bus) as running:
        fate.strike(running.database)
        yield running


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.005, 0.1))
    monkeypatch.setattr("tidings.hosting.running.DRAIN_SECONDS", 0.02)
    monkeypatch.setattr("tidings.delivery.breaker.PAUSES", (0.01, 0.03))
    monkeypatch.setattr("tidings.delivery.revival.HELD_SECONDS", 0.03)
    monkeypatch.setattr("tidings.delivery.revival.FLYING", 4)
    monkeypatch.setattr("tidings.database.held_due.AT_ONCE", 8)
    monkeypatch.setattr("tidings.delivery.intake.RECONNECT_SECONDS", (0.01, 0.05))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("rival", [False, True], ids=["alone", "with a rival process"])
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_effects_happen_once_in_order_whatever_goes_wrong(tmp_path: Path, seed: int, rival: bool) -> None:
    fate = Fate(f"{seed} {rival}")
    chance, settings = fate.random, settings_for(tmp_path)
    events: list[Happened | Told] = []
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_log(tmp_path))
        bus = await stack.enter_async_context(open_bus(settings.bus))
        assert isinstance(bus, MemoryBus)
        relay = Relay(store, bus, marker_seconds=0.05, checkpoint_seconds=0.02)
        writer = Service("writer")
        await stack.enter_async_context(writer.running(settings, store=store, bus=bus))
        await stack.enter_async_context(supervised(relay.run()))
        async with lives(fate, settings, store, bus):
            pass
        database = await stack.enter_async_context(open_database(settings.database_of("audit"), tables))
        letters = DeadLetters(database, "audit", await store.log_id())
        await stack.enter_async_context(supervised(fate.operate(letters)))
        rivals = await stack.enter_async_context(AsyncExitStack())
        if rival:
            apart = settings_for(tmp_path)
            other = await rivals.enter_async_context(open_bus(apart.bus))
            assert isinstance(other, MemoryBus)
            second = Relay(store, other, name="second", marker_seconds=0.05, checkpoint_seconds=0.02)
            await rivals.enter_async_context(lives(fate, apart, store, other))
            await rivals.enter_async_context(supervised(second.run()))

        fate.kind = False
        numbered: dict[str, int] = defaultdict(int)
        while len(events) < EVENTS:
            async with lives(fate, settings, store, bus):
                for _ in range(chance.randint(1, 4)):
                    fate.outage = chance.random() < 0.15
                    for _ in range(chance.randint(5, 25)):
                        key = chance.choice(keys())
                        event = chance.choice((Happened, Told))(key=key, n=numbered[key])
                        numbered[key] += 1
                        events.append(event)
                        await writer.append(f"mixed-{key}", event)
                    await asyncio.sleep(chance.random() / 5)
                    if chance.random() < 0.3:
                        bus.drop_connections()
                    elif chance.random() < 0.3:
                        bus.delete_queue("tidings.audit")

        fate.outage = False
        await rivals.aclose()  # two who are at work at once keep each other from it, however right what they do is
        async with lives(fate, settings, store, bus):
            await until(lambda: bool(fate.dropped) and fate.transactions > STRUCK, PATIENCE)
        fate.kind = True
        async with lives(fate, settings, store, bus) as running:

            async def ok() -> bool:
                report = await verify(store, [(running.service, running.database)])
                return report.ok and not report.services[0].dead_count

            await until(ok, PATIENCE)
            assert running.paused is None
        done = [(event.key, event.n) for event in events if (event.key, event.n) not in fate.dropped]
        async with database.reading() as connection:
            rows = list(await connection.execute(sa.select(audit.c.key, audit.c.n).order_by(audit.c.id)))
        writing = {(event.key, event.n) for event in events if isinstance(event, Happened)}
        assert_once_in_order("rows", [(row.key, row.n) for row in rows], [pair for pair in done if pair in writing])
        assert_once_in_order("emitted events", await emitted(store), [pair for pair in done if pair not in writing])
        if not rival:
            assert_none_began_before_its_turn(fate.finished, done)
