"""Queues that nobody serves: of services that were renamed or retired. They fill up to their limit, and stay.

Not every bus can list its queues, so names are looked for: in the services' databases, beside them, among what a person
says, and in what the bus lists where it can (`tidings.buses.ListsQueues`). Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from tidings.buses import EventBus, Found, Subscription
from tidings.errors import ConfigurationError, DatabaseUnavailable
from tidings.operations.looking import existing_database
from tidings.settings import Settings

__all__ = ["former_services", "orphans"]

MOST: Final = 1000
"""Files beside the services' databases that are looked into."""
PARTITIONS: Final = 8
"""Queues of a former service that are looked for, where it was divided."""
_PLACE: Final = "tidings-any-service"


async def former_services(settings: Settings, names: Collection[str]) -> set[str]:
    """Services that the databases know, and `names` lacks."""
    from tidings.database.engine import file_of
    from tidings.database.tables import floors

    asked = set(names)
    try:
        file = file_of(settings.database_of(_PLACE))
    except ConfigurationError:  # no database is named for services that have none of their own
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
            continue  # no database of Tidings', or one that does not answer, which 'tidings status' says
    return known - set(names)


async def orphans(
    bus: EventBus, former: Collection[str], served: Collection[str], listed: Sequence[Found]
) -> list[Found]:
    """Queues without a consumer that are none of `served`: those of former services, and those that were `listed`."""
    here = [Subscription(name, 0, 1) for name in sorted(former)]
    here += [Subscription(name, index, PARTITIONS) for name in sorted(former) for index in range(PARTITIONS)]
    found = [thing for thing in await bus.inspect(here) if thing.kind == "queue" and thing.state != "missing"]
    names = {thing.name for thing in found}
    found += [thing for thing in listed if thing.name not in names]
    return [
        Found("queue", thing.name, "differs", _remedy(thing.name), thing.messages, thing.consumers)
        for thing in found
        if thing.name not in served and not thing.consumers
    ]


def _remedy(name: str) -> str:
    return (
        "no service that is named here serves this queue. Was one renamed or retired? Then delete the queue (on "
        f"RabbitMQ: rabbitmqctl delete_queue {name}); else name its service too"
    )
