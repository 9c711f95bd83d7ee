"""`tidings verify`: is every event settled in every service? It only reads."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Annotated

import typer

from tidings.cli.exits import NO, OK, answering
from tidings.cli.find import find_services
from tidings.cli.looking import existing_database, existing_store
from tidings.cli.output import GREEN, RED, Json, facts, paint, plain, say
from tidings.settings import Settings

__all__ = ["Targets", "verify"]

Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODULE:SERVICE", help="Or a name of one in TIDINGS_SERVICES; by default all of them."),
]


@answering
async def verify(services: Targets = None, json: Json = False) -> int:
    """Show that every event is settled in every service, or name those that are not (exit code 1).

    Settled is what a handler has done, and what is dead with its reason. When all is well it costs a few rows per
    service; otherwise it reads the log above the lowest floor.
    """
    from tidings.verify import verify as look

    settings = Settings()
    found = find_services(services or (), settings)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(existing_store(settings))
        pairs = [
            (service, await stack.enter_async_context(existing_database(settings, service.name)))
            for service in found.values()
        ]
        report = await look(store, pairs)
    if json:
        parts = [
            {"service": part.service, "ok": part.ok} | {name: getattr(part, name) for name in part.__slots__}
            for part in report.services
        ]
        say(facts({"log": report.log, "position": report.position, "ok": report.ok, "services": parts}))
    else:
        first, *rest = str(report).split("\n")
        say(paint(plain(first), GREEN if report.ok else RED))
        for line in rest:
            say(plain(line))
    return OK if report.ok else NO
