"""On PostgreSQL in every `make test`: the sharpest promises, and what it does otherwise than SQLite.

`make postgresql` runs every test of a service's database there.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from structlog.testing import capture_logs

from tests.integration import test_embedded_exactly_once as once
from tests.integration import test_embedded_held as holding
from tests.integration.commands import Commands
from tests.integration.databases import PLACE, database_url
from tests.integration.embedded import (
    Happened,
    assert_once_in_order,
    audit,
    auditing,
    embedded,
    letters,
    many,
    note,
    rows,
    tables,
    until,
)
from tidings import Context, Hold, Retry, Service
from tidings.database.engine import Database, connected, open_database
from tidings.database.inbox import Inbox
from tidings.database.tables import held
from tidings.delivery.attempt import is_infrastructure
from tidings.delivery.failure_memory import LOSSES
from tidings.errors import DatabaseUnavailable, Fenced
from tidings.protocol.position import ALL_BUCKETS, bucket_of

pytestmark = pytest.mark.usefixtures("on_postgresql")

OTHERS = many(30, 7)
CULPRIT = Happened(key="culprit")


async def test_a_process_killed_with_sigkill_loses_and_repeats_nothing(tmp_path: Path) -> None:
    await once.test_a_process_killed_with_sigkill_loses_and_repeats_nothing(tmp_path, "after")


async def test_of_two_processes_of_one_service_the_compare_and_set_lets_one_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await once.test_of_two_processes_of_one_service_the_compare_and_set_lets_one_win(tmp_path, monkeypatch)


async def test_whatever_fails_and_when_each_key_keeps_its_order(tmp_path: Path) -> None:
    await holding.test_whatever_fails_and_when_each_key_keeps_its_order(tmp_path, transactional=True)


# ---- what is a handler's failure, and what is not ------------------------------------------------------------------


async def _too_much_at_once(session: AsyncSession) -> None:
    """A statement has more parameters than the protocol allows. The driver reports it like a closed connection."""
    await session.execute(sa.select(audit.c.id).where(audit.c.id.in_(range(40_000))))


async def _wrong_type(session: AsyncSession) -> None:
    await session.execute(sa.insert(audit).values(key="k", n="seven"))


@pytest.mark.parametrize("mistake", [_too_much_at_once, _wrong_type])
async def test_a_mistake_of_a_handler_is_its_failure_and_no_outage(tmp_path: Path, mistake: object) -> None:
    async def do(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == "culprit":
            await mistake(session)  # type: ignore[operator]

    service = auditing(effect=do)
    async with embedded(tmp_path, service) as world:
        await world.append(*OTHERS[:15], CULPRIT, *OTHERS[15:])
        await world.settled(20)
        assert_once_in_order(await rows(service), OTHERS)
        (letter,) = await letters(service)
        assert (letter.partition_key, letter.attempts) == ("culprit", 3)
        assert world.running[0].joins == 1


async def test_a_handler_that_goes_on_after_a_failed_statement_is_told_so_and_alone_pays(tmp_path: Path) -> None:
    async def insert_or_ignore(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == "culprit":
            for _ in range(2):
                with suppress(IntegrityError):
                    await session.execute(sa.insert(audit).values(key="culprit", note="once"))

    service = auditing(effect=insert_or_ignore)
    async with embedded(tmp_path, service) as world:
        await world.append(*OTHERS[:15], CULPRIT, *OTHERS[15:])
        await world.settled(20)
        assert_once_in_order(await rows(service), OTHERS)
        (letter,) = await letters(service)
        assert letter.reason.startswith("StatementFailed: a statement failed, and the handler went on")
        assert letter.attempts == 3
        assert world.running[0].joins == 1


async def test_an_event_whose_key_fits_no_index_is_held_and_keeps_its_order(tmp_path: Path) -> None:
    attempts = 0

    async def fail_twice(event: Happened, context: Context, session: AsyncSession) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= 2:
            raise ValueError("not yet")

    service = auditing(effect=fail_twice, retry=Retry(attempts=1, hold=Hold(attempts=9, delay=0.05)))
    events = [Happened(key=secrets.token_urlsafe(9000), n=0)]
    events += [Happened(key=events[0].key, n=n) for n in range(1, 4)]
    async with embedded(tmp_path, service) as world:
        await world.append(*events, stream="long")
        await world.settled(20)
        assert_once_in_order(await rows(service), events)
        assert world.running[0].joins == 1


async def test_a_dead_letter_whose_key_fits_no_index_holds_its_key(tmp_path: Path) -> None:
    async def fail(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.n == 0:
            raise ValueError("no")

    service = auditing(effect=fail, retry=Retry(attempts=1, hold=None))
    keys = [secrets.token_urlsafe(9000) for _ in range(2)]
    alike = f"{keys[0]}x"
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key=keys[0]), Happened(key=keys[0], n=1), stream="long")
        await world.append(Happened(key=keys[1], n=1), Happened(key=alike, n=2), stream="others")

        async def others_done() -> bool:
            return len(await rows(service)) == 2

        await until(others_done)
        assert sorted(await rows(service)) == sorted([(keys[1], 1), (alike, 2)])  # other keys: in any order


# ---- what the server does ------------------------------------------------------------------------------------------


@asynccontextmanager
async def a_tool(folder: Path) -> AsyncIterator[Database]:
    """Another client that is connected to the service's database."""
    async with connected(database_url(folder, "audit")) as database:
        yield database


