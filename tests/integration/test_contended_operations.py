"""An operator's command while another transaction is in its way, as a service's may be: it is done again by itself."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.databases import database_url
from tests.integration.embedded import Happened, World, count, embedded, tables, until
from tidings import Context, Hold, Retry, Service
from tidings._support.backoff import nth_pause
from tidings.database import contention
from tidings.database.contention import TIMES
from tidings.database.engine import Database, connected
from tidings.database.held_events import turns
from tidings.database.layout import resize
from tidings.database.tables import dead, held
from tidings.errors import DatabaseUnavailable
from tidings.operations.dead import DeadLetters
from tidings.operations.held import HeldOperations
from tidings.operations.replay import find_start, send_back
from tidings.operations.selective_replay import cancel
from tidings.operations.skip import skip

pytestmark = pytest.mark.usefixtures("on_postgresql")

# A sequence keeps its value when the transaction is undone.
CONTENDED = (
    "CREATE SEQUENCE contended",
    """CREATE FUNCTION contend() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF nextval('contended') <= {times} THEN RAISE SQLSTATE '{state}' USING MESSAGE = 'in the way'; END IF;
    RETURN NULL; END $$""",
    """CREATE TRIGGER contended AFTER INSERT OR UPDATE OR DELETE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION contend()""",
)


def service_of(*, attempts: int, hold_key: bool = True) -> Service:
    """Return a service that holds the event of key "held", and gives it up after `attempts`."""
    service = Service("audit", tables=tables)
    hold = Hold(attempts=attempts, delay=3600, maximum=3600) if attempts else None
    retry = Retry(attempts=1, hold=hold, hold_key=hold_key)

    @service.on(Happened, retry=retry)
    async def refuse(event: Happened, context: Context, session: AsyncSession) -> None:
        if event.key == "held":
            raise ValueError("not this one")

    return service


async def has_one(service: Service, table: sa.Table) -> bool:
    return await count(service, table) == 1


async def contend(database: Database, table: str, times: int, state: str = "40P01") -> None:
    async with database.engine.begin() as connection:
        for statement in CONTENDED:
            await connection.exec_driver_sql(statement.format(table=table, times=times, state=state))


async def tried(database: Database) -> int:
    async with database.reading() as connection:
        return int(await connection.scalar(sa.text("SELECT last_value FROM contended")) or 0)


Command = Callable[[Database, Service, World], Awaitable[object]]


async def _retry_held(database: Database, service: Service, world: World) -> object:
    return await HeldOperations(database, "audit", await world.store.log_id()).retry()


async def _skip_held(database: Database, service: Service, world: World) -> object:
    return await HeldOperations(database, "audit", await world.store.log_id()).skip()


async def _drop_held(database: Database, service: Service, world: World) -> object:
    return await HeldOperations(database, "audit", await world.store.log_id()).drop()


async def _skip(database: Database, service: Service, world: World) -> object:
    (event,) = [each async for each in world.store.read_all() if each.type == "Happened"]
    return await skip(database, service, await world.store.log_id(), event)


async def _retry_dead(database: Database, service: Service, world: World) -> object:
    letters = DeadLetters(database, "audit", await world.store.log_id())
    return await letters.retry([letter.id for letter in await letters.list()])


async def _drop_dead(database: Database, service: Service, world: World) -> object:
    letters = DeadLetters(database, "audit", await world.store.log_id())
    return await letters.drop([letter.id for letter in await letters.list()])


async def _replay(database: Database, service: Service, world: World) -> object:
    start = await find_start(world.store, 0)
    assert start is not None
    await send_back(database, service, await world.store.log_id(), start)
    return None


async def _cancel(database: Database, service: Service, world: World) -> object:
    return await cancel(database, "audit", await world.store.log_id())


async def _resize(database: Database, service: Service, world: World) -> object:
    return await resize(database, "audit", 2)


COMMANDS: dict[str, tuple[Command, str, sa.Table]] = {
    "held retry": (_retry_held, "tidings_held", held),
    "held skip": (_skip_held, "tidings_held", held),
    "held drop": (_drop_held, "tidings_held", held),
    "skip": (_skip, "tidings_held", held),
    "dead retry": (_retry_dead, "tidings_dead", dead),
    "dead drop": (_drop_dead, "tidings_dead", dead),
    "replay": (_replay, "tidings_watermarks", held),
    "replay --cancel": (_cancel, "tidings_held", held),
    "partitions --resize": (_resize, "tidings_partitions", held),
}


@pytest.mark.parametrize("state", ["40P01", "40001"])
@pytest.mark.parametrize("name", COMMANDS)
async def test_a_command_is_done_again_after_a_deadlock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, state: str
) -> None:
    monkeypatch.setattr(contention, "PAUSES", (0.0, 0.0))
    command, table, where = COMMANDS[name]
    service = service_of(attempts=5 if where is held else 0)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="held", n=0))
        await until(lambda: has_one(service, where))
        async with connected(database_url(tmp_path, "audit")) as database:
            await contend(database, table, TIMES - 1, state)
            await command(database, service, world)
            assert await tried(database) >= TIMES


async def test_a_deadlock_that_never_ends_is_told_and_nothing_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_of(attempts=0)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="held", n=0))
        await until(lambda: has_one(service, dead))
        async with connected(database_url(tmp_path, "audit")) as database:
            monkeypatch.setattr(contention, "PAUSES", (0.0, 0.0))
            await contend(database, "tidings_dead", 100)
            with pytest.raises(DatabaseUnavailable, match="another transaction was in its way"):
                await _drop_dead(database, service, world)
            assert (await tried(database), await count(service, dead)) == (TIMES, 1)


@pytest.mark.parametrize("name", COMMANDS)
async def test_a_command_that_waits_for_a_lock_ends_and_names_who_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(contention, "LOCK_SECONDS", 2.0)
    monkeypatch.setattr(contention, "LOOK_SECONDS", 0.05)
    command, table, where = COMMANDS[name]
    if name == "replay --cancel":  # of held events, it deletes those of a replay only
        table = "tidings_watermarks"
    service = service_of(attempts=5 if where is held else 0)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="held", n=0))
        await until(lambda: has_one(service, where))
        url = database_url(tmp_path, "audit")
        async with connected(url) as database, connected(url) as other, other.transaction() as connection:
            pid = await connection.scalar(sa.select(sa.func.pg_backend_pid()))
            await connection.execute(sa.text(f"SELECT * FROM {table} FOR UPDATE"))
            with pytest.raises(DatabaseUnavailable) as caught:
                await command(database, service, world)
        assert f"process {pid} of the server" in str(caught.value)
        assert "idle in transaction" in str(caught.value)
        assert f"pg_terminate_backend({pid})" in str(caught.value)
        assert await count(service, where) == 1


class LockOrder:
    """Listens to databases, and notes transactions that lock tables in another order than everybody."""

    RANKS: Final = {"tidings_partitions": 0, "tidings_watermarks": 1, "tidings_held": 2, "tidings_dead": 2}
    LOCKS: Final = re.compile(
        r"(?:UPDATE|DELETE FROM|INSERT INTO) (tidings_\w+)|FROM (tidings_\w+).*FOR (?:UPDATE|SHARE)", re.DOTALL
    )

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.seen: set[str] = set()
        self._locked: dict[int, list[str]] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Listen to all databases while the block runs."""
        listeners = ("begin", self._begin), ("before_cursor_execute", self._execute)
        for event, listener in listeners:
            sa.event.listen(sa.Engine, event, listener)
        try:
            yield
        finally:
            for event, listener in listeners:
                sa.event.remove(sa.Engine, event, listener)
        assert self.wrong == []

    def _begin(self, connection: object) -> None:
        self._locked.pop(id(connection), None)

    def _execute(self, connection: object, cursor: object, statement: str, *rest: object) -> None:
        found = self.LOCKS.search(statement)
        table = (found[1] or found[2]) if found else ""
        if table not in self.RANKS:
            return
        self.seen.add(table)
        locked = self._locked.setdefault(id(connection), [])
        if table not in locked and any(self.RANKS[before] > self.RANKS[table] for before in locked):
            self.wrong.append(f"{table} after {locked}: {statement}")
        locked.append(table)


