"""Rows and events of a request are committed together, and the events appended once, by whoever is at work."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.commands import Commands
from tests.integration.databases import EVERYWHERE, PLACE, on_server
from tests.integration.embedded import (
    Followed,
    Happened,
    assert_once_in_order,
    audit,
    auditing,
    count,
    embedded,
    followed,
    letters,
    many,
    rows,
)
from tests.integration.processes import until
from tests.integration.test_embedded_emits import Away, Forgetful
from tests.integration.test_embedded_standby import WORKERS, says
from tidings import EventData, EventStore, Service
from tidings.database.tables import staged
from tidings.errors import ConfigurationError, EventTooLarge, InvalidStreamName, RepetitionDiffers, TransactionMisuse
from tidings.modelling.codec import read_metadata

WITHIN: float = 10.0
"""Seconds that a busy machine may take for something that takes 2."""


@pytest.fixture(autouse=True, params=["postgresql"] if EVERYWHERE else ["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs on both kinds of database."""
    if request.param == "postgresql" and not EVERYWHERE:
        monkeypatch.setenv(PLACE, request.getfixturevalue("postgresql_url"))
    monkeypatch.setattr("tidings.producing.repetition.LOOK_SECONDS", 30.0)  # what a busy machine needs
    return str(request.param)


async def book(service: Service, event: Followed, *, key: str | None = None, note: str | None = None) -> None:
    async with service.transaction(idempotency_key=key) as (session, emit):
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n, note=note))
        emit(f"followed-{event.key}", event)


