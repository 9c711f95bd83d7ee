"""What looks at a service sees its rows at one moment, whatever is committed between two of its statements."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import AsyncMock, patch
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.util import await_only

from tests.integration.databases import database_url
from tests.integration.embedded import Happened, StoreAround, embedded, until
from tests.integration.served import open_log
from tidings import EventStore, Hold, Retry, Service
from tidings.database.engine import Database, connected
from tidings.database.enrolment import enrol
from tidings.database.tables import dead, floors, handlers, held, spans, staged
from tidings.operations.dead import DeadLetters
from tidings.operations.held import HeldOperations, as_skipped
from tidings.operations.recount import recount
from tidings.operations.replay import find_start, plan
from tidings.operations.skip import Skip, skip_state
from tidings.operations.timeline import trace
from tidings.operations.verify import verify
from tidings.protocol.position import ALL_BUCKETS
from tidings.stores import EventData, RecordedEvent

pytestmark = pytest.mark.postgresql


@dataclass(frozen=True)
class Held:
    """A service that holds one event, with its log and its database as somebody sees them who looks at it."""

    service: Service
    store: EventStore
    database: Database
    other: Database
    log: UUID
    event: RecordedEvent


def refusing(*, since: str | None = None) -> Service:
    service = Service("shop")

    @service.on(Happened, retry=Retry(attempts=1, hold=Hold(attempts=9, delay=3600.0, maximum=3600.0)))
    async def refuse(event: Happened) -> None:
        if event.key == "held":
            raise ValueError("not this one")

    if since is not None:

        @service.on(Happened, since="start")
        async def count_them(event: Happened) -> None:
            """Nothing to do."""

    return service


@asynccontextmanager
async def holding(folder: Path, key: str = "held") -> AsyncIterator[Held]:
    service = refusing()
    async with embedded(folder, service) as world:
        await world.append(Happened(key=key))
        operations = HeldOperations(world.running[0].database, "shop", await world.store.log_id())
        if key == "held":

            async def is_held() -> bool:
                return await operations.count() == 1

            await until(is_held)
        else:
            await world.settled()
    url = database_url(folder, "shop")
    async with open_log(folder) as store, connected(url) as database, connected(url) as other:
        (event,) = [each async for each in store.read_all() if each.type == "Happened"]
        yield Held(service, store, database, other, await store.log_id(), event)


@contextmanager
def interrupted(database: Database, nth: int, act: Callable[[], Awaitable[object]]) -> Iterator[list[str]]:
    """Within the block, act after the `nth` statement. Gives the statements."""
    statements: list[str] = []

    def executed(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement)
        if len(statements) == nth:
            await_only(act())

    sa.event.listen(database.engine.sync_engine, "after_cursor_execute", executed)
    try:
        yield statements
    finally:
        sa.event.remove(database.engine.sync_engine, "after_cursor_execute", executed)


class Moving:
    """Somebody who moves the held event to another table and back, each in one transaction."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self._row: dict[str, Any] = {}

    async def __call__(self, to: str) -> None:
        async with self._held.other.transaction() as connection:
            if to == "held":
                await connection.execute(dead.delete())
                await connection.execute(staged.delete())
                await connection.execute(held.insert().values(self._row))
                return
            (row,) = (await connection.execute(sa.delete(held).returning(held))).all()
            self._row = {column.key: row._mapping[column] for column in held.c}
            if to == "dead":
                await connection.execute(dead.insert().values(as_skipped(row)))
                return
            names = ("bucket", "stream", "type", "data", "metadata", "is_json")
            values = {"service": "shop", "log": str(self._held.log), "event_id": str(uuid4()), "cause": row.position}
            await connection.execute(staged.insert().values(values | {name: getattr(row, name) for name in names}))


async def _verify(held: Held) -> int:
    report = await verify(held.store, [(held.service, held.database)])
    (part,) = report.services
    assert report.ok is not bool(part.held_count + part.staged_count)
    return part.held_count + part.staged_count + part.dead_count


async def _recount(held: Held) -> int:
    # The proof is noted after the look, in a transaction that keeps everybody else out.
    with patch("tidings.operations.recount.keep", AsyncMock()):
        found = await recount(held.store, [(held.service, held.database)])
    assert found.wrong == []
    (tally,) = found.services
    return tally.held + tally.dead


async def _why(held: Held) -> int:
    found = await trace(held.store, [(held.service, held.database)], held.event.position)
    (standing,) = found.event.services
    return int(standing.state in ("held", "dead"))


async def _replay(held: Held) -> int:
    start = await find_start(held.store, 0)
    assert start is not None
    found = await plan(held.store, held.database, held.service, start)
    return found.held + found.dead_again


