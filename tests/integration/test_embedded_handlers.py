"""Handlers that fail, hang, cancel, block or meddle with their transaction: a dead letter, and the rest goes on."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from structlog.testing import capture_logs

from tests.integration.databases import on_server
from tests.integration.embedded import (
    QUICK,
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
from tidings import Context, Retry, Service
from tidings.hosting.watchdog import Watchdog

pytestmark = [pytest.mark.served, pytest.mark.postgresql]

OTHERS = [Happened(key=f"other{n % 9}", n=n) for n in range(60)]
CULPRIT = Happened(key="culprit")


async def test_a_failure_is_retried_then_dead_with_everything_that_is_known(tmp_path: Path) -> None:
    attempts: list[int] = []

    async def fail(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == "culprit":
            attempts.append(context.attempt)
            raise ValueError(f"no luck with {event.n}")

    service = auditing(effect=fail)
    async with embedded(tmp_path, service) as world:
        await world.append(*OTHERS[:30], CULPRIT, *OTHERS[30:])
        report = await world.settled()
        assert attempts == [1, 2, 3]
        assert_once_in_order(await rows(service), OTHERS)
        (letter,) = await letters(service)
        assert (letter.kind, letter.handler, letter.attempts) == ("handler", "handle", 3)
        assert letter.reason == "ValueError: no luck with 0"
        assert "in fail" in letter.detail
        assert (letter.stream, letter.type, letter.version) == ("Happened-culprit", "Happened", 0)
        assert json.loads(letter.data) == {"key": "culprit", "n": 0}
        assert json.loads(letter.metadata)["partitionKey"] == "culprit"
        assert report.services[0].dead_count == 1


async def test_permanent_errors_skip_retries(tmp_path: Path) -> None:
    attempts: list[int] = []

    async def fail(event: Happened, context: Context, session: AsyncSession) -> None:
        attempts.append(context.attempt)
        raise KeyError("never")

    service = auditing(effect=fail, retry=Retry(attempts=5, permanent=(KeyError,), hold=None, hold_key=False))
    async with embedded(tmp_path, service) as world:
        await world.append(CULPRIT)
        await world.settled()
        assert attempts == [1]
        assert [letter.attempts for letter in await letters(service)] == [1]


async def test_order_within_the_key_holds_while_retrying_and_other_keys_go_on(tmp_path: Path) -> None:
    failing = True
    service = Service("audit", tables=tables)

    @service.on(Happened, retry=Retry(attempts=1000, delay=0.01, factor=1, hold=None, hold_key=False))
    async def handle(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        if failing and event.key == "culprit":
            raise ValueError

    culprits = [Happened(key="culprit", n=n) for n in range(5)]
    async with embedded(tmp_path, service) as world:
        await world.append(*culprits, *OTHERS)

        async def others_done() -> bool:
            return len(await rows(service)) == len(OTHERS)

        await until(others_done)
        failing = False
        await world.settled()
        assert_once_in_order(await rows(service), [*OTHERS, *culprits])


class Odd(BaseException):
    pass


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


ERRORS = [
    SystemExit(3),
    KeyboardInterrupt(),
    asyncio.CancelledError(),
    GeneratorExit(),
    Odd(),
    StopIteration(),
    StopAsyncIteration(),
    Unprintable(),
    ValueError("\ud800 and \0"),
    TimeoutError(),
    ExceptionGroup("several", [ValueError()]),
    BaseExceptionGroup("several", [KeyboardInterrupt()]),
]


@pytest.mark.parametrize("kind", ["session", "plain", "thread"])
async def test_whatever_a_handler_raises_is_its_failure_and_ends_nothing_else(tmp_path: Path, kind: str) -> None:
    service, seen = Service("audit", tables=tables), list[tuple[str, int]]()

    def bad(event: Happened) -> None:
        if event.key == "culprit":
            raise ERRORS[event.n]
        seen.append((event.key, event.n))

    async def with_session(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        bad(event)

    async def plain(event: Happened) -> None:
        bad(event)

    kinds: dict[str, Callable[..., Any]] = {"session": with_session, "plain": plain, "thread": bad}
    service.on(Happened, retry=Retry(attempts=2, delay=0.001, hold=None, hold_key=False))(kinds[kind])
    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="culprit", n=n) for n in range(len(ERRORS))), *OTHERS)
        await world.settled()
        assert_once_in_order(await rows(service) if kind == "session" else seen, OTHERS)
        found = await letters(service)
        assert [letter.attempts for letter in found] == [2] * len(ERRORS)
        assert world.running[0].joins == 1


@pytest.mark.parametrize("with_session", [True, False])
async def test_a_handler_that_cancels_its_own_task_fails_alone(tmp_path: Path, with_session: bool) -> None:
    service, seen = Service("audit", tables=tables, concurrency=2), list[tuple[str, int]]()

    async def cancel(event: Happened) -> None:
        if event.key == "culprit":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        seen.append((event.key, event.n))

    async def handle(event: Happened, session: AsyncSession) -> None:
        await cancel(event)

    service.on(Happened, retry=QUICK)(handle if with_session else cancel)
    async with embedded(tmp_path, service) as world:
        await world.append(*(Happened(key="culprit", n=n) for n in range(4)), *OTHERS)
        await world.settled()
        assert_once_in_order(seen, OTHERS)
        assert [letter.reason for letter in await letters(service)] == ["CancelledError: "] * 4


async def _commit(session: AsyncSession) -> None:
    await session.commit()


async def _rollback(session: AsyncSession) -> None:
    await session.rollback()


async def _begin(session: AsyncSession) -> None:
    await session.begin()


async def _close(session: AsyncSession) -> None:
    await session.close()


async def _connection_commit(session: AsyncSession) -> None:
    await (await session.connection()).commit()


async def _connection_rollback(session: AsyncSession) -> None:
    await (await session.connection()).rollback()


async def _sync_session_rollback(session: AsyncSession) -> None:
    await session.run_sync(lambda sync: sync.rollback())


async def _sync_connection_commit(session: AsyncSession) -> None:
    await (await session.connection()).run_sync(lambda sync: sync.commit())


async def _sync_connection_rollback(session: AsyncSession) -> None:
    await (await session.connection()).run_sync(lambda sync: sync.rollback())


async def _swallowed_sync_commit(session: AsyncSession) -> None:
    try:
        await (await session.connection()).run_sync(lambda sync: sync.commit())
    except Exception:
        return


async def _transaction_rollback(session: AsyncSession) -> None:
    transaction = (await session.connection()).get_transaction()
    assert transaction is not None
    await transaction.rollback()


async def _savepoint_rollback(session: AsyncSession) -> None:
    connection = await session.connection()
    savepoint = connection.get_nested_transaction()
    assert savepoint is not None
    await savepoint.rollback()
    await connection.execute(sa.insert(audit).values(key="leaked", n=0))


def _text(statement: str) -> Callable[[AsyncSession], Awaitable[None]]:
    async def run(session: AsyncSession) -> None:
        await session.execute(sa.text(statement))

    return run


MISUSES: dict[str, Callable[[AsyncSession], Awaitable[None]]] = {
    "commit": _commit,
    "rollback": _rollback,
    "begin": _begin,
    "close": _close,
    "connection.commit": _connection_commit,
    "connection.rollback": _connection_rollback,
    "sync session.rollback": _sync_session_rollback,
    "sync connection.commit": _sync_connection_commit,
    "sync connection.rollback": _sync_connection_rollback,
    "sync connection.commit, swallowed": _swallowed_sync_commit,
    "transaction.rollback": _transaction_rollback,
    "savepoint.rollback": _savepoint_rollback,
    "COMMIT": _text("COMMIT"),
    "ROLLBACK": _text("ROLLBACK"),
    "commented": _text("-- now\n /* really */ commit"),
    "END": _text("END TRANSACTION"),
    "BEGIN": _text("BEGIN"),
}


@pytest.mark.parametrize("misuse", MISUSES)
async def test_a_handler_that_ends_its_transaction_is_dead_and_its_neighbours_are_whole(
    tmp_path: Path, misuse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.01, 0.05))
    calls: list[int] = []

    async def meddle(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == "culprit":
            calls.append(context.attempt)
            await MISUSES[misuse](session)

    service = auditing(effect=meddle)
    async with embedded(tmp_path, Service("first")) as world:
        await world.append(*OTHERS[:30], CULPRIT, *OTHERS[30:])
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert_once_in_order(await rows(service), OTHERS)
        (letter,) = await letters(service)
        assert letter.reason.startswith("TransactionMisuse: ")
        # On a server, the first attempt has no savepoint of its own that it could roll back to.
        assert calls == ([1, 2] if on_server() and misuse == "savepoint.rollback" else [1])


async def test_a_commit_behind_sqlalchemys_back_is_noticed_and_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.partition.REJOIN_SECONDS", (0.01, 0.05))

    async def meddle(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == "culprit":
            raw = await (await session.connection()).get_raw_connection()
            assert raw.driver_connection is not None
            if on_server():
                await raw.driver_connection.execute("COMMIT")
            else:
                raw.driver_connection.commit()

    service = auditing(effect=meddle)
    async with embedded(tmp_path, service) as world:
        await world.append(CULPRIT)
        await world.settled()
        await world.append(*OTHERS)
        await world.settled()
        assert_once_in_order([row for row in await rows(service) if row[0] != "culprit"], OTHERS)
        (letter,) = await letters(service)
        assert letter.reason.startswith("TransactionMisuse: it ended the transaction")


class Base(DeclarativeBase):
    metadata = sa.MetaData()


class Stock(Base):
    __tablename__ = "stock"
    name: Mapped[str] = mapped_column(primary_key=True)


async def test_pending_objects_that_break_a_constraint_at_the_end_are_the_handlers_failure(tmp_path: Path) -> None:
    service = Service("stock", tables=Base.metadata)

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, session: AsyncSession) -> None:
        session.add(Stock(name=event.key))

    async with embedded(tmp_path, service) as world:
        keys = ["secret a", "secret b", "secret c"]
        await world.append(*(Happened(key=key, n=n) for n in range(2) for key in keys), Happened(key="d"))
        await world.settled()
        async with service.engine.connect() as connection:
            names = (await connection.scalars(sa.select(Stock.__table__.c.name))).all()
        assert sorted(names) == ["d", *keys]
        dead = await letters(service)
        assert [letter.reason.partition(":")[0] for letter in dead] == ["IntegrityError"] * 3
        # PostgreSQL itself says the value of a key that is there already, which the traceback shows.
        said = " ".join(letter.reason if on_server() else f"{letter.reason} {letter.detail}" for letter in dead)
        assert "INSERT INTO stock" in said
        assert "secret" not in said, "what a statement's parameters hold is the users' data"


async def test_what_a_handler_does_after_its_flush_failed_is_undone_too(tmp_path: Path) -> None:
    service = Service("stock", tables=Base.metadata)

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, session: AsyncSession, connection: AsyncConnection) -> None:
        session.add(Stock(name=event.key))
        if event.n:
            session.add(Stock(name=f"{event.key}{event.n}"))
            try:
                await session.flush()
            except IntegrityError:
                await connection.execute(sa.insert(Stock).values(name="leaked"))
                raise

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a", n=0), Happened(key="a", n=1), Happened(key="b", n=0))
        await world.settled()
        async with service.engine.connect() as connection:
            names = (await connection.scalars(sa.select(Stock.__table__.c.name))).all()
        assert sorted(names) == ["a", "b"]
        assert len(await letters(service)) == 1


async def test_a_handler_may_catch_an_integrity_error_in_a_nested_transaction(tmp_path: Path) -> None:
    async def insert_twice(event: Happened, context: Context, session: AsyncSession) -> None:
        for number in range(2):
            try:
                async with session.begin_nested():
                    await session.execute(sa.insert(audit).values(key=event.key, n=100 + number, note=event.key))
            except IntegrityError:
                await session.execute(sa.insert(audit).values(key=event.key, n=200))

    service = auditing(effect=insert_twice)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"), Happened(key="b"))
        await world.settled()
        assert_once_in_order(await rows(service), [Happened(key=key, n=n) for key in "ab" for n in (0, 100, 200)])
        assert await letters(service) == []


class Prices:
    def of(self, key: str) -> int:
        return len(key)


async def test_session_connection_context_and_resources_are_injected_by_type(tmp_path: Path) -> None:
    @asynccontextmanager
    async def lifespan(service: Service) -> AsyncIterator[tuple[Prices, threading.Lock]]:
        yield Prices(), threading.Lock()

    service, seen = Service("audit", tables=tables, lifespan=lifespan), list[str]()

    @service.on(Happened, retry=QUICK)
    async def handle(
        event: Happened, prices: Prices, context: Context, connection: AsyncConnection, session: AsyncSession
    ) -> None:
        await connection.execute(sa.insert(audit).values(key=event.key, n=prices.of(event.key)))
        seen.extend((await session.scalars(sa.select(audit.c.key))).all())
        with pytest.raises(Exception, match="must not be called on this session"):
            await connection.commit()
        if context.attempt == 1:
            raise ValueError

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="abc"))
        await world.settled()
        assert await rows(service) == [("abc", 3)]
        assert seen == ["abc", "abc"], "session and connection are in one transaction"


async def test_a_handler_over_its_time_is_undone_even_when_it_swallows_the_cancellation(tmp_path: Path) -> None:
    service = Service("audit", tables=tables)

    @service.on(Happened, retry=Retry(attempts=2, delay=0.01, hold=None, hold_key=False), timeout=0.5)
    async def handle(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        if event.key == "slow":
            await asyncio.sleep(60)
        elif event.key == "swallows":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="slow"), Happened(key="swallows"), *OTHERS)
        await world.settled()
        assert_once_in_order(await rows(service), OTHERS)
        assert [(letter.reason.partition(":")[0], letter.attempts) for letter in await letters(service)] == [
            ("HandlerTimeout", 2)
        ] * 2


@pytest.mark.parametrize("threaded", [True, False])
async def test_one_that_cannot_be_ended_is_named_again_and_again_and_only_its_key_waits(
    tmp_path: Path, threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.delivery.attempt.INSIST_SECONDS", 0.02)
    service, seen, release = Service("audit"), list[tuple[str, int]](), threading.Event()
    at_once, most = 0, 0

    def in_thread(event: Happened) -> None:
        nonlocal at_once, most
        if event.key == "culprit":
            at_once += 1
            most = max(most, at_once)
            release.wait()
            at_once -= 1
        else:
            seen.append((event.key, event.n))

    async def stubborn(event: Happened) -> None:
        nonlocal at_once, most
        if event.key == "culprit":
            at_once += 1
            most = max(most, at_once)
            while not release.is_set():
                try:
                    await asyncio.sleep(0.01)
                except asyncio.CancelledError:
                    continue
            at_once -= 1
        else:
            seen.append((event.key, event.n))

    handler: Callable[..., Any] = in_thread if threaded else stubborn
    service.on(Happened, retry=Retry(attempts=1, hold=None, hold_key=False), timeout=1)(handler)
    with capture_logs() as logs:

        def named() -> list[Any]:
            return [entry for entry in logs if entry["event"] == "handler.ignores_timeout"]

        async with embedded(tmp_path, service) as world:
            await world.append(CULPRIT, *OTHERS)
            await until(lambda: len(named()) >= 3 and len(seen) == len(OTHERS))
            assert most == 1
            release.set()
            await world.settled()
            assert most == 1, "two attempts ran at once"
            assert [letter.reason.partition(":")[0] for letter in await letters(service)] == ["HandlerTimeout"]
    assert {entry["handler"] for entry in named()} == {handler.__name__}


async def test_handlers_that_block_every_thread_do_not_hold_up_the_commits_of_others(tmp_path: Path) -> None:
    release = threading.Event()
    blocking, service = Service("blocking", concurrency=40), auditing()

    @blocking.on(Happened)
    def block(event: Happened) -> None:
        release.wait()

    async with embedded(tmp_path, blocking, service) as world:
        work = [asyncio.to_thread(release.wait) for _ in range(40)]
        waiting = asyncio.gather(*work)
        events = many(60, 60)
        await world.append(*events)

        async def done() -> bool:
            return len(await rows(service)) == len(events)

        await until(done)
        release.set()
        await waiting
        await world.settled()


async def test_a_plain_function_that_returns_a_coroutine_is_not_taken_for_success(tmp_path: Path) -> None:
    service = Service("audit")

    async def inner() -> None: ...

    @service.on(Happened)
    def handle(event: Happened) -> Any:
        return inner()

    async with embedded(tmp_path, service) as world:
        await world.append(CULPRIT)
        await world.settled()
        (letter,) = await letters(service)
        assert "make it 'async def'" in letter.reason


async def test_an_outage_of_a_database_that_is_not_the_services_own_counts_as_a_failure(tmp_path: Path) -> None:
    import tidings.database.sqlite_dialect  # noqa: F401 - it is found by name, and the service itself may have another one

    service, seen = Service("audit"), list[str]()
    other = create_async_engine(f"sqlite+tidings:///{tmp_path}/missing/other.db")

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened) -> None:
        if event.key == "culprit":
            async with other.connect():
                pass
        seen.append(event.key)

    async with embedded(tmp_path, service) as world:
        await world.append(CULPRIT, Happened(key="a"))
        await world.settled()
        assert seen == ["a"]
        (letter,) = await letters(service)
        assert (letter.reason.partition(":")[0], letter.attempts) == (OperationalError.__name__, 3)
        assert world.running[0].joins == 1
    await other.dispose()


async def test_a_handler_that_holds_the_writer_is_named_and_alone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.delivery.slow_handlers.SLOW_SECONDS", 0.02)
    monkeypatch.setattr("tidings.delivery.groups.GROUP_SECONDS", 10)
    service, transactions = Service("audit", tables=tables), dict[str, list[int]](slow=[], quick=[])

    class Begun:
        count = 0

    @service.on(Happened)
    async def handle(event: Happened, session: AsyncSession) -> None:
        await note(session, event)
        await asyncio.sleep(0.03)
        transactions["slow"].append(Begun.count)

    monkeypatch.setattr("tidings.database.engine.SHARE", 15)  # one group at a time
    async with embedded(tmp_path, service) as world:

        @sa.event.listens_for(service.engine.sync_engine, "begin")
        def begun(connection: sa.Connection) -> None:
            Begun.count += 1

        with capture_logs() as logs:
            events = many(8, 8)
            await world.append(*events)
            await world.settled()
        assert [entry["handler"] for entry in logs if entry["event"] == "handler.holds_writer"] == ["handle"]
        assert len(set(transactions["slow"])) >= 7
        assert_once_in_order(await rows(service), events)


async def test_a_handler_that_blocks_the_loop_is_named_with_its_stack(tmp_path: Path) -> None:
    service = Service("audit")

    @service.on(Happened)
    async def block(event: Happened) -> None:
        time.sleep(2)  # noqa: ASYNC251 - so long that a busy machine's watchdog looks meanwhile

    with capture_logs() as logs:
        async with embedded(tmp_path, service) as world:
            with Watchdog("audit", world.running[0].working, seconds=0.1):
                await world.append(CULPRIT)
                await world.settled()
    blocked = [entry for entry in logs if entry["event"] == "loop.blocked"]
    told = [entry["stack"] for entry in blocked if entry["handlers"] == ["block"]]
    assert any("time.sleep" in stack for stack in told), told  # a busy machine may block it elsewhere, too


async def test_no_attempt_sees_what_the_one_before_made_of_the_metadata(tmp_path: Path) -> None:
    """The event is read by a pass, because it is older than the service."""
    seen: list[tuple[int, dict[str, Any]]] = []
    service = Service("audit", tables=tables)

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, context: Context) -> None:
        seen.append((context.attempt, dict(context.metadata)))
        context.metadata["schemaVersion"] = 7
        if context.attempt < 3:
            raise LookupError("again")

    async with embedded(tmp_path, Service("writer")) as world:
        await world.append(Happened(key="a"))
        await world.settled()
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert await letters(service) == []
    assert [attempt for attempt, _ in seen] == [1, 2, 3]
    assert seen[0][1] == seen[1][1] == seen[2][1]


async def test_a_handler_may_be_declared_while_its_service_runs(tmp_path: Path) -> None:
    service, seen = Service("audit", tables=tables), list[str]()
    async with embedded(tmp_path, service) as world:

        @service.on(Happened)
        async def late(event: Happened) -> None:
            seen.append(event.key)

        await world.append(Happened(key="a"))
        await until(lambda: seen == ["a"])


async def test_a_handlers_task_has_its_name_from_the_first_line_on_and_none_is_left(tmp_path: Path) -> None:
    service, seen = Service("audit", tables=tables), list[str]()

    @service.on(Happened)
    async def handle(event: Happened) -> None:
        for _ in range(2):
            task = asyncio.current_task()
            assert task is not None
            seen.append(task.get_name())
            await asyncio.sleep(0 if event.n else 0.001)

    async with embedded(tmp_path, service) as world:
        await world.append(*many(12, 4))
        await world.settled()
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("handler ")]
    assert seen == ["handler handle"] * 24
    assert not [task for task in asyncio.all_tasks() if "spare" in task.get_name()]
