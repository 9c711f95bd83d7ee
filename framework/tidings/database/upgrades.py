"""The version of Tidings' tables in a database, and how tables of an older version become those of today.

Everything happens in the transaction that is passed in.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.errors import ConfigurationError

__all__ = ["SCHEMA", "prepare", "version_of"]

SCHEMA: Final = 9
"""Version of the tables in `tidings.database.tables`."""
_MAKING_TABLES: Final = 0x74696469
"""Key of PostgreSQL's advisory lock."""

_UPGRADES: Final = {
    1: (
        ("tidings_dead", "partition_key", "TEXT"),
        ("tidings_dead", "holds_key", "BOOLEAN DEFAULT false NOT NULL"),
    ),
    2: (
        ("tidings_floors", "active", "VARCHAR(36)"),
        ("tidings_floors", "asked", "VARCHAR(36)"),
        ("tidings_watermarks", "replays", "INTEGER DEFAULT 0 NOT NULL"),
        ("tidings_held", "replayed", "BOOLEAN DEFAULT false NOT NULL"),
        ("tidings_dead", "replayed", "BOOLEAN DEFAULT false NOT NULL"),
    ),
    3: (
        ("tidings_held", "since", "DOUBLE PRECISION"),
        ("tidings_held", "code", "VARCHAR(32)"),
    ),
    4: (("tidings_staged", "aliases", "TEXT DEFAULT '' NOT NULL"),),
    5: (("tidings_floors", "handlers", "TEXT"),),
    6: (("tidings_staged", "requested", "BOOLEAN DEFAULT false NOT NULL"),),
    7: (
        ("tidings_held", "line", "TEXT DEFAULT '' NOT NULL"),
        ("tidings_dead", "line", "TEXT DEFAULT '' NOT NULL"),
    ),
    8: (
        ("tidings_watermarks", "receipt_at", "BIGINT DEFAULT -1 NOT NULL"),
        ("tidings_watermarks", "receipt", "TEXT DEFAULT '' NOT NULL"),
        ("tidings_floors", "receipted", "BIGINT DEFAULT -2 NOT NULL"),
    ),
}
"""Columns that each older version lacks; tables that are missing are made whole before."""

_FORMER_INDEXES: Final = (
    "tidings_held_by_key",
    "tidings_held_by_due",
    "tidings_held_failed",
    "tidings_held_keys",
    "tidings_dead_holding",
    "tidings_held_lines",
    "tidings_dead_lines",
)


async def version_of(connection: AsyncConnection) -> int | None:
    """Return the version of the tables, None where there are none. The table that says so must be there."""
    version: int | None = await connection.scalar(sa.select(sa.func.max(tables.schema.c.version)))
    return version


async def prepare(connection: AsyncConnection, shown: str) -> None:
    """Make the tables that are missing, and upgrade those that are there. `shown` names the database in errors.

    Raises `ConfigurationError` for tables of a newer Tidings.
    """
    if connection.dialect.name == "postgresql":  # of processes that start at once, one makes the tables
        # Whatever the database's default is: who has waited must see what was made meanwhile.
        await connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL READ COMMITTED"))
        await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MAKING_TABLES)))
    await connection.run_sync(tables.metadata.create_all)
    found = await version_of(connection)
    if found is not None and found > SCHEMA:
        raise ConfigurationError(
            f"database {shown} has Tidings tables of version {found}, this Tidings knows {SCHEMA}: upgrade it"
        )
    for version in range(found or SCHEMA, SCHEMA):
        for table, column, kind in _UPGRADES[version]:
            if column not in await connection.run_sync(_columns, table):
                await connection.execute(sa.text(f"ALTER TABLE {table} ADD COLUMN {column} {kind}"))
    if found is not None and found < SCHEMA:
        await connection.run_sync(_key_by_handler)
    await connection.run_sync(_index)
    # Written even where nothing changes: a database that cannot be written says so now.
    write = tables.schema.insert() if found is None else tables.schema.update()
    await connection.execute(write.values(version=SCHEMA))


def _index(connection: sa.Connection) -> None:
    """Tables that were made by an older version lack indexes, and keep some that nobody uses."""
    for table in tables.metadata.sorted_tables:
        for index in table.indexes:
            index.create(connection, checkfirst=True)
    for name in _FORMER_INDEXES:
        connection.execute(sa.text(f"DROP INDEX IF EXISTS {name}"))


def _key_by_handler(connection: sa.Connection) -> None:
    """Held events of older versions have one row for each position: add the handler to the primary key."""
    key = sa.inspect(connection).get_pk_constraint(tables.held.name)
    if "handler" in key["constrained_columns"]:
        return
    if connection.dialect.name != "sqlite":
        connection.execute(
            sa.text(
                f"ALTER TABLE {tables.held.name} DROP CONSTRAINT {key['name']}, "
                "ADD PRIMARY KEY (service, log, position, handler)"
            )
        )
        return
    # SQLite cannot change a primary key: the table is made anew.
    for index in sa.inspect(connection).get_indexes(tables.held.name):
        connection.execute(sa.text(f"DROP INDEX {index['name']}"))
    connection.execute(sa.text(f"ALTER TABLE {tables.held.name} RENAME TO {tables.held.name}_former"))
    tables.held.create(connection)
    former = sa.table(f"{tables.held.name}_former", *(sa.column(column.name) for column in tables.held.columns))
    connection.execute(tables.held.insert().from_select(list(tables.held.columns.keys()), sa.select(*former.columns)))
    connection.execute(sa.text(f"DROP TABLE {tables.held.name}_former"))


def _columns(connection: sa.Connection, table: str) -> set[str]:
    return {column["name"] for column in sa.inspect(connection).get_columns(table)}
