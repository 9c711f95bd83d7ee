"""`tidings partitions`: shows a service's partitions and how far each is, and changes their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidings.adapters import open_bus
from tidings.cli._exits import NO, OK, Refused, answering
from tidings.cli._find import named
from tidings.cli._output import Json, columns, facts, plain, say
from tidings.errors import BusUnavailable
from tidings.operations.looking import existing_database, existing_layout, existing_store
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.buses import TopologyItem
    from tidings.database.layout import Layout, Range
    from tidings.service import Service

__all__ = ["partitions"]


@answering
async def partitions(
    service: Annotated[str, typer.Argument(metavar="MODULE:SERVICE", help="Or a name of one in TIDINGS_SERVICES.")],
    resize: Annotated[int | None, typer.Option(metavar="N", help="Divide it into N partitions, 1 to 256.")] = None,
    json: Json = False,
) -> int:
    """Show a service's partitions with their buckets, floors and queues; or resize it.

    As many processes as there are partitions can work at once; more of them stand by. --resize works while the service
    runs: within seconds, its processes drain, make new queues, read from the log what the old ones contained, and go
    on. Nothing is lost, repeated or reordered. If no process runs, the next one does this when it starts. If the code
    declares partitions=N, change it to the new number or remove it: otherwise the processes end.
    """
    settings = Settings()
    target, found = named(service, settings)
    if resize is not None:
        before, after = await _resize(settings, found, resize)
        if json:
            say(facts({"service": found.name, "before": before.count, "partitions": after.count, "epoch": after.epoch}))
        else:
            _tell(target, found, before, after)
        return OK
    layout = await existing_layout(settings, found)
    rows, queues = await _ranges(settings, found), await _queues(settings, layout)
    parts = [
        {
            "partition": part.index,
            "first_bucket": part.buckets.start,
            "last_bucket": part.buckets.stop - 1,
            "floor": rows[part.buckets.start].floor if part.buckets.start in rows else None,
            "queue": part.queue,
        }
        | _queue(queues.get(part.queue))
        for part in layout.subscriptions
    ]
    if json:
        told = {"service": found.name, "partitions": layout.count, "epoch": layout.epoch}
        say(facts(told | {"rebound": not layout.queues_are_old, "parts": parts}))
        return OK
    say(f"{found.name}: partitions {layout.count}, epoch {layout.epoch}")
    for line in columns(
        [name.upper() for name in parts[0]], [tuple(part.values()) for part in parts], right=(0, 1, 2, 3)
    ):
        say(line)
    if layout.queues_are_old:
        say(f"It was resized, and no process has made the new queues yet: tidings run {plain(target)}")
    return OK


async def _resize(settings: Settings, service: Service, to: int) -> tuple[Layout, Layout]:
    from tidings.database.layout import resize

    async with existing_database(settings, service.name) as database:
        if database is None:
            raise Refused(
                NO,
                f"service {service.name!r} has never run here, so there is nothing to resize: declare "
                f"Service({service.name!r}, partitions={to}) before it first runs",
            )
        return await resize(database, service.name, to)


def _tell(target: str, service: Service, before: Layout, after: Layout) -> None:
    if before == after:
        say(f"{service.name} already has {after.count} partitions; nothing was changed.")
        return
    say(f"{service.name}: {before.count} partitions before, {after.count} now (epoch {after.epoch}).")
    if service.partitions not in (None, after.count):
        say(
            f"Its code declares partitions={service.partitions}, so its processes end now: declare "
            f"partitions={after.count}, or leave it out, and start them again."
        )
    else:
        say(f"A running process makes the new queues within seconds. If none runs: tidings run {plain(target)}")


async def _ranges(settings: Settings, service: Service) -> Mapping[int, Range]:
    """Return the ranges of a service by their first bucket."""
    from tidings.database.layout import ranges_of

    async with existing_store(settings) as store, existing_database(settings, service.name) as database:
        if database is None:
            return {}
        async with database.reading() as connection:
            found = await ranges_of(connection, service.name, await store.log_id())
        return {row.first: row for row in found}


async def _queues(settings: Settings, layout: Layout) -> Mapping[str, TopologyItem]:
    """Return the queues by name; nothing if the bus is in another process or does not answer."""
    if settings.embedded_bus:
        return {}
    try:
        async with open_bus(settings.bus) as bus:
            found = await bus.inspect(layout.subscriptions)
    except BusUnavailable as error:
        say(plain(f"The bus does not answer: {error}"))
        return {}
    return {thing.name: thing for thing in found if thing.kind == "queue"}


def _queue(found: TopologyItem | None) -> dict[str, Any]:
    if found is None:
        return {"state": "unknown", "messages": None, "consumers": None}
    return {"state": found.state, "messages": found.messages, "consumers": found.consumers}
