"""No text in an event, an error or a name stops a service, whatever its database can hold; and none is changed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests.integration.databases import PLACE, database_url
from tests.integration.embedded import World, embedded, until
from tidings import Context, Event, Hold, Retry, Service
from tidings.database.engine import open_database
from tidings.database.tables import metadata
from tidings.database.texts import Text
from tidings.modelling.handlers import NAME_LENGTH
from tidings.operations.dead import DeadLetters
from tidings.testing.databases import PostgreSQL

NASTY: Final = (
    "nul \0 in it",
    "lone \ud800 surrogate",
    "four bytes 😀",
    "beyond latin1 €",
    "latin1 ü",
    "tidings-escaped:a\\u{0}b",
    "back\\slash",
    "long €" + 5000 * "ü",
)
LIMITS: Final = {"handler": NAME_LENGTH, "key": 250}
"""Characters in an indexed column, at most."""
PLACES: Final = ["sqlite", "postgresql", "latin1"]


@asynccontextmanager
async def latin1(folder: Path) -> AsyncIterator[None]:
    """Create the database of the service `audit` in LATIN1."""
    url = make_url(database_url(folder, "audit"))
    engine = create_async_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            await connection.exec_driver_sql(
                f"CREATE DATABASE {url.database} ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
            )
    finally:
        await engine.dispose()
    yield


@pytest.fixture(params=PLACES)
async def folder(
    request: pytest.FixtureRequest, tmp_path: Path, tidings_postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Path]:
    """The URL of a service's database, once for each kind."""
    async with tidings_postgresql.isolated() as url, AsyncExitStack() as stack:
        if request.param == "sqlite":
            monkeypatch.delenv(PLACE, raising=False)
        else:
            monkeypatch.setenv(PLACE, url)
        if request.param == "latin1":
            await stack.enter_async_context(latin1(tmp_path))
        yield tmp_path


TEXTS = st.one_of(
    st.sampled_from(NASTY), st.lists(st.one_of(st.characters(), st.characters(categories=["Cs"]))).map("".join)
)


def _row(table: sa.Table, texts: list[str]) -> dict[str, Any]:
    """Fill each column of a table. Columns of foreign texts get the given ones in turn."""
    row: dict[str, Any] = {}
    for n, column in enumerate(table.columns):
        kind = getattr(column.type, "impl_instance", column.type).python_type
        if isinstance(column.type, Text):
            row[column.key] = texts[n % len(texts)][: LIMITS.get(column.key)]
        elif column.key == "id":
            continue
        elif kind is str:
            row[column.key] = uuid4().hex[: column.type.length]  # type: ignore[attr-defined]
        else:
            row[column.key] = {int: 1, bool: True, float: 1.0, bytes: b"\0", datetime: datetime.now(UTC)}[kind]
    return row


async def test_every_column_gives_every_text_back_and_finds_it(folder: Path) -> None:
    async with open_database(database_url(folder, "audit")) as database:
        examples: list[list[str]] = []

        @settings(max_examples=40, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(TEXTS, min_size=1, max_size=5))
        def collect(texts: list[str]) -> None:
            examples.append(texts)

        collect()
        examples += [[text] for text in NASTY]
        async with database.transaction() as connection:
            for table in metadata.tables.values():
                columns = [column for column in table.columns if isinstance(column.type, Text)]
                for texts in examples if columns else ():
                    row = _row(table, texts)
                    await connection.execute(table.delete())
                    await connection.execute(table.insert(), [row])
                    equal = sa.and_(*(column == row[column.key] for column in columns))
                    one_of = sa.and_(*(column.in_([row[column.key], "else"]) for column in columns))
                    (found,) = await connection.execute(sa.select(*columns).where(equal, one_of))
                    assert list(found) == [row[column.key] for column in columns]
            await connection.rollback()


class Strange(Event, name="strange €😀", key="key"):
    key: str
    text: str = ""


class Answer(Event, name="answer 😀"):
    text: str = ""


@pytest.fixture
def service() -> Service:
    return Service("audit")


async def _dead(world: World, service: Service) -> Any:
    return await DeadLetters(world.running[0].database, service.name, await world.store.log_id()).list()


async def test_no_event_stops_a_service_whatever_its_names_and_errors_say(folder: Path, service: Service) -> None:
    """Events are emitted to streams with such names, and held and dead with such keys, types, handlers and reasons."""
    streams = [text[:60].encode("utf-8", "replace").decode() for text in NASTY]

    @service.on(
        Strange, name="händler 😀 \0", retry=Retry(attempts=1, hold=Hold(attempts=1, delay=0.01), hold_key=False)
    )
    async def handle(event: Strange, context: Context, session: AsyncSession) -> None:
        if event.text:
            raise ValueError(f"{NASTY[int(event.text)]} in an error")
        context.emit(f"answers-{event.key}", Answer(text=event.key))

    async with embedded(folder, service) as world:
        for n, stream in enumerate(streams):
            await service.append(f"in-{stream}", Strange(key=stream), Strange(key=stream, text=str(n)))

        async def all_dead() -> bool:
            return len(await _dead(world, service)) == len(streams)

        await until(all_dead, 40)
        await until(lambda: not world.running[0].partitions[0].pipeline.stages.stager, 20)  # type: ignore[union-attr]
        letters = {letter.stream: letter for letter in await _dead(world, service)}
        assert letters.keys() == {f"in-{stream}" for stream in streams}
        for n, stream in enumerate(streams):
            letter = letters[f"in-{stream}"]
            assert letter.reason == f"ValueError: {NASTY[n]} in an error"[: len(letter.reason)]
            assert (letter.handler, letter.type) == ("händler 😀 \0", "strange €😀")
        answered = {event.stream async for event in world.store.read_all() if event.type == "answer 😀"}
        assert answered == {f"answers-{stream}" for stream in streams}
