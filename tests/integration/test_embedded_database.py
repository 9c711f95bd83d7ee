"""The service's own database on a bad day: the service pauses and goes on, counts no attempt, loses nothing."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from structlog.testing import capture_logs

from tests.integration.databases import remove_database
from tests.integration.embedded import (
    Happened,
    assert_once_in_order,
    auditing,
    embedded,
    highest_watermark,
    letters,
    many,
    rows,
    settings_for,
    until,
)
from tidings import Context, Service
from tidings.errors import DatabaseMoved, DatabaseUnavailable, LogBehind, LogChanged, StoreUnavailable

pytestmark = pytest.mark.postgresql

EVENTS = many(200, 11)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.database.sqlite_dialect.BUSY_TIMEOUT", 0.2)
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.02, 0.1))


@contextmanager
def locked(service: Service, folder: Path) -> Iterator[None]:
    with closing(sqlite3.connect(folder / "audit.db", isolation_level=None, timeout=10)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def pragma(service: Service, harm: str, heal: str) -> Iterator[None]:
    """Every connection is broken when it leaves the pool."""
    statement = harm

    def apply(dbapi_connection: Any, record: object, proxy: object) -> None:
        dbapi_connection.execute(statement)

    sa.event.listen(service.engine.sync_engine, "checkout", apply)
    yield
    statement = heal


def read_only(service: Service, folder: Path) -> Any:
    return pragma(service, "PRAGMA query_only = 1", "PRAGMA query_only = 0")


def full(service: Service, folder: Path) -> Any:
    return pragma(service, "PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1000000")


@pytest.mark.usefixtures("every_failure_told")
@pytest.mark.sqlite("its locks and pragmas; the outages of PostgreSQL are in tests/faults/test_postgresql_faults.py")
@pytest.mark.parametrize(
    ("harm", "says", "with_session"),
    [
        (locked, "database is locked", True),
        (locked, "database is locked", False),
        (read_only, "readonly database", True),
        (read_only, "readonly database", False),
        (full, "database or disk is full", True),
    ],
)
async def test_a_database_that_cannot_be_written_pauses_the_service_and_counts_no_attempt(
    tmp_path: Path, harm: Callable[[Service, Path], Any], says: str, with_session: bool
) -> None:
    attempts: list[int] = []
    first: dict[tuple[str, int], None] = {}
    service = Service("audit")
    if with_session:

        async def see(event: Happened, context: Context, session: AsyncSession) -> None:
            attempts.append(context.attempt)

        service = auditing(effect=see)
    else:

        @service.on(Happened)
        async def handle(event: Happened, context: Context) -> None:
            attempts.append(context.attempt)
            first.setdefault((event.key, event.n))

    async with embedded(tmp_path, service) as world:
        (running,) = world.running
        await world.append(*EVENTS[:100])
        await world.settled()
        with capture_logs() as logs:
            with harm(service, tmp_path):
                await world.append(*EVENTS[100:], *(Happened(key="fill" * 2000, n=n) for n in range(30)))
                joins = running.joins

                def paused() -> bool:
                    told = [entry for entry in logs if entry["event"] == "service.rejoining"]
                    return len(told) >= 3 and all(says in entry["error"] for entry in told)

                await until(paused)
                assert running.joins - joins < 10
            await world.settled()
        everything = [*EVENTS, *(Happened(key="fill" * 2000, n=n) for n in range(30))]
        assert_once_in_order(await rows(service) if with_session else list(first), everything)
        assert set(attempts) == {1}
        assert await letters(service) == []


async def test_a_store_that_is_away_pauses_a_pass_and_nothing_is_skipped(tmp_path: Path) -> None:
    from tests.integration.embedded import StoreAround
    from tidings import EventStore

    class Away(StoreAround):
        calls = 0

        async def head(self) -> int:
            self.calls += 1
            # First for who asks whether the log holds what the marker says, which waits; then for the pass, and for
            # who joins again.
            if self.calls in (*range(2, 6), *range(7, 11)):
                raise StoreUnavailable("away")
            return await self.inner.head()

    def wrap(store: EventStore) -> EventStore:
        return Away(store)

    service = auditing()
    async with embedded(tmp_path, service, wrap=wrap) as world:
        world.bus.tamper(lambda queue, message: [message] if message.bucket is None else [])  # markers only
        await world.append(*EVENTS)
        await world.settled()
        assert_once_in_order(await rows(service), EVENTS)
        assert world.running[0].joins > 1


def _remove_log(folder: Path) -> None:
    for file in folder.glob("log.db*"):
        file.unlink()


@pytest.mark.sqlite("one writer's lock on a whole database")
@pytest.mark.parametrize("file", ["log.db", "audit.db"])
async def test_what_is_locked_at_the_start_is_waited_for(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.waiting.PAUSES", (0.02, 0.1))
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:3])
    with closing(sqlite3.connect(tmp_path / file, isolation_level=None, timeout=10)) as other, capture_logs() as lines:
        other.execute("BEGIN IMMEDIATE")
        starting = asyncio.create_task(_started(tmp_path, service))
        await until(lambda: any(line["event"] == "process.waiting" for line in lines))
        assert not starting.done()
        other.execute("ROLLBACK")
        await starting
    what = "the event store" if file == "log.db" else "the database of service audit"
    waits = [line for line in lines if line["event"] == "process.waiting"]
    assert {line["waits_for"] for line in waits} == {what}
    assert "nother process holds" in waits[0]["error"]


async def _started(folder: Path, service: Service) -> None:
    async with service.running(settings_for(folder)):
        pass


@pytest.mark.sqlite("a file that is no database")
async def test_what_only_a_person_can_mend_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "audit.db").write_bytes(b"no database at all, but long enough to look like a file" * 20)
    with pytest.raises(DatabaseUnavailable, match="no SQLite database: check the path"):
        await _started(tmp_path, auditing())
    with pytest.raises(StoreUnavailable, match="no folder"):
        await _started(tmp_path / "missing", auditing())


def _copy_log(source: Path, target: Path) -> None:
    for file in source.glob("log.db*"):
        shutil.copy(file, target)


async def test_another_log_is_refused_by_name(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:5])
        await world.settled()
        known = await world.store.log_id()
    _remove_log(tmp_path)
    with pytest.raises(LogChanged) as caught:
        async with embedded(tmp_path, service):
            pass
    assert caught.value.known == known
    assert isinstance(caught.value.found, UUID)
    assert "give the service a new database" in str(caught.value)


async def test_a_log_restored_to_an_older_state_is_refused_by_name(tmp_path: Path) -> None:
    service, backup = auditing(), tmp_path / "backup"
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[:5])
        await world.settled()
    backup.mkdir()
    _copy_log(tmp_path, backup)
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[5:])
        await world.settled()
        known = await highest_watermark(service)
    _remove_log(tmp_path)
    _copy_log(backup, tmp_path)
    with pytest.raises(LogBehind) as caught:
        async with embedded(tmp_path, service):
            pass
    assert caught.value.known >= known > caught.value.head
    await remove_database(tmp_path, "audit")
    async with service.running(settings_for(tmp_path)):  # after a refusal the service is free for another start
        pass


@pytest.mark.sqlite("a file that is moved")
@pytest.mark.parametrize("idle", [False, True], ids=["at_work", "idle"])
async def test_a_service_whose_file_is_moved_ends_and_goes_on_when_it_is_put_back(tmp_path: Path, idle: bool) -> None:
    service, more = auditing(), [] if idle else EVENTS[100:]
    away = tmp_path / "away"
    away.mkdir()

    async def run() -> None:
        async with embedded(tmp_path, service) as world:
            await world.append(*EVENTS[:100])
            await world.settled()
            _move(tmp_path, away)
            await world.append(*more)
            await asyncio.Event().wait()  # until the service's end ends this

    with pytest.raises(DatabaseMoved, match="it was moved or deleted"):
        await run()
    assert not (tmp_path / "audit.db").exists()
    _move(away, tmp_path)
    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS[100 + len(more) :])
        await world.settled()
        assert_once_in_order(await rows(service), EVENTS)


def _move(source: Path, target: Path) -> None:
    for file in source.glob("audit.db*"):
        file.rename(target / file.name)
