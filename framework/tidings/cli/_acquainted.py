"""Checks whether a relay reads the log that the services follow, as far as it can read their databases."""

from __future__ import annotations

import asyncio
from typing import Final

import sqlalchemy as sa
import structlog

from tidings.cli._find import find_services
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings

__all__ = ["compare_logs", "other_logs"]

log = structlog.get_logger("tidings.relay")

AGAIN_SECONDS: Final = 60.0
"""Seconds between two checks: services and restored logs come and go."""


async def compare_logs(settings: Settings, relay: str) -> None:
    """Log which services of TIDINGS_SERVICES follow another log than the one the relay reads, until cancelled.

    Log nothing if the services, their databases or the log cannot be read from here: a relay works without services
    and databases.
    """
    if not settings.service_names:
        return
    while True:
        try:
            mine, others = await other_logs(settings)
        except (Exception, SystemExit) as error:  # the services' modules may do anything when they are imported
            log.debug("relay.cannot_compare_logs", relay=relay, reason=str(error))
        else:
            for service, theirs in others.items():
                log.error(
                    "relay.other_log",
                    relay=relay,
                    log=mine,
                    service=service,
                    follows=theirs,
                    advice="what this relay publishes is refused by the service. Is TIDINGS_STORE right? If the log "
                    f"was restored: stop everything, then 'tidings log adopt' for {service} (docs/restoring.md)",
                )
        await asyncio.sleep(AGAIN_SECONDS)


async def other_logs(settings: Settings) -> tuple[str, dict[str, str]]:
    """Return the log of the settings, and the log of each service that follows another one.

    Raises `TidingsError`, `Refused`.
    """
    from tidings.database.tables import floors

    async with existing_store(settings) as store:
        mine = str(await store.log_id())
    found: dict[str, str] = {}
    for service in find_services((), settings, needed=False).values():
        async with existing_database(settings, service.name) as database:
            if database is None:
                continue
            async with database.reading() as connection:
                query = sa.select(floors.c.log).where(floors.c.service == service.name).distinct()
                logs = set(await connection.scalars(query))
        if logs and mine not in logs:
            found[service.name] = min(logs)
    return mine, found
