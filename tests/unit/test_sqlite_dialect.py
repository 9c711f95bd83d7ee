"""`sqlite+tidings`: plain SQLAlchemy usage works, waiting never blocks the loop, cancellation harms no connection."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

import tidings.database.sqlite_dialect as sqlite_dialect


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"sqlite+tidings:///{tmp_path}/things.db")
    sqlite_dialect.register(engine.sync_engine)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()
    gc.collect()


async def names(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as connection:
        return list((await connection.scalars(sa.select(Thing.__table__.c.name).order_by("id"))).all())


async def test_an_orm_session_streams_runs_sync_code_and_sees_what_it_wrote(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        session.add_all(Thing(name=str(n)) for n in range(50))
        await session.commit()
        found = [thing.name async for thing in await session.stream_scalars(sa.select(Thing).order_by(Thing.id))]
        assert found == [str(n) for n in range(50)]
        assert await session.run_sync(lambda sync: sync.query(Thing).count()) == 50
    async with engine.connect() as connection, connection.stream(sa.select(Thing.__table__)) as result:
        assert len([row async for row in result]) == 50


async def test_an_open_transaction_is_undone_when_its_connection_returns_to_the_pool(engine: AsyncEngine) -> None:
    for level in ("DEFERRED", "IMMEDIATE"):
        async with engine.execution_options(isolation_level=level).connect() as connection:
            await connection.execute(sa.insert(Thing).values(name="lost"))
    assert await names(engine) == []


async def test_readers_go_on_beside_a_writer(engine: AsyncEngine) -> None:
    async with engine.execution_options(isolation_level="IMMEDIATE").begin() as writer:
        await writer.execute(sa.insert(Thing).values(name="new"))
        assert await asyncio.gather(*(names(engine) for _ in range(4))) == [[]] * 4
    assert await names(engine) == ["new"]


@pytest.mark.parametrize("level", ["IMMEDIATE", "DEFERRED"])
async def test_a_writer_waits_for_another_without_blocking_the_loop(
    engine: AsyncEngine, tmp_path: Path, level: str
) -> None:
    turns = 0

    async def write() -> None:
        async with engine.execution_options(isolation_level=level).begin() as connection:
            await connection.execute(sa.insert(Thing).values(name="second"))

    with closing(sqlite3.connect(tmp_path / "things.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO thing (name) VALUES ('first')")
        waiting = asyncio.create_task(write())
        while turns < 50:
            await asyncio.sleep(0.001)
            turns += 1
        assert not waiting.done()
        other.execute("COMMIT")
        await waiting
    assert await names(engine) == ["first", "second"]


async def test_a_writer_gives_up_after_a_while(
    engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_dialect, "BUSY_TIMEOUT", 0.05)
    with closing(sqlite3.connect(tmp_path / "things.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            async with engine.begin() as connection:
                await connection.execute(sa.insert(Thing).values(name="never"))
        other.execute("ROLLBACK")


async def test_a_snapshot_that_was_overtaken_is_refused_at_once(engine: AsyncEngine) -> None:
    loop = asyncio.get_running_loop()
    async with engine.connect() as reader:
        await reader.execute(sa.select(Thing.__table__))
        async with engine.begin() as writer:
            await writer.execute(sa.insert(Thing).values(name="new"))
        began = loop.time()
        with pytest.raises(OperationalError, match="locked"):
            await reader.execute(sa.insert(Thing).values(name="stale"))
        assert loop.time() - began < 1


async def test_a_commit_that_is_cancelled_again_and_again_is_finished_and_the_connection_usable(
    engine: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committing, go = threading.Event(), threading.Event()

    class Slow(sqlite_dialect._Connection):
        def commit(self) -> None:
            committing.set()
            go.wait()
            super().commit()

    monkeypatch.setattr(sqlite_dialect, "_Connection", Slow)

    slow = create_async_engine(f"sqlite+tidings:///{tmp_path}/things.db")

    async def write(name: str) -> None:
        async with slow.begin() as connection:
            await connection.execute(sa.insert(Thing).values(name=name))

    writing = asyncio.create_task(write("kept"))
    assert await asyncio.to_thread(committing.wait, 10)
    for _ in range(3):
        writing.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert not writing.done(), "the connection would be used while it commits"
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await names(engine) == ["kept"]
    await write("more")
    assert await names(engine) == ["kept", "more"]
    assert slow.pool.checkedout() == 0  # type: ignore[attr-defined]
    await slow.dispose()


async def test_a_cancelled_commit_loses_no_database_in_memory() -> None:
    engine = create_async_engine("sqlite+tidings://", pool_size=1, max_overflow=0)
    sqlite_dialect.register(engine.sync_engine)

    async def write(number: int) -> None:
        task = asyncio.current_task()
        assert task is not None
        async with engine.connect() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(sa.insert(Thing).values(id=number, name="kept"))
            task.cancel()  # it takes effect where the commit waits, or after it
            await connection.commit()
            await asyncio.sleep(0)

    for number in range(3):
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(write(number))
    assert await names(engine) == ["kept"] * 3
    await engine.dispose()


async def test_a_commit_is_durable_and_the_log_is_written_ahead(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        found: list[Any] = [
            (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert found == ["wal", 2, 1]