async def _standing(held: Held) -> int:
    return int(await skip_state(held.database, held.service, held.log, held.event) in (Skip.HELD, Skip.RELEASED))


async def _list_held(held: Held) -> int:
    operations = HeldOperations(held.database, "shop", held.log)
    async with operations.at_one_moment():
        found = len(await operations.list())
        assert await operations.count() == sum(each.events for each in await operations.by_handler() or ()) == found
    return 1


async def _list_dead(held: Held) -> int:
    letters = DeadLetters(held.database, "shop", held.log)
    async with letters.at_one_moment():
        assert len(await letters.list()) == await letters.count() == len(await letters.ids())
    return 1


LOOKS: dict[str, tuple[Callable[[Held], Awaitable[int]], str, str]] = {
    "verify, from held to staged": (_verify, "held", "staged"),
    "verify, from held to dead": (_verify, "held", "dead"),
    "verify, from dead to held": (_verify, "dead", "held"),
    "verify --deep, from held to dead": (_recount, "held", "dead"),
    "verify --deep, from dead to held": (_recount, "dead", "held"),
    "why, from held to dead": (_why, "held", "dead"),
    "why, from dead to held": (_why, "dead", "held"),
    "replay --dry-run, from held to dead": (_replay, "held", "dead"),
    "replay --dry-run, from dead to held": (_replay, "dead", "held"),
    "skip --dry-run, from held to dead": (_standing, "held", "dead"),
    "skip --dry-run, from dead to held": (_standing, "dead", "held"),
    "held list": (_list_held, "held", "dead"),
    "dead list": (_list_dead, "held", "dead"),
}


async def test_an_event_that_moves_meanwhile_is_seen_once(tmp_path: Path) -> None:
    async with holding(tmp_path) as held_:
        move = Moving(held_)
        for look, (count, before, after) in LOOKS.items():
            if before == "dead":
                await move("dead")
            nth, ended = 0, False
            while not ended:
                nth += 1
                with interrupted(held_.database, nth, partial(move, after)) as statements:
                    assert await count(held_) == 1, f"{look}: it moved after statement {nth} of {statements}"
                ended = len(statements) < nth
                if not ended:
                    await move(before)
            assert nth > 2
            if before == "dead":
                await move("held")


OF_HANDLERS = (floors, handlers, spans)


async def test_a_handler_that_begins_meanwhile_is_behind(tmp_path: Path) -> None:
    """Before, it is to begin with the past; afterwards, it is behind. In between, all would be settled."""
    async with holding(tmp_path, key="fine") as found:
        deployed = refusing(since="start")

        async def begin() -> None:
            async with found.other.transaction() as connection:
                await enrol(connection, deployed, found.log, ALL_BUCKETS)

        async with found.other.reading() as connection:
            before = [(table, (await connection.execute(sa.select(table))).all()) for table in OF_HANDLERS]
        assert (await verify(found.store, [(found.service, found.database)])).ok
        nth = 1
        while True:
            with interrupted(found.database, nth, begin) as statements:
                report = await verify(found.store, [(deployed, found.database)])
                assert not report.ok, f"it began after statement {nth}: {statements}"
            if len(statements) < nth:
                break
            async with found.other.transaction() as connection:
                for table, rows in before:
                    await connection.execute(table.delete())
                    for row in rows:
                        await connection.execute(table.insert().values({c.key: row._mapping[c] for c in table.c}))
            nth += 1
        assert nth > 1


async def test_what_is_appended_while_why_reads_is_in_the_log_or_staged(tmp_path: Path) -> None:
    """It was staged when the log was read, and is appended before the rows are."""
    async with holding(tmp_path) as found:
        followed = str(uuid4())
        metadata = json.dumps({"$causationId": str(found.event.id), "$correlationId": str(found.event.id)}).encode()

        class Appending(StoreAround):
            """A store in which the event is appended as soon as the log has been read."""

            reads = 0

            async def read_all(self, **options: Any) -> AsyncIterator[RecordedEvent]:
                async for event in self.inner.read_all(**options):
                    yield event
                self.reads += "after" in options
                if self.reads == 1:
                    data = EventData("Followed", b"{}", metadata, id=UUID(followed))
                    await self.inner.append("followed-1", [data])

        store = cast("EventStore", Appending(found.store))
        timeline = await trace(store, [(found.service, found.database)], ("Happened-held", 0))
        assert [(caused.event_id, caused.waiting) for caused in timeline.event.tree()] == [(followed, None)]
        (standing,) = timeline.event.services
        assert standing.state == "held"