async def test_a_row_and_its_event_are_committed_together_or_not_at_all(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await book(service, Followed(key="a", n=1), note="one")
        with pytest.raises(RuntimeError):
            await _failing(service)
        with pytest.raises(IntegrityError):
            await book(service, Followed(key="a", n=3), note="one")
        with pytest.raises(TransactionMisuse):
            await _going_on(service)
        async with service.transaction() as (session, emit):
            try:
                async with session.begin_nested():
                    await session.execute(sa.insert(audit).values(key="a", n=5, note="one"))
            except IntegrityError:
                await session.execute(sa.insert(audit).values(key="a", n=5, note="two"))
            emit("followed-a", Followed(key="a", n=5))
        await world.settled(WITHIN)
        assert await rows(service) == [("a", 1), ("a", 5)]
        assert await followed(world.store) == [("a", 1), ("a", 5)]


async def _failing(service: Service) -> None:
    async with service.transaction() as (session, emit):
        await session.execute(sa.insert(audit).values(key="a", n=2))
        emit("followed-a", Followed(key="a", n=2))
        raise RuntimeError("the request fails")


async def _going_on(service: Service) -> None:
    """A failed flush undoes what was written, so there is nothing to commit."""
    async with service.transaction() as (session, emit):
        emit("followed-a", Followed(key="a", n=4))
        session.add(_Note(note="one"))
        with suppress(IntegrityError):
            await session.flush()


class _Base(sa.orm.DeclarativeBase):
    metadata = sa.MetaData()


class _Note(_Base):
    __table__ = audit.to_metadata(_Base.metadata)


async def test_they_are_appended_once_in_order_by_a_store_that_fails_and_forgets(tmp_path: Path) -> None:
    service, stores = auditing(), list[Forgetful]()

    def wrap(store: EventStore) -> EventStore:
        stores.append(Forgetful(store))
        return stores[-1]

    events = [Followed(key=event.key, n=event.n) for event in many(150, 10)]
    for part in (events[:75], events[75:]):  # the second process finds what the first had not appended
        async with embedded(tmp_path, service, wrap=wrap) as world:
            for event in part:
                await book(service, event)
            if part is events[75:]:
                await world.settled()
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert stores[0].failed + stores[1].failed > 5
        assert_once_in_order(await followed(world.store), [Happened(key=e.key, n=e.n) for e in events])
        assert_once_in_order(await rows(service), [Happened(key=e.key, n=e.n) for e in events])
        assert await count(service, staged) == 0


async def test_while_the_store_is_away_requests_go_on_and_their_events_come_later(tmp_path: Path) -> None:
    service, around = auditing(), list[Away]()

    def wrap(store: EventStore) -> EventStore:
        around.append(Away(store))
        around[0].take = False
        return around[0]

    async with embedded(tmp_path, service, wrap=wrap) as world:
        for n in range(3):
            await book(service, Followed(key="a", n=n))
        report = await world.report()
        assert not report.ok
        assert "staged Followed" in str(report)
        assert "by a request" in str(report)
        around[0].away = False
        await world.settled()
        assert await followed(world.store) == [("a", 0), ("a", 1), ("a", 2)]


async def test_more_than_are_looked_at_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.hosting.running.REQUESTED", 4)
    service = auditing()
    async with embedded(tmp_path, service) as world:
        async with service.transaction() as (_, emit):
            for n in range(40):
                emit(f"followed-{n % 5}", Followed(key=str(n % 5), n=n))
        await world.settled()
        assert_once_in_order(await followed(world.store), [Happened(key=str(n % 5), n=n) for n in range(40)])


async def test_a_repeated_request_with_its_key_appends_nothing_twice(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        for _ in range(2):  # the second finds the first one's row, or its event
            await book(service, Followed(key="a", n=1), key="request-1")
        await world.settled()
        await world.append(*[Followed(key="a", n=n) for n in range(50, 60)], stream="followed-a")
        await world.append(*many(20, 3))
        await world.settled()
        await book(service, Followed(key="a", n=1), key="request-1")
        await book(service, Followed(key="a", n=2), key="request-2")
        async with service.transaction(idempotency_key="request-3") as (_, emit):
            assert len({emit("followed-b", Followed(key="b", n=n)) for n in range(2)}) == 2
        await world.settled()
    async with embedded(tmp_path, service) as world:
        await book(service, Followed(key="a", n=1), key="request-1")
        await world.settled()
        found = await followed(world.store)
        assert [n for key, n in found if key == "a" and n < 50] == [1, 2]
        assert [n for key, n in found if key == "b"] == [0, 1]


@pytest.mark.parametrize("away", [True, False])
async def test_a_key_that_comes_again_with_other_data_is_refused_and_nothing_is_committed(
    tmp_path: Path, away: bool
) -> None:
    service, around = auditing(), list[Away]()

    def wrap(store: EventStore) -> EventStore:
        around.append(Away(store))
        around[0].away, around[0].take = away, False
        return around[0]

    async with embedded(tmp_path, service, wrap=wrap) as world:
        await book(service, Followed(key="a", n=1), key="request-1", note="one")
        if not away:
            await world.settled()
        with pytest.raises(RepetitionDiffers, match="differs in n") as refused:
            await book(service, Followed(key="a", n=2), key="request-1", note="two")
        assert "'request-1'" in str(refused.value)
        await book(service, Followed(key="b", n=2), key="request-1", note="three")  # to another stream: another event
        await book(service, Followed(key="a", n=1), key="request-1", note="four")
        around[0].away = False
        await world.settled()
        assert sorted(await followed(world.store)) == [("a", 1), ("b", 2)]
        assert sorted(await rows(service)) == [("a", 1), ("a", 1), ("b", 2)]


@pytest.mark.sqlite("it copies files")
async def test_a_database_restored_from_a_backup_appends_nothing_twice(tmp_path: Path, kind: str) -> None:
    if kind != "sqlite":
        pytest.skip("it copies files")
    service, around = auditing(), list[Away]()

    def wrap(store: EventStore) -> EventStore:
        around.append(Away(store))
        around[0].take = False
        return around[0]

    async with embedded(tmp_path, service, wrap=wrap) as world:
        for n in range(5):
            await book(service, Followed(key="a", n=n))
        await _backup(tmp_path)
        around[0].away = False
        await world.settled()
    for ending in ("", "-wal", "-shm"):
        (tmp_path / f"audit.db{ending}").unlink(missing_ok=True)
    shutil.move(tmp_path / "backup", tmp_path / "audit.db")
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert await followed(world.store) == [("a", n) for n in range(5)]


async def _backup(folder: Path) -> None:
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).backup(sqlite3.connect(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(folder / "audit.db"), str(folder / "backup")]
    await asyncio.to_thread(subprocess.run, command, check=True)


async def test_what_it_says_of_itself(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        async with service.transaction() as (_, emit):
            one = emit("followed-a", Followed(key="a", n=1), metadata={"actor": "ada"})
            two = emit("followed-b", Followed(key="b", n=1))
            three = emit("followed-c", Followed(key="c", n=1), correlation_id="mine")
        await world.settled(WITHIN)
        found = {event.id: read_metadata(event) async for event in world.store.read_all() if event.type == "Followed"}
        assert found[one]["actor"] == "ada"
        assert found[one]["$correlationId"] == found[two]["$correlationId"] != "mine"
        assert found[three]["$correlationId"] == "mine"
        assert {document["tidingsHandler"] for document in found.values()} == {"audit.transaction"}
        assert not any("$causationId" in document for document in found.values())
        assert {document["partitionKey"] for document in found.values()} == set("abc")


async def test_what_can_never_be_appended_is_refused_at_once_or_becomes_a_dead_letter(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        async with service.transaction() as (session, emit):
            for stream in ("", "$x", "tidings_x"):
                with pytest.raises((InvalidStreamName, ConfigurationError)):
                    emit(stream, Followed(key="a"))
            with pytest.raises(EventTooLarge):
                emit("followed-a", Followed(key="a" * 2_000_000))
            for ending in (session.commit, session.rollback):
                with pytest.raises(TransactionMisuse):
                    await ending()
            with pytest.raises(TransactionMisuse):
                session.begin()
            with pytest.raises(TransactionMisuse):
                await session.execute(sa.text("COMMIT"))
            emit("followed-z", Followed(key="z"))
        with pytest.raises(ConfigurationError, match="after its transaction had ended"):
            emit("followed-a", Followed(key="a"))
        await world.settled(WITHIN)
        await world.store.append("followed-gone", [EventData("Other", b"{}")])
        await world.store.tombstone("followed-gone")
        async with service.transaction() as (_, emit):
            emit("followed-gone", Followed(key="a"))
        await world.settled(WITHIN)
        assert [letter.kind for letter in await letters(service)] == ["staged"]
        assert await followed(world.store) == [("z", 0)]


async def test_where_it_would_wait_for_itself_it_is_refused(tmp_path: Path) -> None:
    refused: list[str] = []

    async def effect(event: Happened, context: Any, session: AsyncSession) -> None:
        try:
            async with service.transaction():
                pass
        except ConfigurationError as error:
            refused.append(str(error))

    service = auditing(effect=effect)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"))
        await world.settled()
        assert len(refused) == 1
        assert "context.emit" in refused[0]
        async with service.transaction():
            with pytest.raises(ConfigurationError, match="within another one"):
                async with service.transaction():
                    pass
        await asyncio.gather(*(book(service, Followed(key="a", n=n)) for n in range(5)))
        await world.settled(WITHIN)
        assert sorted(await followed(world.store)) == [("a", n) for n in range(5)]


async def test_what_a_request_appends_after_its_transaction_comes_after_it_in_the_log(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        for n in range(0, 20, 2):
            await book(service, Followed(key="a", n=n))
            await service.append("followed-a", Followed(key="a", n=n + 1))
        assert await followed(world.store) == [("a", n) for n in range(20)]


async def test_somebody_who_does_not_wait_on_leaving_may_wait_later(tmp_path: Path) -> None:
    service, around = auditing(), list[Away]()

    def wrap(store: EventStore) -> EventStore:
        around.append(Away(store))
        around[0].take = False
        return around[0]

    async with embedded(tmp_path, service, wrap=wrap) as world:
        async with asyncio.timeout(WITHIN):
            async with service.transaction(appended_within=10 * WITHIN) as (_, emit):
                emit("followed-a", Followed(key="a", n=0))
                with pytest.raises(ConfigurationError, match="after the block"):
                    await emit.appended()
        assert not await emit.appended(timeout=0.1)
        around[0].away = False
        assert await emit.appended(timeout=WITHIN)
        assert await followed(world.store) == [("a", 0)]
        async with service.transaction(appended_within=0) as (_, emit):
            emit("followed-a", Followed(key="a", n=1))
        assert await emit.appended(timeout=WITHIN)
        assert await followed(world.store) == [("a", 0), ("a", 1)]


# ---- by whom -------------------------------------------------------------------------

REQUESTS = """
import asyncio, os, signal, sys
from app import Asked, workers

async def main():
    async with workers.running():
        for key in sys.argv[2:]:
            async with workers.transaction() as (session, emit):
                emit(f"asked-{key}", Asked(key=key))
        print("committed", flush=True)
        if sys.argv[1] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def commands(tmp_path: Path, kind: str) -> Iterator[Commands]:
    settings = {"TIDINGS_DATABASE": os.environ[PLACE]} if on_server() else {}
    with Commands(tmp_path, settings) as opened:
        (tmp_path / "app.py").write_text(WORKERS)
        (tmp_path / "requests.py").write_text(REQUESTS)
        yield opened


async def test_the_process_at_work_appends_what_another_one_committed_before_it_was_killed(commands: Commands) -> None:
    worker = commands.start("run", "app:workers")
    await says(worker, "service.connected")
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "requests.py", "dies", "a", "b", "c"],
        cwd=commands.folder,
        env=commands.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "committed" in done.stdout
    effects = commands.folder / "effects"
    await until(
        lambda: effects.exists() and len(effects.read_text().splitlines()) == 3, "the three have effects", WITHIN
    )
    assert sorted(line.split()[0] for line in effects.read_text().splitlines()) == ["a", "b", "c"]


async def test_the_next_process_appends_what_nobody_had(commands: Commands) -> None:
    """The only process is killed at once: the next one appends the events that it has not appended."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "requests.py", "dies", "a", "b", "c"],
        cwd=commands.folder,
        env=commands.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker = commands.start("run", "app:workers")
    await says(worker, "service.connected")

    async def ok() -> bool:
        return (await commands.run("verify", "app:workers")).process.returncode == 0

    async with asyncio.timeout(60):
        while not await ok():
            pass
    shown = await commands.run("streams", "tail", "--json")
    assert sorted(shown.out.count(f'"asked-{key}"') for key in "abc") == [1, 1, 1], shown.out