@pytest.mark.parametrize("name", COMMANDS)
async def test_commands_and_services_lock_in_one_order(tmp_path: Path, name: str) -> None:
    """Two transactions that lock the same rows the other way round would wait for each other."""
    command, _, where = COMMANDS[name]
    order, counted = LockOrder(), list[int]()
    service = service_of(attempts=5 if where is held else 0, hold_key=False)
    deployed = service_of(attempts=5)

    @deployed.on(Happened, since="start")
    async def count_them(event: Happened) -> None:
        counted.append(event.n)

    with order.kept():
        async with embedded(tmp_path, service) as world, connected(database_url(tmp_path, "audit")) as database:
            await world.append(Happened(key="held", n=0))
            await until(lambda: has_one(service, where))
            await command(database, service, world)
        async with embedded(tmp_path, deployed) as world:
            await world.append(Happened(key="fine", n=2))
            await until(lambda: 2 in counted)
    assert {"tidings_partitions", "tidings_watermarks", where.name} <= order.seen


async def test_handlers_of_one_event_are_locked_as_python_sorts_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service locks its held events one by one, a command many at once: whatever the database's collation is."""
    service, names = Service("audit", tables=tables), ["a", "B", "_c", "Z", "é", "b"]
    for name in names:

        @service.on(Happened, name=name, retry=Retry(attempts=1, hold=Hold(attempts=5, delay=3600, maximum=3600)))
        async def refuse(event: Happened) -> None:
            raise ValueError("not this one")

    async def all_held() -> bool:
        return await count(service, held) == 2 * len(names)

    async with embedded(tmp_path, service) as world, connected(database_url(tmp_path, "audit")) as database:
        await world.append(Happened(key="one", n=1), Happened(key="two", n=2))
        await until(all_held)
        async with database.transaction() as connection:
            await connection.exec_driver_sql('ALTER TABLE tidings_held ALTER handler TYPE text COLLATE "en-x-icu"')
        async with database.transaction() as connection:
            plain = await connection.scalars(sa.select(held.c.handler).order_by(held.c.position, held.c.handler))
            assert list(plain)[: len(names)] != sorted(names), "the collation orders them in its own way"
            rows = list(await connection.scalars(sa.select(held.c.handler).order_by(*turns(connection))))
            assert rows == sorted(names) * 2
        monkeypatch.setattr("tidings.operations.held.CHUNK", 1)
        assert await HeldOperations(database, "audit", await world.store.log_id()).retry() == 2 * len(names)


async def test_pauses_before_it_is_done_again_grow_and_are_drawn_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[tuple[int, float]] = []

    def pause(number: int, first: float, longest: float, *, jitter: float) -> float:
        pauses.append((number, jitter))
        assert nth_pause(number, first, longest) <= longest
        return 0.0

    @contention.again_when_contended
    async def never() -> None:
        raise DatabaseUnavailable("in the way")

    monkeypatch.setattr(contention, "nth_pause", pause)
    monkeypatch.setattr(contention, "is_contention", lambda error: True)
    with pytest.raises(DatabaseUnavailable, match="in the way"):
        await never()
    assert pauses == [(number, 1.0) for number in range(1, TIMES)]
