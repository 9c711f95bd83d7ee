"""Opens store and databases for commands that look at what is there, without creating any file or table."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tidings.adapters import open_store
from tidings.buses import Subscription
from tidings.errors import ConfigurationError, DatabaseUnavailable, StoreUnavailable
from tidings.settings import Settings
from tidings.stores import EventStore
from tidings.urls import redact

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.database.layout import Layout
    from tidings.modelling.declaration import Declaration

__all__ = ["existing_database", "existing_layout", "existing_store", "no_log", "subscriptions_of", "writable_store"]

ANSWER_SECONDS: Final = 10.0
"""Seconds to wait for a database's first answer. A paused server accepts connections, but does not answer."""


@asynccontextmanager
async def existing_store(settings: Settings) -> AsyncIterator[EventStore]:
    """Open the store of `settings`. Raises `StoreUnavailable` if there is none yet."""
    _shared(settings)
    scheme, _, path = settings.store.partition(":///")
    if scheme.lower() == "sqlite" and path not in ("", ":memory:") and _absent(path):
        raise no_log(path)
    async with open_store(settings.store) as store:
        yield store


@asynccontextmanager
async def writable_store(settings: Settings) -> AsyncIterator[EventStore]:
    """Open the store of `settings`, and create it if there is none."""
    _shared(settings)
    async with open_store(settings.store) as store:
        yield store


def no_log(path: str | Path) -> StoreUnavailable:
    """Return the error for an embedded log that does not exist."""
    return StoreUnavailable(
        f"there is no log at {Path(path).absolute()}: go to its folder, or set TIDINGS_STORE. The first append, or the "
        "first run of a service, makes one"
    )


def _shared(settings: Settings) -> None:
    if settings.store.lower().startswith("memory:"):
        raise ConfigurationError(
            f"TIDINGS_STORE is {redact(settings.store)}: such a log lives in the process that made it, and no command "
            "can look into it. Use sqlite:///tidings.db to keep one"
        )


def _absent(path: str) -> bool:
    return not Path(path).exists()


async def subscriptions_of(settings: Settings, service: Declaration) -> list[Subscription]:
    """Return what a service needs on the bus, as its database says.

    If the database is not configured here or does not answer, return what the service declares.
    """
    try:
        return (await existing_layout(settings, service)).subscriptions
    except (DatabaseUnavailable, ConfigurationError):
        count = service.partitions or 1
        return [Subscription(service.name, index, count) for index in range(count)]


async def existing_layout(settings: Settings, service: Declaration) -> Layout:
    """Return how a service is divided into partitions, or will be when it first runs.

    Raises what `existing_database` raises.
    """
    from tidings.database.layout import Layout, layout_of

    async with existing_database(settings, service.name) as database:
        if database is not None:
            async with database.reading() as connection:
                found = await layout_of(connection, service.name)
            return found or Layout(service.name, 1, epoch=0, rebound=0, former=1)
    count = service.partitions or 1
    return Layout(service.name, count, epoch=0, rebound=0, former=count)


@asynccontextmanager
async def existing_database(settings: Settings, service: str) -> AsyncIterator[Database | None]:
    """Open the database of a service; None if the service has never run.

    Raises `ConfigurationError` for an unusable URL or tables of another version, and `DatabaseUnavailable`.
    """
    from tidings.database.engine import connected, file_of, prepared

    url = settings.database_of(service)
    file = file_of(url)
    if file == "" or (file and not file.startswith("file:") and _absent(file)):
        yield None
        return
    async with connected(url) as database:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                there = await prepared(database)
        except TimeoutError:
            raise DatabaseUnavailable(
                f"database {database.shown} did not answer within {ANSWER_SECONDS:g} s: its server is paused, "
                "overloaded or cut off; look there"
            ) from None
        yield database if there else None
