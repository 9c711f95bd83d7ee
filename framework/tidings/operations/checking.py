"""Verification for programs and tests: opens what the settings name, verifies once, and closes it. It never repairs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from tidings.errors import ConfigurationError, DatabaseUnavailable, TidingsError
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

    Looks once, while other processes may run the services. What is on the way at that moment counts as not settled. It
    creates no log, database or table. A service without a database has never run. `relay` names the relay whose
    checkpoint is compared. At most `limit` events of the log are read. Without `settings`, those of the environment
    apply. Raises `StoreUnavailable`, `DatabaseUnavailable`, and `ConfigurationError` for a log in memory, which only
    its own process can read: there, use `Runtime.settled`.
    """
    from tidings.operations.verify import verify as look

    async with opened_to_look(settings or Settings(), services) as (store, pairs):
        return await look(store, pairs, limit=limit, relay=relay)


@asynccontextmanager
async def opened_to_look(
    settings: Settings,
    services: Sequence[Declaration],
    unseen: Callable[[str, TidingsError], None] | None = None,
) -> AsyncIterator[tuple[EventStore, list[tuple[Declaration, Database | None]]]]:
    """Open the log, and each service's database, while the block runs.

    Raises what `verify` raises. With `unseen`, a service whose database cannot be opened is left out, and `unseen` is
    called with its name and the error.
    """
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(existing_store(settings))
        pairs: list[tuple[Declaration, Database | None]] = []
        for service in services:
            try:
                pairs.append((service, await stack.enter_async_context(existing_database(settings, service.name))))
            except (DatabaseUnavailable, ConfigurationError) as error:
                if unseen is None:
                    raise
                unseen(service.name, error)
        yield store, pairs
