"""Queues that nobody serves: of services that were renamed or retired. They fill up to their limit, and stay.

AMQP lists no queues, so names are looked for: in the services' databases, beside them, among what a person says, and in
RabbitMQ's management API where one is named. Nothing is changed.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.error import URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

import sqlalchemy as sa

from tidings.buses import EventBus, Found, Subscription
from tidings.cli._exits import UNAVAILABLE, USAGE, Refused
from tidings.errors import ConfigurationError, DatabaseUnavailable
from tidings.operations.looking import existing_database
from tidings.settings import Settings
from tidings.urls import redact

__all__ = ["former_services", "listed_queues", "orphans"]

SECONDS: Final = 10.0
"""Seconds to wait for the management API."""
MOST: Final = 1000
"""Files beside the services' databases that are looked into."""
PREFIX: Final = "tidings."
PARTITIONS: Final = 8
"""Queues of a former service that are looked for, where it was divided."""
_PLACE: Final = "tidings-any-service"


async def former_services(settings: Settings, names: Collection[str]) -> set[str]:
    """Services that the databases know, and `names` lacks."""
    from tidings.database.engine import file_of, floors

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
        "no service that is named here serves this queue. Was one renamed or retired? Then delete the queue: "
        f"rabbitmqctl delete_queue {name}; else name its service too"
    )


async def listed_queues(management: str, user: str, password: str, vhost: str, exchange: str) -> list[Found]:
    """Queues that are bound to the exchange, as the management API at this URL says. Raises `Refused`."""
    parts = urlsplit(management)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refused(USAGE, f"--management {redact(management)!r}: write http://host:15672")
    user, password = unquote(parts.username or user), unquote(parts.password or password)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    base = f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path.rstrip('/')}/api"
    token = base64.b64encode(f"{user}:{password}".encode()).decode()

    def ask(path: str) -> Any:
        request = Request(f"{base}/{path}", headers={"Authorization": f"Basic {token}"})
        with urlopen(request, timeout=SECONDS) as answer:  # nosec B310: the scheme is checked above
            return json.load(answer)

    try:
        where = quote(vhost, safe="")
        bound = await asyncio.to_thread(ask, f"exchanges/{where}/{quote(exchange, safe='')}/bindings/source")
        queues = await asyncio.to_thread(ask, f"queues/{where}")
        there = {str(queue["name"]): queue for queue in queues}
        names = {str(one["destination"]) for one in bound if one["destination_type"] == "queue"}
        names |= {name for name in there if re.match(re.escape(PREFIX) + r"(?!relay\.)", name)}
        return [
            Found("queue", name, "fits", "", there[name].get("messages_ready"), there[name].get("consumers"))
            for name in sorted(names & there.keys())
        ]
    except (URLError, OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            UNAVAILABLE, f"the management API at {redact(management)} does not say which queues there are: {error}"
        ) from error
