"""`tidings topology`: what the bus must have for these services, and what it has. It deletes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from tidings.buses import Found, Subscription
from tidings.cli.exits import NO, OK, USAGE, Refused, answering
from tidings.cli.find import find_services
from tidings.cli.output import Json, columns, facts, say
from tidings.cli.settled import Targets
from tidings.errors import TopologyMismatch
from tidings.settings import Settings, open_bus, redact

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What the bus must have for the services, what it has, what differs.")

_PLAN = {"missing": "make", "fits": "keep", "differs": "delete it by hand, then apply"}


@app.command()
@answering
async def plan(services: Targets = None, json: Json = False) -> int:
    """Show what is needed, what is there, and what 'apply' would do."""
    _show(await _found(*_chosen(services)), json)
    return OK


@app.command()
@answering
async def diff(services: Targets = None, json: Json = False) -> int:
    """Show only what is missing or differs; exit code 1 when anything does."""
    found = [thing for thing in await _found(*_chosen(services)) if thing.state != "fits"]
    _show(found, json)
    if not found and not json:
        say("No differences.")
    return NO if found else OK


@app.command()
@answering
async def apply(services: Targets = None, json: Json = False) -> int:
    """Make what is missing, bind each queue, and show the outcome.

    What exists with other properties is left alone and named (exit code 1). Services and relay do the same when they
    start.
    """
    settings, subscriptions = _chosen(services)
    async with open_bus(settings.bus) as bus:
        for subscription in subscriptions:
            try:
                await bus.provision(subscription)
            except TopologyMismatch:
                continue  # the outcome names it
        found = await bus.inspect(subscriptions)
    _show(found, json)
    return OK if all(thing.state == "fits" for thing in found) else NO


def _chosen(targets: Sequence[str] | None) -> tuple[Settings, list[Subscription]]:
    settings = Settings()
    if settings.embedded_bus:
        raise Refused(
            USAGE,
            f"TIDINGS_BUS is {redact(settings.bus)}: such a bus lives in the process of its services, which make there "
            "what they need. Set TIDINGS_BUS=amqp://user:password@host:5672/vhost",
        )
    services = find_services(targets or (), settings)
    return settings, [Subscription(service.name) for service in services.values()]


async def _found(settings: Settings, subscriptions: Sequence[Subscription]) -> list[Found]:
    async with open_bus(settings.bus) as bus:
        return await bus.inspect(subscriptions)


def _show(found: Sequence[Found], json: bool) -> None:
    if json:
        for thing in found:
            say(facts(thing))
        return
    rows = [
        (thing.kind, thing.name, thing.state, thing.messages, thing.consumers, _PLAN[thing.state]) for thing in found
    ]
    if rows:
        titles = ("KIND", "NAME", "STATE", "MESSAGES", "CONSUMERS", "PLAN")
        for line in columns(titles, rows, right=(3, 4)):
            say(line)
    for thing in found:
        if thing.detail:
            say(f"{thing.name}: {thing.detail}")
