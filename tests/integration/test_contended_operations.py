"""An operator's command while another transaction is in its way, as a service's may be: it is done again by itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.databases import database_url
from tests.integration.embedded import Happened, World, count, embedded, tables, until
from tidings import Context, Hold, Retry, Service
from tidings.database.contention import TIMES
from tidings.database.engine import Database, connected
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


def service_of(*, attempts: int) -> Service:
    """Return a service that holds the event of key "held", and gives it up after `attempts`."""
    service = Service("audit", tables=tables)
    retry = Retry(attempts=1, hold=Hold(attempts=attempts, delay=3600, maximum=3600) if attempts else None)

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
async def test_a_command_is_done_again_after_a_deadlock(tmp_path: Path, name: str, state: str) -> None:
    command, table, where = COMMANDS[name]
    service = service_of(attempts=5 if where is held else 0)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="held", n=0))
        await until(lambda: has_one(service, where))
        async with connected(database_url(tmp_path, "audit")) as database:
            await contend(database, table, TIMES - 1, state)
            await command(database, service, world)
            assert await tried(database) >= TIMES


async def test_a_deadlock_that_never_ends_is_told_and_nothing_is_changed(tmp_path: Path) -> None:
    service = service_of(attempts=0)
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="held", n=0))
        await until(lambda: has_one(service, dead))
        async with connected(database_url(tmp_path, "audit")) as database:
            await contend(database, "tidings_dead", 100)
            with pytest.raises(DatabaseUnavailable, match="another transaction was in its way"):
                await _drop_dead(database, service, world)
            assert (await tried(database), await count(service, dead)) == (TIMES, 1)
