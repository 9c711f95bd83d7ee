"""Held events and dead letters: backoff without blocking others, order per key, retried by operators exactly once."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.databases import database_url
from tests.integration.embedded import (
    Followed,
    Happened,
    World,
    assert_once_in_order,
    audit,
    auditing,
    count,
    embedded,
    letters,
    many,
    note,
    rows,
    tables,
    until,
)
from tidings import Context, Hold, Retry, Service
from tidings.database.engine import connected, open_database
from tidings.database.tables import held
from tidings.database.upgrades import SCHEMA
from tidings.errors import DatabaseUnavailable
from tidings.operations.dead import DeadLetterNotFound, DeadLetters, NotRetriable
from tidings.operations.held import HeldOperations

pytestmark = [pytest.mark.served, pytest.mark.postgresql]

SHORT = Hold(attempts=3, delay=0.02, factor=1)
HELD = Retry(attempts=1, hold=SHORT)


class Moody:
    """An effect that fails while `mood` says so."""

    def __init__(self, *keys: str) -> None:
        self.angry = set(keys)
        self.attempts: list[tuple[str, int, int]] = []

    async def __call__(self, event: Happened, context: Context, session: AsyncSession) -> None:
        self.attempts.append((event.key, event.n, context.attempt))
        if event.key in self.angry:
            raise ValueError(f"{event.key} is in a mood")


async def dead_letters(world: World) -> DeadLetters:
    running = world.running[0]
    return DeadLetters(running.database, running.service.name, await world.store.log_id())


async def test_held_event_lets_other_keys_of_its_bucket_go_on_and_its_own_key_wait_in_order(tmp_path: Path) -> None:
    moody = Moody("culprit")
    service = auditing(effect=moody, retry=Retry(attempts=2, delay=0.001, hold=Hold(attempts=1000, delay=0.05)))
    events = [Happened(key="culprit", n=n) for n in range(5)]
    others = many(300, 280)  # more keys than buckets: some share the culprit's
    async with embedded(tmp_path, service) as world:
        await world.append(*events, *others)
        await until(lambda: _done(service, len(others)))
        report = await world.report()
        assert not report.ok
        assert report.services[0].held_count == 5
        assert {n for key, n, _ in moody.attempts if key == "culprit"} == {0}, "the followers were not run"
        moody.angry.clear()
        await world.settled()
        assert_once_in_order(await rows(service), [*events, *others])
        assert await letters(service) == []
        assert await count(service, held) == 0


async def test_exhausted_event_is_dead_and_holds_its_key_until_it_is_retried_in_order(tmp_path: Path) -> None:
    moody = Moody("culprit")
    service = auditing(effect=moody, retry=HELD)
    events = [Happened(key="culprit", n=n) for n in range(20)]
    async with embedded(tmp_path, service) as world:
        await world.append(*events, Happened(key="other"))
        await until(lambda: _dead(service, 1))
        assert [attempt for key, n, attempt in moody.attempts if (key, n) == ("culprit", 0)] == [1, 2, 3, 4]
        await until(lambda: _held(service, 19))
        moody.angry.clear()
        await world.append(Happened(key="culprit", n=20))
        await until(lambda: _held(service, 20))
        dead = await dead_letters(world)
        (letter,) = await dead.list()
        assert (letter.kind, letter.key, letter.holds_key, letter.attempts) == ("handler", "culprit", True, 4)
        assert await dead.retry([letter.id]) == 1
        await world.settled()
        assert_once_in_order(await rows(service), [*events, Happened(key="culprit", n=20), Happened(key="other")])
        assert await dead.count() == 0


@pytest.mark.parametrize("transactional", [True, False])
async def test_whatever_fails_and_when_each_key_keeps_its_order(tmp_path: Path, transactional: bool) -> None:
    luck = random.Random(f"{transactional}")
    done: list[tuple[str, int]] = []
    service = Service("audit", tables=tables)
    unlucky = Retry(attempts=1, hold=Hold(attempts=1000, delay=0.01, factor=1))

    async def with_session(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        if luck.random() < 0.15:
            raise ValueError("bad luck")

    async def without(event: Happened) -> None:
        await asyncio.sleep(0)
        if luck.random() < 0.15:
            raise ValueError("bad luck")
        done.append((event.key, event.n))

    service.on(Happened, retry=unlucky)(with_session if transactional else without)
    events = many(400, 12)
    async with embedded(tmp_path, service) as world:
        for start in range(0, len(events), 50):
            await world.append(*events[start : start + 50])
        await world.settled()
        assert_once_in_order(await rows(service) if transactional else done, events)
        assert await letters(service) == []
        assert world.running[0].joins == 1, "no two of them collided in the database"


@pytest.mark.parametrize("transactional", [True, False])
async def test_when_everything_fails_the_service_pauses_instead_of_filling_its_dead_letters(
    tmp_path: Path, transactional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.delivery.breaker.PAUSES", (0.02, 0.05))
    down, attempts = True, 0
    done: list[tuple[str, int]] = []
    service = Service("audit", tables=tables)

    def fail() -> None:
        nonlocal attempts
        attempts += 1
        if down:
            raise ConnectionError("the gateway is down")

    async def with_session(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        fail()

    async def without(event: Happened) -> None:
        fail()
        done.append((event.key, event.n))

    service.on(Happened, retry=Retry(attempts=2, delay=0.001, hold=None))(with_session if transactional else without)
    events = many(600, 100)
    async with embedded(tmp_path, service) as world:
        await world.append(*events)
        running = world.running[0]
        await until(lambda: running.paused is not None)
        before = attempts
        await until(lambda: attempts > before + 5)
        assert "the gateway is down" in (running.paused or "")
        assert len(await letters(service)) <= 20, "those that failed before it was known that everything does"
        down = False
        await until(lambda: running.paused is None)
        await until(lambda: _settled_but_dead(world, service))
        given_up = {letter.key for letter in await letters(service)}
        found = await rows(service) if transactional else done
        assert_once_in_order(found, [event for event in events if event.key not in given_up])


async def test_dropping_a_dead_letter_lets_its_key_go_on(tmp_path: Path) -> None:
    async def fail(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.n == 1:
            raise KeyError("never")

    service = auditing(effect=fail, retry=Retry(permanent=(KeyError,)))
    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(4)))
        await until(lambda: _held(service, 2))
        dead = await dead_letters(world)
        (letter,) = await dead.list()
        assert await dead.drop([letter.id]) == 1
        await world.settled()
        assert await rows(service) == [("k", 0), ("k", 2), ("k", 3)]
        with pytest.raises(DeadLetterNotFound, match=f"no dead letter {letter.id}"):
            await dead.get(letter.id)


async def test_hold_key_false_gives_up_order_and_nothing_else(tmp_path: Path) -> None:
    moody = Moody("culprit")

    async def fail_first(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.n == 0:
            await moody(event, context, session)

    service = auditing(effect=fail_first, retry=Retry(attempts=1, hold=None, hold_key=False))
    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="culprit", n=n) for n in range(3)))
        await world.settled()
        assert await rows(service) == [("culprit", 1), ("culprit", 2)]
        moody.angry.clear()
        dead = await dead_letters(world)
        assert await dead.retry([letter.id for letter in await dead.list()]) == 1
        await until(lambda: _done(service, 3))
        await world.settled()
        assert await rows(service) == [("culprit", 1), ("culprit", 2), ("culprit", 0)]


async def test_held_events_outlive_a_restart_and_run_without_a_session_too(tmp_path: Path) -> None:
    calls: list[int] = []
    fails = True

    def service() -> Service:
        made = Service("plain")

        @made.on(Happened, retry=Retry(attempts=1, hold=Hold(attempts=1000, delay=0.05)))
        async def handle(event: Happened, context: Context) -> None:
            if fails and event.n == 0:
                raise ValueError("not yet")
            calls.append(event.n)

        return made

    first = service()
    async with embedded(tmp_path, first) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(6)))
        await until(lambda: _held(first, 6))
    assert calls == []
    fails = False
    async with embedded(tmp_path, service()) as world:
        await world.settled()
    assert calls == [0, 1, 2, 3, 4, 5]


async def test_a_dead_letter_that_does_not_hold_its_key_does_not_keep_later_events_held(tmp_path: Path) -> None:
    angry = {0, 1}

    async def fail(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.n in angry:
            angry.discard(event.n)
            raise (KeyError if event.n == 0 else ValueError)("not now")

    retry = Retry(attempts=1, permanent=(KeyError,), hold=SHORT, hold_key=False)
    service = auditing(effect=fail, retry=retry)
    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(3)))
        await world.settled()
        assert await rows(service) == [("k", 1), ("k", 2)]


async def test_thousands_may_wait_behind_one_event(tmp_path: Path) -> None:
    fails = True
    calls: list[int] = []
    service = Service("plain")

    @service.on(Happened, retry=Retry(attempts=1, hold=Hold(attempts=1000, delay=0.2)))
    async def handle(event: Happened) -> None:
        if fails:
            raise ValueError("not yet")
        calls.append(event.n)

    async with embedded(tmp_path, service, relay=False) as world:
        await world.append(*(Happened(key="k", n=n) for n in range(3000)))
    async with embedded(tmp_path, service) as world:
        await until(lambda: _held(service, 3000))
        fails = False
        await world.settled()
        assert calls == list(range(3000))


async def test_retried_while_the_service_is_down_runs_once_when_it_starts(tmp_path: Path) -> None:
    moody = Moody("culprit")
    service = auditing(effect=moody, retry=Retry(attempts=1, hold=None))
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="culprit"), Happened(key="culprit", n=1))
        await until(lambda: _held(service, 1))
    async with embedded(tmp_path, Service("idle")) as world:
        running = world.running[0]
        async with open_database(database_url(tmp_path, "audit"), tables) as database:
            dead = DeadLetters(database, "audit", await running.store.log_id())
            await dead.retry([letter.id for letter in await dead.list()])
    moody.angry.clear()
    again = auditing(effect=moody, retry=HELD)
    async with embedded(tmp_path, again) as world:
        await world.settled()
        assert await rows(again) == [("culprit", 0), ("culprit", 1)]


async def _held_rows(folder: Path) -> list[tuple[int, str, int, str]]:
    async with open_database(database_url(folder, "audit"), tables) as database, database.reading() as connection:
        columns = (held.c.position, held.c.handler, held.c.attempts, held.c.reason)
        return [tuple(row) for row in await connection.execute(sa.select(*columns).order_by(held.c.position))]


@pytest.mark.parametrize("gone", ["all", "handler", "type"])
async def test_a_rollback_to_code_without_the_handler_changes_nothing_of_what_it_holds(
    tmp_path: Path, gone: str
) -> None:
    """The event waits until the handler is back, and the key keeps its order."""
    moody = Moody("culprit")
    retry = Retry(attempts=1, hold=Hold(attempts=1000, delay=0.05))
    seen: list[tuple[str, int]] = []

    async def another(event: Happened) -> None:
        seen.append((event.key, event.n))

    def current() -> Service:
        service = auditing(effect=moody, retry=retry)
        service.on(Happened)(another)
        return service

    async with embedded(tmp_path, service := current()) as world:
        await world.append(Happened(key="culprit"), Happened(key="culprit", n=1))
        await until(lambda: _held(service, 2))
    before = await _held_rows(tmp_path)
    old = Service("audit", tables=tables)
    if gone == "handler":
        old.on(Happened)(another)
    if gone == "type":

        @old.on(Followed, name="handle")
        async def other(event: Followed) -> None:
            raise AssertionError

    async with embedded(tmp_path, old) as world:
        (part,) = world.running[0].partitions
        assert part.pipeline is not None
        revival = part.pipeline.stages.revival
        await until(lambda: revival.gone == {("handle", "Happened")})
        revival._due.look_at_all()
        await until(lambda: not revival._due.whole)
        (view,) = (await world.report()).services
        assert view.held_due is None, "nobody is late to run it"
        assert view.dead_count == 0
        assert "its handler 'handle' is not in this code" in view.held[0].reason
        (counted,) = await world.running[0].held()
        assert ("its handler 'handle' is not in this code" in counted.reason) == (gone != "type")
    assert await _held_rows(tmp_path) == before
    moody.angry.clear()
    async with embedded(tmp_path, again := current()) as world:
        await world.append(Happened(key="culprit", n=3))
        await world.settled()
        assert await rows(again) == [("culprit", n) for n in (0, 1, 3)]


async def test_an_operator_skips_or_drops_what_waits_for_a_handler_that_is_gone(tmp_path: Path) -> None:
    ran: list[tuple[str, int]] = []

    async def successor(event: Happened) -> None:
        ran.append((event.key, event.n))

    service = auditing(effect=Moody("a", "b"), retry=Retry(attempts=1, hold=Hold(attempts=1000, delay=0.05)))
    service.on(Happened)(successor)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"), Happened(key="b"))
        await until(lambda: _held(service, 2))
    assert sorted(ran) == [("a", 0), ("b", 0)]
    changed = Service("audit", tables=tables)
    changed.on(Happened)(successor)
    async with embedded(tmp_path, changed) as world:
        operations = HeldOperations(world.running[0].database, "audit", await world.store.log_id())
        await world.append(Happened(key="a", n=1), Happened(key="b", n=1))
        await until(lambda: _held(changed, 4))
        assert len(ran) == 2, "the order of the keys is kept"
        first, second = [entry for entry in await operations.list() if entry.handler == "handle"]
        await operations.skip(positions=[first.position])
        await operations.drop(positions=[second.position])
        await world.settled()
        assert sorted(ran[2:]) == [("a", 1), ("b", 1)]
        (letter,) = await letters(changed)
        assert not letter.holds_key


async def test_a_message_that_is_no_event_cannot_be_retried(tmp_path: Path) -> None:
    from tidings.database.dead_letters import Letter
    from tidings.database.inbox import Inbox
    from tidings.protocol.message import Message
    from tidings.protocol.position import ALL_BUCKETS

    service = auditing()
    async with embedded(tmp_path, service) as world:
        running = world.running[0]
        inbox = Inbox(running.database, "audit", await world.store.log_id(), ALL_BUCKETS)
        foreign = Message(body=b"{", message_id="x", type="Strange", content_type="")
        async with running.database.transaction() as connection:
            await inbox.dead.add(connection, [Letter.of_message(foreign, "no header")])
        dead = await dead_letters(world)
        (letter,) = await dead.list()
        with pytest.raises(NotRetriable, match="no header"):
            await dead.retry([letter.id])
        assert await dead.count() == 1, "nothing was changed"


async def test_a_clock_that_jumped_back_does_not_keep_an_event_held(tmp_path: Path) -> None:
    moody = Moody("culprit")
    service = auditing(effect=moody, retry=Retry(attempts=1, hold=Hold(attempts=9, delay=0.5, maximum=1.0)))
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="culprit"))
        await until(lambda: _held(service, 1))
        moody.angry.clear()
        async with world.running[0].database.transaction() as connection:
            await connection.execute(sa.update(held).values(due=held.c.due + 3600))
        await world.settled()
        assert await rows(service) == [("culprit", 0)]


async def test_an_event_whose_commit_is_refused_is_dead_and_its_group_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deferred constraint fails at COMMIT, when it is unknown whose row it was."""
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.01, 0.05))

    async def orphan(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == "culprit":
            await session.execute(sa.text("INSERT INTO child (parent) VALUES (4711)"))

    async with connected(database_url(tmp_path, "audit")) as database, database.transaction() as connection:
        await connection.execute(sa.text("CREATE TABLE parent (id INTEGER PRIMARY KEY)"))
        await connection.execute(
            sa.text("CREATE TABLE child (parent INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
        )
    service = auditing(effect=orphan)
    others = many(60, 9)
    async with embedded(tmp_path, service) as world:
        await world.append(*others[:30], Happened(key="culprit"), *others[30:])
        await world.settled()
        assert_once_in_order(await rows(service), others)
        (letter,) = await letters(service)
        assert letter.reason.startswith("IntegrityError: at the commit: ")
        assert "foreign key constraint" in letter.reason.lower()
        assert world.running[0].joins <= 3, "once for the group, once for the culprit"


@pytest.mark.sqlite("one writer at a time")
async def test_a_handler_that_waits_for_the_writer_it_holds_is_dead_not_retried_for_ever(tmp_path: Path) -> None:
    service = Service("audit", tables=tables)

    @service.on(Happened, retry=Retry(hold=None, hold_key=False))
    async def handle(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        if event.key == "culprit":
            async with service.engine.begin() as other:
                await other.execute(sa.insert(audit).values(key="other", n=0))

    others = many(20, 5)
    async with embedded(tmp_path, service) as world:
        await world.append(*others[:10], Happened(key="culprit"), *others[10:])
        await world.settled()
        assert_once_in_order(await rows(service), others)
        (letter,) = await letters(service)
        assert letter.reason.startswith("WriterHeld: handler 'handle' wrote to its service's database through")
        assert world.running[0].joins == 1


@pytest.mark.sqlite("the first version ran on nothing else in any test")
async def test_a_database_of_the_first_schema_is_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE tidings_schema (version INTEGER PRIMARY KEY)")
        connection.execute("INSERT INTO tidings_schema VALUES (1)")
        connection.execute(
            "CREATE TABLE tidings_floors (service TEXT, log TEXT, first_bucket INTEGER, last_bucket INTEGER, "
            "position BIGINT)"
        )
        connection.execute(
            "CREATE TABLE tidings_dead (id INTEGER PRIMARY KEY, service TEXT, log TEXT, kind TEXT, position BIGINT, "
            "bucket INTEGER, version BIGINT, ticks BIGINT, event_id TEXT, stream TEXT, type TEXT, data BLOB, "
            "metadata BLOB, is_json BOOLEAN, handler TEXT, attempts INTEGER, reason TEXT, detail TEXT, died_at TEXT)"
        )
        connection.execute(
            "INSERT INTO tidings_dead (service, log, kind, attempts, reason, died_at) VALUES "
            "('s', '00000000-0000-0000-0000-000000000000', 'message', 0, 'old', '2026-01-01 00:00:00.000000')"
        )
    from uuid import UUID

    for _ in range(2):
        async with open_database(f"sqlite:///{path}") as database:
            (letter,) = await DeadLetters(database, "s", UUID(int=0)).list()
            assert (letter.reason, letter.holds_key, letter.key) == ("old", False, None)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version FROM tidings_schema").fetchall() == [(SCHEMA,)]
        assert connection.execute("SELECT active FROM tidings_floors").fetchall() == []


@pytest.mark.sqlite("one writer's lock on a whole database")
async def test_a_locked_database_is_an_outage_for_whoever_holds_no_session(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        with closing(sqlite3.connect(tmp_path / "audit.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(DatabaseUnavailable, match="another process holds the writer"):
                async with world.running[0].database.transaction():
                    pass
            other.execute("ROLLBACK")


async def _settled_but_dead(world: World, service: Service) -> bool:
    """Return whether everything is settled except events that wait for dead letters. What failed last may become one
    after the handler has resumed."""
    given_up = {letter.key for letter in await letters(service)}
    report = (await world.report()).services[0]
    async with world.running[0].engine.connect() as connection:
        waiting = set(await connection.scalars(sa.select(held.c.key)))
    return report.pending_count == 0 and waiting <= given_up


async def _done(service: Service, number: int) -> bool:
    return await count(service, audit) == number


async def _held(service: Service, number: int) -> bool:
    return await count(service, held) == number


async def _dead(service: Service, number: int) -> bool:
    return len(await letters(service)) == number
