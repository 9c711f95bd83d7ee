"""A service whose own database is locked, full, or away: it pauses and says why; then every effect once, in order."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, closing

import pytest

from tests.faults.conftest import Recovered
from tests.faults.disk import SmallDisk, limited
from tests.faults.stage import Process, Stage, now

pytestmark = pytest.mark.faults

SOME = 100


@asynccontextmanager
async def working(stage: Stage) -> AsyncIterator[Process]:
    """Run a service under traffic. It must be alive at the end."""
    stage.relay()
    service = stage.service()
    async with stage.traffic():
        await stage.handles(SOME)
        yield service
    assert service.alive


async def pauses(stage: Stage, service: Process, refusing: AbstractContextManager[object], *words: str) -> float:
    """Assert that the service logs these words while its database is refused. Return the seconds until it went on."""
    with refusing:
        line = await service.says("service.rejoining", *words)
        assert "audit.db" in line
        assert "Nothing is lost" in line
    return await stage.recovered(now())


async def test_service_database_locked(stage: Stage, recovered: Recovered) -> None:
    """Another tool has opened the database and left a transaction open."""
    async with working(stage) as service:
        with closing(sqlite3.connect(stage.database(), isolation_level=None)) as tool:
            tool.execute("BEGIN IMMEDIATE")
            await service.says("service.rejoining", "another process holds the writer")
            tool.execute("ROLLBACK")
        seconds = await stage.recovered(now())
    recovered(await stage.keeps_promises(), seconds)


async def test_service_database_on_a_full_disk(stage: Stage, small_disk: SmallDisk, recovered: Recovered) -> None:
    stage.database().symlink_to(small_disk.place / "audit.db")
    async with working(stage) as service:
        seconds = await pauses(stage, service, small_disk.full(), "the disk is full: free some space")
    recovered(await stage.keeps_promises(), seconds)


async def test_service_database_over_its_quota(stage: Stage, recovered: Recovered) -> None:
    async with working(stage) as service:
        size = stage.database().with_suffix(".db-wal").stat().st_size + 50_000
        seconds = await pauses(stage, service, limited(service.pid, size), "the disk failed or is full")
    recovered(await stage.keeps_promises(), seconds)


async def test_service_database_gone_and_back(stage: Stage, recovered: Recovered) -> None:
    """The folder of the database does not exist when the service starts again, as when a volume is not mounted yet. The
    service does not create it; it says so and ends."""
    away = stage.folder / "away"
    async with working(stage) as service:
        service.kill()
        stage.databases.rename(away)
        service.start()
        assert await service.ended() > 0
        assert "audit.db: unable to open database file; make sure that the folder exists" in service.log
        assert not stage.databases.exists()
        away.rename(stage.databases)
        service.start()
        seconds = await stage.recovered(now())
    recovered(await stage.keeps_promises(), seconds)


async def test_service_database_moved_while_the_service_runs(stage: Stage, recovered: Recovered) -> None:
    """SQLite would go on with the moved file. The service ends, makes no new file, and goes on when it is back."""
    away = stage.folder / "away"
    async with working(stage) as service:
        stage.databases.rename(away)
        stage.databases.mkdir()
        assert await service.ended() == 3
        assert f"the database file {stage.database()} is not the one that was opened" in service.log
        assert "Put the file back" in service.log
        assert not stage.database().exists()
        stage.databases.rmdir()
        away.rename(stage.databases)
        service.start()
        seconds = await stage.recovered(now())
    recovered(await stage.keeps_promises(), seconds)


async def test_service_database_replaced_by_yesterdays_backup(stage: Stage, recovered: Recovered) -> None:
    """Effects since the backup are undone together with their watermarks, so the events are handled again: once, in
    order."""
    async with working(stage) as service:
        backup = stage.folder / "backup.db"
        with closing(sqlite3.connect(stage.database())) as source, closing(sqlite3.connect(backup)) as target:
            source.backup(target)
        await stage.handles(SOME)
        service.kill()
        for file in stage.databases.iterdir():
            file.unlink()
        backup.rename(stage.database())
        since = now()
        service.start()
        seconds = await stage.recovered(since)
    recovered(await stage.keeps_promises(), seconds)


async def set_back(stage: Stage, how: str, *arranged: str) -> float:
    """Give a service a new database, or one from a backup, after the store behind `tidings server` has forgotten the
    ids of appended events. Return the seconds until it handles new events."""
    server = await stage.server()
    stage.relay()
    service = stage.service(arranged=arranged)
    async with stage.traffic():
        await stage.handles(SOME)
        backup = stage.folder / "backup.db"
        with closing(sqlite3.connect(stage.database())) as source, closing(sqlite3.connect(backup)) as target:
            source.backup(target)
        await stage.handles(SOME)
        service.kill()
        server.kill()
        server.start()
        for file in stage.databases.iterdir():
            file.unlink()
        if how == "restored":
            backup.rename(stage.database())
        since = now()
        service.start()
        return await stage.recovered(since)


@pytest.mark.parametrize("how", ["new", "restored"])
async def test_service_database_set_back_while_the_store_forgets_ids(
    stage: Stage, recovered: Recovered, how: str
) -> None:
    seconds = await set_back(stage, how)
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.parametrize("how", ["new", "restored"])
async def test_a_service_that_trusts_its_database_alone_is_found_out(stage: Stage, how: str) -> None:
    """With the rule switched off, the test above fails."""
    await set_back(stage, how, "trusts-its-database")
    with pytest.raises(AssertionError, match="twice: more than one answer"):
        await stage.keeps_promises()
