"""What tests of the PostgreSQL store share: a plain connection to its database, and a database made in another way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
from sqlalchemy.engine import make_url

from tidings.testing.databases import drop_databases


def plain(url: str, **changes: str) -> str:
    """The URL as asyncpg and PostgreSQL's programs take it, maybe of another database or user."""
    return make_url(url).set(drivername="postgresql", **changes).render_as_string(hide_password=False)  # type: ignore[arg-type]


def database_of(url: str) -> str:
    return str(make_url(url).database)


@asynccontextmanager
async def connected(url: str, **changes: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(plain(url, **changes))
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def another(url: str, options: str) -> AsyncIterator[str]:
    """A further database on the same server: `options` follow its name in CREATE DATABASE."""
    name = f"tidings_{uuid4().hex[:12]}"
    async with connected(url, database="postgres") as connection:
        await connection.execute(f'CREATE DATABASE "{name}" {options}')
    try:
        yield plain(url, database=name)
    finally:
        await drop_databases(url, name)


@asynccontextmanager
async def locked(url: str) -> AsyncIterator[None]:
    """A transaction of somebody else that holds the log."""
    async with connected(url) as connection, connection.transaction():
        await connection.execute("LOCK TABLE tidings_log.writer IN EXCLUSIVE MODE")
        yield
