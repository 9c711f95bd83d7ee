"""Store and databases as commands open them: to look at what is there. Looking makes no file and no table."""

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

__all__ = ["existing_database", "existing_layout", "existing_store", "subscriptions_of", "writable_store"]

ANSWER_SECONDS: Final = 10.0
"""Seconds that a command waits for a database's first answer. A paused server accepts connections and says nothing."""


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


async def subscriptions_of(settings: Settings, service: Declaration) -> list[Subscription]:
    """What a service needs on the bus, as its database says; where that is not named here, or does not answer, as the
    service declares."""
    try:
        return (await existing_layout(settings, service)).subscriptions
    except (DatabaseUnavailable, ConfigurationError):
        count = service.partitions or 1
        return [Subscription(service.name, index, count) for index in range(count)]


async def existing_layout(settings: Settings, service: Declaration) -> Layout:
    """How a service is divided, or will be when it first runs. Raises what `existing_database` does."""
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
    """The database of a service, None where it has never run.

    Raises `ConfigurationError` for a URL that cannot work or tables of another version, `DatabaseUnavailable`.
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
