"""One process of a test: the audited service, or a relay.

python -m tests.integration.worker service|relay [--name NAME]
"""

from __future__ import annotations

import argparse
import asyncio

from sqlalchemy import Column, Integer, MetaData, Table, Text
from sqlalchemy.ext.asyncio import AsyncSession

from tidings import Context, Event, Relay, Service, Settings, open_bus, open_store
from tidings.hosting.serve import serve

tables = MetaData()
audit = Table(
    "audit",
    tables,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("key", Text, nullable=False),
    Column("number", Integer, nullable=False),
    Column("event_id", Text, nullable=False),
    comment="one row per effect; nothing here forbids a second one",
)


class Ticked(Event, key="key"):
    """`number` counts up within `key`."""

    key: str
    number: int


def audited(name: str) -> Service:
    """Declare a service that writes one audit row per event."""
    service = Service(name, tables=tables, prefetch=200)

    @service.on(Ticked)
    async def note(event: Ticked, context: Context, session: AsyncSession) -> None:
        await session.execute(audit.insert().values(key=event.key, number=event.number, event_id=str(context.event.id)))

    return service


async def relay(name: str) -> None:
    settings = Settings()
    async with open_store(settings.store) as store, open_bus(settings.bus) as bus:
        await Relay(store, bus, name=name, checkpoint_seconds=0.2, marker_seconds=1.0).run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["service", "relay"])
    parser.add_argument("--name", default="audit")
    options = parser.parse_args()
    if options.role == "relay":
        asyncio.run(relay(options.name))
    else:
        asyncio.run(serve(audited(options.name)))


if __name__ == "__main__":
    main()
