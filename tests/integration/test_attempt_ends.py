"""Context, session and connection end with their attempt: whoever uses them later is told, and nothing is done."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.util import greenlet_spawn

from tests.integration.embedded import (
    QUICK,
    Followed,
    Happened,
    audit,
    embedded,
    followed,
    letters,
    rows,
    tables,
    until,
)
from tidings import Aggregate, Context, Retry, Service, evolves
from tidings.errors import AttemptEnded


class Base(DeclarativeBase): ...


class Row(Base):
    __table__ = audit


class Shelf(Aggregate):
    def note(self) -> None:
        self.record(Followed(key="late"))

    @evolves(Followed)
    def noted(self, event: Followed) -> None: ...


LATE = sa.insert(audit).values(key="late", n=1)


class Given:
    """Everything that a handler was injected with or made from it, kept from the attempt."""

    def __init__(self, service: Service, context: Context, session: AsyncSession, connection: AsyncConnection) -> None:
        self.shelves = service.repository(Shelf)
        self.context, self.session, self.connection = context, session, connection
        self.execute = session.execute
        self.objects: Session
        self.of_session: AsyncConnection
        self.raw: Any = connection.sync_connection

    async def take(self) -> Given:
        self.of_session = await self.session.connection()
        self.objects = await self.session.run_sync(lambda session: session)
        return self


async def _emit(given: Given) -> None:
    given.context.emit("late", Followed(key="late"))


async def _emit_in_a_thread(given: Given) -> None:
    await asyncio.to_thread(given.context.emit, "late", Followed(key="late"))


async def _change(given: Given) -> None:
    await given.context.change(given.shelves, "1", Shelf.note)


async def _execute(given: Given) -> None:
    await given.session.execute(LATE)


async def _bound(given: Given) -> None:
    await given.execute(LATE)


async def _add(given: Given) -> None:
    given.session.add(Row(key="late", n=1))


async def _add_behind(given: Given) -> None:
    given.objects.add(Row(key="late", n=1))


async def _flush(given: Given) -> None:
    await given.session.flush()


async def _nested(given: Given) -> None:
    async with given.session.begin_nested():
        await given.session.execute(LATE)


async def _run_sync(given: Given) -> None:
    await given.session.run_sync(lambda session: session.execute(LATE))


async def _connection(given: Given) -> None:
    await given.connection.execute(LATE)


async def _savepoint(given: Given) -> None:
    async with given.connection.begin_nested():
        await given.connection.execute(LATE)


async def _of_session(given: Given) -> None:
    await given.of_session.execute(LATE)


async def _raw(given: Given) -> None:
    await greenlet_spawn(given.raw.execute, LATE)


USES = [
    _emit,
    _emit_in_a_thread,
    _change,
    _execute,
    _bound,
    _add,
    _add_behind,
    _flush,
    _nested,
    _run_sync,
    _connection,
    _savepoint,
    _of_session,
    _raw,
]


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("ended", ["had returned", "had failed"])
@pytest.mark.parametrize("use", USES)
async def test_what_was_injected_ends_with_the_attempt(
    tmp_path: Path, use: Callable[[Given], Awaitable[None]], ended: str, apart: bool
) -> None:
    """The handler of the first event leaves a task behind, which goes on while the second handler works: mostly in the
    same transaction, if they are appended together, and surely in a later one, if they are appended apart."""
    service, at_work, said = Service("late", tables=tables), asyncio.Event(), asyncio.Future[BaseException | None]()
    left = list[asyncio.Task[None]]()

    async def later(given: Given) -> None:
        await at_work.wait()
        try:
            await use(given)
        except BaseException as error:
            said.set_result(error)
        else:
            said.set_result(None)

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, context: Context, session: AsyncSession, connection: AsyncConnection) -> None:
        if event.key == "first":
            if context.attempt == 1:
                left.append(asyncio.create_task(later(await Given(service, context, session, connection).take())))
                if ended == "had failed":
                    raise ValueError("its first attempt fails")
        else:
            at_work.set()
            await said
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n))

    async with embedded(tmp_path, service) as world:
        if apart:
            await world.append(Happened(key="first"), stream="both")
            await world.settled()
            await world.append(Happened(key="second"), stream="both")
        else:
            await world.append(Happened(key="first"), Happened(key="second"), stream="both")
        await world.settled()
        error = said.result()
        if use is _raw and isinstance(error, ResourceClosedError):
            # SQLAlchemy's own connection, behind what was injected, is closed with the transaction of its group. On a
            # busy machine, the second event may come too late for that one, though it was appended together.
            assert "This Connection is closed" in str(error)
        else:
            assert isinstance(error, AttemptEnded), f"{error!r} instead of what a person can act on"
            assert f"handler 'handle' {ended} at the event at position" in str(error)
            assert "TaskGroup" in str(error)
            assert not (use is _raw and apart)
        assert await followed(world.store) == []
        assert sorted(await rows(service)) == [("first", 0), ("second", 0)]
        assert await letters(service) == []


async def test_no_attempt_has_an_effect_in_the_savepoint_of_the_next(tmp_path: Path) -> None:
    """A handler that ignores its timeout goes on until it ends, but can no longer do anything."""
    service, said = Service("late", tables=tables), list[str]()

    async def tries(what: Callable[[], Awaitable[object] | object]) -> None:
        try:
            done = what()
            if isinstance(done, Awaitable):
                await done
            said.append("worked")
        except AttemptEnded as error:
            said.append(str(error))

    @service.on(Happened, retry=Retry(attempts=50, delay=0.01, hold=None), timeout=0.1)
    async def handle(event: Happened, context: Context, session: AsyncSession) -> None:
        if not said:
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                await tries(lambda: session.execute(LATE))
                await tries(lambda: context.emit("late", Followed(key="late")))
                return
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n))

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="slow"))
        await world.settled()
        assert len(said) == 2
        assert all("handler 'handle' was over its time of 0.1 s" in one for one in said)
        assert await rows(service) == [("slow", 0)]
        assert await followed(world.store) == []


async def test_a_thread_that_outlives_its_time_emits_nothing(tmp_path: Path) -> None:
    service, said, over = Service("late"), list[str](), threading.Event()

    @service.on(Happened, retry=Retry(attempts=50, delay=0.01, hold=None), timeout=0.05)
    def handle(event: Happened, context: Context) -> None:
        if context.attempt > 1:
            context.emit("in-time", Followed(key=event.key))
            return
        assert over.wait(20)
        try:
            context.emit("late", Followed(key="late"))
        except AttemptEnded as error:
            said.append(str(error))

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"))
        await until(lambda: bool(world.running[0].at_work()))
        await asyncio.sleep(0.2)  # its time is over; nothing can be awaited that says so
        over.set()
        await world.settled()
        assert len(said) == 1
        assert "was over its time of 0.05 s" in said[0]
        assert await followed(world.store) == [("a", 0)]


async def test_a_context_that_is_kept_for_the_next_event_is_refused_there(tmp_path: Path) -> None:
    service, kept = Service("late"), list[Context]()

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, context: Context) -> None:
        kept.append(context)
        kept[0].emit("one", Followed(key=event.key))

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="first"), Happened(key="second"), stream="both")
        await world.settled()
        (letter,) = await letters(service)
        assert letter.position > kept[0].position
        assert str(letter.reason).startswith("AttemptEnded: context.emit() was used after its handler had ended")
        assert f"position {kept[0].position} " in letter.reason
        assert kept[0].idempotency_key(), "what is known of the event can still be read"


async def test_what_runs_while_its_handler_waits_for_it_works(tmp_path: Path) -> None:
    service = Service("together", tables=tables)

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, context: Context, session: AsyncSession) -> None:
        async def part(n: int) -> None:
            await asyncio.sleep(0)
            context.emit("parts", Followed(key=event.key, n=n))

        async with asyncio.TaskGroup() as parts:
            for n in range(3):
                parts.create_task(part(n))
        await asyncio.to_thread(context.emit, "parts", Followed(key=event.key, n=3))
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n))

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"))
        await world.settled()
        assert await rows(service) == [("a", 0)]
        assert sorted(await followed(world.store)) == [("a", n) for n in range(4)]


async def test_what_an_attempt_was_given_goes_with_it_and_is_not_left_to_the_garbage_collector(tmp_path: Path) -> None:
    service = Service("tidy", tables=tables)
    given: list[weakref.ref[Any]] = []

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, session: AsyncSession, connection: AsyncConnection) -> None:
        given.extend(weakref.ref(each) for each in (session, session.sync_session, connection))
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n))
        if event.n % 2:
            session.add(Row(key=event.key, n=event.n))
        await connection.execute(sa.select(audit))

    async with embedded(tmp_path, service) as world:
        gc.collect()
        gc.disable()
        try:
            await world.append(*(Happened(key=f"{n % 5}", n=n) for n in range(20)))
            await world.settled()
            assert len(given) == 60
            # Tasks that wait for the next event still have their last one.
            await until(lambda: sum(each() is not None for each in given) <= 10)
        finally:
            gc.enable()


async def test_a_session_flushes_before_a_plain_statement_and_says_that_it_is_in_a_transaction(tmp_path: Path) -> None:
    service = Service("mixed", tables=tables)
    found: list[Any] = []

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, session: AsyncSession) -> None:
        count = sa.select(sa.func.count()).select_from(audit)
        await session.execute(sa.insert(audit), [{"key": event.key, "n": 1}, {"key": event.key, "n": 2}])
        found.append(session.in_transaction())
        session.add(Row(key=event.key, n=3))
        found.append((await session.execute(count)).scalar_one())
        found.append(type((await session.execute(sa.select(Row).where(audit.c.n == 3))).scalar_one()))
        session.add(Row(key=event.key, n=4))
        found.append((await session.execute(count)).scalar_one())

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"))
        await world.settled()
        assert found == [True, 3, Row, 4]
        assert await rows(service) == [("a", n) for n in range(1, 5)]


async def test_who_listens_to_sessions_hears_of_plain_statements(tmp_path: Path) -> None:
    service = Service("heard", tables=tables)
    heard: list[str] = []

    @service.on(Happened, retry=QUICK)
    async def handle(event: Happened, session: AsyncSession) -> None:
        sa.event.listen(session.sync_session, "do_orm_execute", lambda state: heard.append(str(state.statement)))
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n))

    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="a"))
        await world.settled()
        assert len(heard) == 1
        assert heard[0].startswith("INSERT INTO audit")
        assert await rows(service) == [("a", 0)]