@pytest.mark.usefixtures("every_failure_told")
async def test_a_timeout_of_a_lock_that_tidings_waits_for_is_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.02, 0.1))
    async with a_tool(tmp_path) as tool:
        async with tool.engine.begin() as connection:
            await connection.execute(sa.text(f'ALTER DATABASE "{tool.engine.url.database}" SET lock_timeout = 50'))
        service = auditing()
        async with embedded(tmp_path, service) as world:
            await world.append(*OTHERS[:15])
            await world.settled(20)
            with capture_logs() as logs:
                async with tool.engine.begin() as connection:
                    await connection.execute(sa.text("SELECT 1 FROM tidings_watermarks FOR UPDATE"))
                    await world.append(*OTHERS[15:])
                    await until(lambda: sum(line["event"] == "service.rejoining" for line in logs) >= 2)
            told = next(line["error"] for line in logs if line["event"] == "service.rejoining")
            assert "lock_timeout or statement_timeout is too short" in told
            await world.settled(20)
            assert_once_in_order(await rows(service), OTHERS)
            assert await letters(service) == []


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"password": "wrong"}, "check user and password"),
        ({"username": "ghost"}, "check user and password"),
        ({"database": "nowhere"}, "create it"),
    ],
)
async def test_who_is_not_let_in_at_the_start_is_told_what_to_check(change: dict[str, str], advice: str) -> None:
    url = make_url(os.environ[PLACE]).set(**change)  # type: ignore[arg-type]
    with pytest.raises(DatabaseUnavailable, match=advice) as caught:
        async with open_database(url.render_as_string(hide_password=False)):
            pass
    assert not caught.value.waiting_helps
    assert str(url.password) not in str(caught.value)


