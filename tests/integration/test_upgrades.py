"""Databases of older versions, on SQLite and PostgreSQL: upgraded, they keep their rows and are like one made today."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.integration.databases import database_url
from tidings.database import tables, upgrades
from tidings.database.engine import open_database
from tidings.database.upgrades import SCHEMA

pytestmark = pytest.mark.postgresql

KEYED_BY_POSITION: Final = range(1, 6)
"""Versions whose held events had one row for each position."""
HELD: Final[dict[str, Any]] = {
    "service": "shop",
    "log": str(uuid4()),
    "position": 5,
    "bucket": 0,
    "partition_key": "k",
    "event_id": str(uuid4()),
    "stream": "order-1",
    "type": "Placed",
    "data": b"\x00\xff",
    "metadata": b"{}",
    "is_json": True,
    "attempts": 1,
    "reason": "ValueError: no",
    "version": 0,
    "ticks": 0,
    "tries": 0,
    "due": 0.0,
}


def former(table: sa.Table, version: int) -> sa.Table:
    """The table as a database of the version has it, without the indexes of today."""
    later = {
        column
        for since in range(version, SCHEMA)
        for name, column, _ in upgrades._UPGRADES[since]
        if name == table.name
    }
    by_position = table is tables.held and version in KEYED_BY_POSITION
    columns = [
        sa.Column(
            column.name,
            column.type,
            primary_key=column.primary_key and not (by_position and column.name == "handler"),
            autoincrement=column.autoincrement,
            nullable=column.nullable,
            server_default=getattr(column.server_default, "arg", None),
        )
        for column in table.columns
        if column.name not in later
    ]
    return sa.Table(table.name, sa.MetaData(), *columns)


async def age(connection: AsyncConnection, version: int) -> sa.Table:
    """Make the tables those of an older version, with a held event; returns the table of held events."""
    for table in (tables.dead, tables.staged, tables.watermarks, tables.floors, tables.held):
        before = former(table, version)
        await connection.run_sync(table.drop)
        await connection.run_sync(before.create)
    await connection.execute(sa.text("CREATE INDEX tidings_held_keys ON tidings_held (service, log, partition_key)"))
    await connection.execute(tables.schema.update().values(version=version))
    await connection.execute(before.insert().values(HELD | {"handler": "first"}))
    return before


def shape(connection: sa.Connection) -> dict[str, Any]:
    """What is to be the same in an upgraded database and in one that was made today."""
    look = sa.inspect(connection)
    return {
        table.name: {
            "columns": {column["name"]: column["nullable"] for column in look.get_columns(table.name)},
            "key": set(look.get_pk_constraint(table.name)["constrained_columns"]),
            "indexes": {index["name"] for index in look.get_indexes(table.name)} & _ours(table),
        }
        for table in tables.metadata.sorted_tables
    }


def _ours(table: sa.Table) -> set[Any]:
    return {index.name for index in table.indexes} | set(upgrades._FORMER_INDEXES)


@pytest.mark.parametrize("version", range(1, SCHEMA))
async def test_an_older_database_is_upgraded_to_what_is_made_today_and_keeps_its_rows(
    tmp_path: Path, version: int
) -> None:
    async with open_database(database_url(tmp_path, "new")) as fresh, fresh.reading() as connection:
        today = await connection.run_sync(shape)
    url = database_url(tmp_path, "old")
    async with open_database(url) as database, database.transaction() as connection:
        before = await age(connection, version)
        if version in KEYED_BY_POSITION:
            with pytest.raises(IntegrityError):
                async with connection.begin_nested():
                    await connection.execute(before.insert().values(HELD | {"handler": "second"}))
    for _ in range(2):
        async with open_database(url) as database, database.transaction() as connection:
            assert await connection.run_sync(shape) == today
            assert await upgrades.version_of(connection) == SCHEMA
    async with open_database(url) as database, database.transaction() as connection:
        await connection.execute(before.insert().values(HELD | {"handler": "second"}))
        rows = (await connection.execute(sa.select(tables.held).order_by(tables.held.c.handler))).all()
    assert [(row.handler, row.data, row.line, row.replayed) for row in rows] == [
        ("first", b"\x00\xff", "", False),
        ("second", b"\x00\xff", "", False),
    ]
