"""Finds queues that no service consumes: those of renamed or retired services. They fill up to their limit, and stay.

Not every bus can list its queues. So names come from the services' databases, from files beside them, from the command
line, and from the bus if it can list queues (`tidings.buses.ListsQueues`). Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from tidings.buses import EventBus, Subscription, TopologyItem
from tidings.errors import ConfigurationError, DatabaseUnavailable
from tidings.operations.looking import existing_database
from tidings.relay.refusals import strays
from tidings.settings import Settings

__all__ = ["former_services", "orphans", "unneeded"]

MOST: Final = 1000
"""Files beside the services' databases to look into, at most."""
PARTITIONS: Final = 8
"""Partition queues to look for, for each former service."""
_PLACE: Final = "tidings-any-service"


async def former_services(settings: Settings, names: Collection[str]) -> set[str]:
    """Return the services that the databases know and that are not in `names`."""
    from tidings.database.engine import file_of
    from tidings.database.tables import floors

    asked = set(names)
    try:
        file = file_of(settings.database_of(_PLACE))
    except ConfigurationError:  # no database is configured for services in general
        file = None
    if file and _PLACE in file:
        path = Path(file)
        pattern = path.name.replace(_PLACE, "*")
        before, _, after = path.name.partition(_PLACE)
        if _PLACE in path.name:
            for found in sorted(path.parent.glob(pattern))[:MOST]:
                asked.add(found.name[len(before) : len(found.name) - len(after) or None])
    known: set[str] = set()
    for name in sorted(asked):
        try:
            async with existing_database(settings, name) as database:
                if database is not None:
                    async with database.reading() as connection:
                        known.update(await connection.scalars(sa.select(floors.c.service).distinct()))
        except (DatabaseUnavailable, ConfigurationError):
            continue  # not a database of Tidings, or one that does not answer: 'tidings status' tells that
    return known - set(names)


async def orphans(
    bus: EventBus, former: Collection[str], served: Collection[str], listed: Sequence[TopologyItem]
) -> list[TopologyItem]:
    """Return queues without a consumer that are not in `served`: those of former services, and those `listed`."""
    here = [Subscription(name, 0, 1) for name in sorted(former)]
    here += [Subscription(name, index, PARTITIONS) for name in sorted(former) for index in range(PARTITIONS)]
    found = [thing for thing in await bus.inspect(here) if thing.kind == "queue" and thing.state != "missing"]
    names = {thing.name for thing in found}
    found += [thing for thing in listed if thing.name not in names]
    return [
        TopologyItem("queue", thing.name, "differs", _remedy(thing.name), thing.messages, thing.consumers)
        for thing in found
        if thing.name not in served and not thing.consumers
    ]


async def unneeded(bus: EventBus, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
    """Return queues that are named like partitions that these services do not have.

    A service's broker user may make and bind every queue that it has permission for.
    """
    named = {part.queue: part.service for part in strays(subscriptions)}
    return [
        TopologyItem(
            "queue", thing.name, "differs", _unneeded(named[thing.name], thing), thing.messages, thing.consumers
        )
        for thing in await bus.inspect(strays(subscriptions))
        if thing.name in named and thing.state != "missing"
    ]


def _unneeded(service: str, queue: TopologyItem) -> str:
    told = f". {queue.detail}" if queue.detail else ""
    return (
        f"it is named like a partition of service {service!r}, which has no partition of that number. If it is bound "
        "to tidings.events, it gets every event, and can refuse or hoard them. Did somebody make it, or was the "
        f"service resized by hand? If nobody needs it (on RabbitMQ): rabbitmqctl delete_queue {queue.name}{told}"
    )


def _remedy(name: str) -> str:
    return (
        "no service that is named here consumes this queue. Was one renamed or retired? Then delete the queue (on "
        f"RabbitMQ: rabbitmqctl delete_queue {name}); else name its service too"
    )
