"""Store and databases as commands open them: to look at what is there. Looking makes no file and no table."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tidings.errors import ConfigurationError, StoreUnavailable
from tidings.settings import Settings, open_store, redact
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.database import Database

__all__ = ["existing_database", "existing_store", "writable_store"]


@asynccontextmanager
async def existing_store(settings: Settings) -> AsyncIterator[EventStore]:
    """The store of `settings`. Raises `StoreUnavailable` where there is none yet."""
    _shared(settings)
    scheme, _, path = settings.store.partition(":///")
    if scheme.lower() == "sqlite" and path not in ("", ":memory:") and _absent(path):
        raise StoreUnavailable(
            f"there is no log at {_full(path)}: go to its folder, or set TIDINGS_STORE. The first append, or "
            "the first run of a service, makes one"
        )
    async with open_store(settings.store) as store:
        yield store


@asynccontextmanager
async def writable_store(settings: Settings) -> AsyncIterator[EventStore]:
    """The store of `settings`, made where there is none."""
    _shared(settings)
    async with open_store(settings.store) as store:
        yield store


def _shared(settings: Settings) -> None:
    if settings.store.lower().startswith("memory:"):
        raise ConfigurationError(
            f"TIDINGS_STORE is {redact(settings.store)}: such a log lives in the process that made it, and no command "
            "can look into it. Use sqlite:///tidings.db to keep one"
        )


def _absent(path: str) -> bool:
    return not Path(path).exists()


def _full(path: str) -> Path:
    return Path(path).absolute()


@asynccontextmanager
async def existing_database(settings: Settings, service: str) -> AsyncIterator[Database | None]:
    """The database of a service, None where it has never run.

    Raises `ConfigurationError` for a URL that cannot work or tables of another version, `DatabaseUnavailable`.
    """
    import sqlalchemy as sa
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError
    from sqlalchemy.ext.asyncio import create_async_engine

    from tidings import sqlite_dialect
    from tidings.database import SCHEMA, Database, metadata

    url = settings.database_of(service)
    shown = redact(url)
    try:
        parsed = make_url(url)
        file = parsed.database if parsed.get_backend_name() == "sqlite" else None
        if parsed.drivername == "sqlite":
            parsed = parsed.set(drivername="sqlite+tidings")
        absent = file in ("", ":memory:") or (file and not file.startswith("file:") and _absent(file))
        engine = create_async_engine(parsed) if not absent else None
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, sa.exc.InvalidRequestError, ValueError) as error:
        raise ConfigurationError(
            f"TIDINGS_DATABASE {shown!r} cannot be used: {type(error).__name__}. Give a SQLAlchemy URL with an async "
            "driver that is installed: sqlite:///file.db, postgresql+asyncpg://..."
        ) from error
    if engine is None:
        yield None
        return
    if parsed.drivername == "sqlite+tidings":
        sqlite_dialect.register(engine.sync_engine)
    database = Database(engine, shown)
    try:
        async with database.reading() as connection:
            schema = metadata.tables["tidings_schema"]
            found = None
            if await connection.run_sync(lambda sync: sa.inspect(sync).has_table(schema.name)):
                found = await connection.scalar(sa.select(sa.func.max(schema.c.version)))
        if found is not None and found != SCHEMA:
            remedy = "start the service, which upgrades it" if found < SCHEMA else "use the Tidings that made it"
            raise ConfigurationError(
                f"database {shown} has Tidings tables of version {found}, this Tidings looks at {SCHEMA}: {remedy}"
            )
        yield None if found is None else database
    finally:
        await engine.dispose()
