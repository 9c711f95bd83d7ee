"""Verification for programs and tests: opens what the settings name, looks once, and closes it. It never repairs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from tidings.modelling.declaration import Declaration
from tidings.operations.looking import existing_database, existing_store
from tidings.operations.report import Report
from tidings.settings import Settings
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.database.engine import Database

__all__ = ["opened_to_look", "verify"]


async def verify(
    *services: Declaration, settings: Settings | None = None, relay: str | None = None, limit: int | None = None
) -> Report:
    """Tell whether every event of the log is settled in these services, as `tidings verify --strict` does.

    It looks once, from beside the processes that run the services, and takes what is on the way at that moment for not
    settled; no log, database or table is made. A service without a database has never run. `relay` names the relay
    whose checkpoint is compared; at most `limit` events of the log are read. `settings` are by default those of the
    environment. Raises `StoreUnavailable`, `DatabaseUnavailable`, and `ConfigurationError` for a log in memory, which
    only its own process can read: there, use `Runtime.settled`.
    """
    from tidings.operations.verify import verify as look

    async with opened_to_look(settings or Settings(), services) as (store, pairs):
        return await look(store, pairs, limit=limit, relay=relay)


@asynccontextmanager
async def opened_to_look(
    settings: Settings, services: Sequence[Declaration]
) -> AsyncIterator[tuple[EventStore, list[tuple[Declaration, Database | None]]]]:
    """The log, and each service with its database, open while the block runs. Raises what `verify` does."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(existing_store(settings))
        yield (
            store,
            [
                (service, await stack.enter_async_context(existing_database(settings, service.name)))
                for service in services
            ],
        )