async def _isolate(connection: AsyncConnection, level: str) -> None:
    """Set the default isolation level of the database for new connections."""
    name = connection.engine.url.database
    await connection.execute(sa.text(f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = '{level}'"))


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
async def test_processes_that_start_at_once_on_an_empty_database_make_its_tables_once(
    tmp_path: Path, isolation: str
) -> None:
    async with a_tool(tmp_path) as tool, tool.engine.begin() as connection:
        await _isolate(connection, isolation)

    async def start() -> None:
        async with open_database(database_url(tmp_path, "audit"), tables) as database, database.reading() as connection:
            assert await connection.scalar(sa.select(sa.func.count()).select_from(audit)) == 0

    await asyncio.gather(*(start() for _ in range(6)))


async def test_of_two_processes_that_note_one_event_at_once_the_second_joins_again(tmp_path: Path) -> None:
    log = uuid4()
    async with open_database(database_url(tmp_path, "audit"), tables) as database, a_tool(tmp_path) as rival:
        first, second = (Inbox(of, "audit", log, ALL_BUCKETS) for of in (database, rival))
        await first.join()
        await second.join()

        async def note_too() -> None:
            async with rival.transaction() as connection:
                await second.notes.add(connection, {7: (3, 1)})

        async with database.transaction() as connection:
            await first.notes.add(connection, {7: (3, 1)})
            noting = asyncio.create_task(note_too())
            await until(lambda: _waits_for_a_lock(database))
        with pytest.raises(Fenced, match=r"another process began one of the positions \[7\] at the same moment"):
            await noting
        assert is_infrastructure(noting.exception() or ValueError())


async def _waits_for_a_lock(database: Database) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with database.reading() as connection:
        return bool(await connection.scalar(sa.text(waiting)))


@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
async def test_handlers_that_are_in_each_others_way_are_done_again_and_no_attempt_is_counted(
    tmp_path: Path, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two partitions change the same two rows in opposite order, which causes a deadlock or a serialization failure."""
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.02, 0.1))
    attempts: set[int] = set()
    both = asyncio.Barrier(2)
    met = False

    async def meet(event: Happened, context: Context, session: AsyncSession) -> None:
        nonlocal met
        attempts.add(context.attempt)
        mine = bucket_of(event.key) < 128
        for n, name in enumerate(("a", "b") if mine else ("b", "a")):
            await session.execute(sa.update(audit).where(audit.c.note == name).values(n=audit.c.n + 1))
            if n == 0 and event.n == 0 and not met:
                await both.wait()
                met = True

    low, high = (next(f"k{n}" for n in range(999) if (bucket_of(f"k{n}") < 128) is half) for half in (True, False))
    service = auditing(effect=meet, partitions=2)
    async with a_tool(tmp_path) as tool:
        async with tool.engine.begin() as connection:
            await _isolate(connection, isolation)
            await connection.run_sync(tables.create_all)
            await connection.execute(sa.insert(audit), [{"key": "shared", "n": 0, "note": name} for name in "ab"])
        events = [Happened(key=key, n=n) for n in range(10) for key in (low, high)]
        with capture_logs() as logs:
            async with embedded(tmp_path, service) as world:
                await world.append(*events)
                await world.settled(30)
                found = await rows(service)
        told = [f"{line}" for line in logs if line["event"] in ("group.undone", "service.rejoining")]
        assert any("another transaction was in its way" in line for line in told)
        assert attempts == {1}
        assert [n for key, n in found if key == "shared"] == [len(events)] * 2
        assert_once_in_order([row for row in found if row[0] != "shared"], events)


# ---- the connection is lost while a handler is at work ---------------------------------------------------------------

QUICKLY_HELD = Retry(attempts=2, delay=0.01, hold=Hold(attempts=1, delay=3600))


async def _held(service: Service) -> list[str]:
    """Return why each held event is held."""
    async with service.engine.connect() as connection:
        return list(await connection.scalars(sa.select(held.c.reason)))


async def _any_held(service: Service) -> bool:
    return bool(await _held(service))


async def _all_done(service: Service) -> bool:
    return len(await rows(service)) == len(OTHERS)


async def _end_my_connection(session: AsyncSession) -> None:
    """End the service's connections, as a restart of the server does."""
    await session.execute(sa.text("SELECT pg_terminate_backend(pg_backend_pid())"))


async def _and_go_on(session: AsyncSession) -> None:
    with suppress(Exception):
        await _end_my_connection(session)


async def _and_say_something_else(session: AsyncSession) -> None:
    try:
        await _end_my_connection(session)
    except Exception as error:
        raise ValueError("it did not work") from error


@pytest.mark.usefixtures("every_failure_told")
@pytest.mark.parametrize("lose", [_end_my_connection, _and_go_on, _and_say_something_else])
async def test_a_connection_that_is_lost_is_no_failure_whatever_the_handler_makes_of_it(
    tmp_path: Path, lose: Callable[[AsyncSession], Awaitable[None]]
) -> None:
    ran = 0

    async def do(event: Happened, context: Context, session: AsyncSession) -> None:
        nonlocal ran
        if event.key == "culprit":
            ran += 1
            if ran <= 2:
                await lose(session)

    service = auditing(effect=do)
    events = [*OTHERS[:15], CULPRIT, *OTHERS[15:]]
    async with embedded(tmp_path, service) as world:
        with capture_logs() as logged:
            await world.append(*events)
            await world.settled(20)
        assert_once_in_order(await rows(service), events)
        assert await letters(service) == []
        assert world.running[0].joins == 3
    told = [entry["error"] for entry in logged if entry["event"] == "service.rejoining"]
    assert len(told) == 2
    assert all("the connection was lost while handler 'handle' was at the event" in error for error in told)


async def test_a_server_that_says_goodbye_to_the_first_connection_is_an_outage(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The goodbye is there before SQLAlchemy has asked everything about the server, the end of the connection not
    yet."""
    told = b"SFATAL\0C57P01\0Mterminating connection due to administrator command\0\0"
    goodbye = b"E" + struct.pack(">I", 4 + len(told)) + told

    async with connected(postgresql_url) as database:
        dialect = database.engine.dialect
        ask = dialect.get_default_isolation_level

        def hear_and_ask(connection: Any) -> object:
            connection.driver_connection._protocol.data_received(goodbye)
            return ask(connection)

        with monkeypatch.context() as patch:
            patch.setattr(dialect, "get_default_isolation_level", hear_and_ask)
            with pytest.raises(DatabaseUnavailable, match="the service goes on where it was") as caught:
                async with database.transaction():
                    pass
            assert caught.value.waiting_helps
        async with database.transaction() as connection:
            assert await connection.scalar(sa.text("SELECT 1")) == 1


async def test_a_handler_that_always_loses_its_connection_holds_its_event_and_stops_nobody_else(tmp_path: Path) -> None:
    async def do(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == "culprit":
            await _end_my_connection(session)

    service = auditing(effect=do, retry=QUICKLY_HELD)
    async with embedded(tmp_path, service) as world:
        await world.append(*OTHERS[:15], CULPRIT, *OTHERS[15:])
        await until(lambda: _any_held(service), 60)
        await until(lambda: _all_done(service), 20)
        assert_once_in_order(await rows(service), OTHERS)
        (reason,) = await _held(service)
        assert reason.startswith(f"ConnectionLost: {LOSSES} times")


async def test_a_statement_that_outlasts_its_handlers_time_holds_the_event_and_stops_nobody_else(
    tmp_path: Path,
) -> None:
    service = Service("audit", tables=tables)

    @service.on(Happened, retry=QUICKLY_HELD, timeout=1)
    async def handle(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        if event.key == "culprit":
            await session.execute(sa.text("SELECT pg_sleep(60)"))

    async with embedded(tmp_path, service) as world:
        await world.append(*OTHERS[:15], CULPRIT, *OTHERS[15:])
        await until(lambda: _any_held(service), 60)
        await until(lambda: _all_done(service), 20)
        assert_once_in_order(await rows(service), OTHERS)
        assert await letters(service) == []
        assert world.running[0].joins == 1 + LOSSES
        (reason,) = await _held(service)
        assert reason.startswith("ConnectionLost: 5 times")
        assert "HandlerTimeout" in reason


async def test_a_session_that_outlasts_the_servers_patience_holds_the_event_and_stops_nobody_else(
    tmp_path: Path,
) -> None:
    async def do(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == "culprit":
            await session.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = '50ms'"))
            with suppress(TimeoutError):  # until the server has ended it, or this test has something to find out
                await until(lambda: False, 0.3)

    service = auditing(effect=do, retry=QUICKLY_HELD)
    async with embedded(tmp_path, service) as world:
        await world.append(*OTHERS[:15], CULPRIT, *OTHERS[15:])
        await until(lambda: _any_held(service), 60)
        await until(lambda: _all_done(service), 20)
        assert_once_in_order(await rows(service), OTHERS)
        assert world.running[0].joins == 1 + LOSSES
        (reason,) = await _held(service)
        assert "idle_in_transaction_session_timeout" in reason


async def test_a_database_that_is_not_there_is_said_with_the_way_to_make_it(
    tmp_path: Path, postgresql_url: str
) -> None:
    missing = make_url(postgresql_url).set(database="nobody_made_it").render_as_string(hide_password=False)
    with Commands(tmp_path, {"TIDINGS_DATABASE": missing}) as commands:
        await commands.append("Placed", '{"number": 1}')
        ended = await commands.run("run", "shop:shop")
        assert ended.process.returncode == 3
        assert "createdb" in ended.err
        assert "nobody_made_it" in ended.err
        looked = await commands.run("verify", "shop:shop")
        assert looked.process.returncode == 3
        assert "createdb" in looked.err
