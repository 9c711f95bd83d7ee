"""One process of a test: the audited service, or a relay, told by its arguments where to die.

python -m tests.integration.worker service|relay [--name NAME] [--die POINT] [--after N]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal

from sqlalchemy import Column, Integer, MetaData, Table, Text
from sqlalchemy.ext.asyncio import AsyncSession

from tidings import Context, Event, Relay, Service, Settings, open_bus, open_store
from tidings.runtime import serve

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
    """A service that writes one audit row per event."""
    service = Service(name, tables=tables, prefetch=200)

    @service.on(Ticked)
    async def note(event: Ticked, context: Context, session: AsyncSession) -> None:
        await session.execute(audit.insert().values(key=event.key, number=event.number, event_id=str(context.event.id)))

    return service


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_acknowledging(after: int) -> None:
    """SIGKILL between the commit of a group and its acknowledgement, once `after` deliveries may be settled."""
    from tidings.buses import rabbitmq

    settle = rabbitmq._Consumer.settle_through

    def settle_or_die(self: rabbitmq._Consumer, tag: int) -> None:
        if tag >= after:
            die()
        settle(self, tag)

    rabbitmq._Consumer.settle_through = settle_or_die  # type: ignore[method-assign]


class MortalRelay(Relay):
    """SIGKILL when events were published and confirmed, before the checkpoint says so."""

    async def _store_checkpoint(self, position: int) -> None:
        die()


async def relay(name: str, mortal: bool) -> None:
    settings = Settings()
    async with open_store(settings.store) as store, open_bus(settings.bus) as bus:
        kind = MortalRelay if mortal else Relay
        await kind(store, bus, name=name, checkpoint_seconds=0.2, marker_seconds=1.0).run()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["service", "relay"])
    parser.add_argument("--name", default="audit")
    parser.add_argument("--die", choices=["before-acknowledging", "before-checkpoint"])
    parser.add_argument("--after", type=int, default=1)
    options = parser.parse_args()
    if options.die == "before-acknowledging":
        die_before_acknowledging(options.after)
    if options.role == "relay":
        asyncio.run(relay(options.name, mortal=options.die == "before-checkpoint"))
    else:
        asyncio.run(serve(audited(options.name)))


if __name__ == "__main__":
    main()
