"""Databases in memory that open at once: their tables are made once per process and copied from then on.

All of them share what SQLAlchemy has compiled, which otherwise takes most of the time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from tidings.database.engine import Database, open_database

__all__ = ["InMemory", "in_memory"]

_URL: Final = "sqlite:///:memory:"


class InMemory(Database):
    """A database in memory, and the connection that it lives in."""

    def __init__(self, engine: AsyncEngine, template: bytes) -> None:
        self.connections: list[sqlite3.Connection] = []
        self._template = template
        sa.event.listen(engine.sync_engine, "connect", self._fill)
        super().__init__(engine, _URL)

    def _fill(self, connection: Any, record: object) -> None:
        if self._template:
            connection.deserialize(self._template)
        self.connections.append(connection)


_models: list[Engine] = []
"""An engine like those of all databases in memory, once there was one."""
_templates: WeakKeyDictionary[sa.MetaData, tuple[tuple[str, ...], bytes]] = WeakKeyDictionary()
"""Of a service's tables: their names, and a database that has them."""
_NONE: Final = sa.MetaData()


@asynccontextmanager
async def in_memory(tables: sa.MetaData | None) -> AsyncIterator[InMemory]:
    """Open an empty database with the tables of Tidings and of a service. Raises as `open_database`."""
    metadata = _NONE if tables is None else tables
    names = tuple(sorted(metadata.tables))
    known = _templates.get(metadata)
    if known is None or known[0] != names:
        known = _templates[metadata] = names, await _made(metadata)
    model = _models[0]
    engine = Engine(model.pool.recreate(), model.dialect, model.url, hide_parameters=True)
    engine._compiled_cache = model._compiled_cache
    database = InMemory(AsyncEngine(engine), known[1])
    try:
        yield database
    finally:
        await database.engine.dispose()


async def _made(tables: sa.MetaData) -> bytes:
    async with open_database(_URL, tables) as database:
        if not _models:
            _models.append(database.engine.sync_engine)
        pooled = await database.engine.raw_connection()
        try:
            connection: Any = pooled.driver_connection
            return bytes(connection.serialize())
        finally:
            pooled.close()
