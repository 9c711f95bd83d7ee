"""`tidings topology`: what the bus must have for these services, and what it has; users for it. It deletes nothing."""

from __future__ import annotations

import json as json_
import os
import secrets as random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidings.adapters import open_bus
from tidings.buses import ExportsUsers, Found, ListsQueues, Subscription
from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._find import find_services
from tidings.cli._output import Json, columns, facts, plain, say
from tidings.cli.verify import Targets
from tidings.errors import TopologyMismatch
from tidings.operations.looking import subscriptions_of
from tidings.settings import Settings
from tidings.urls import redact

if TYPE_CHECKING:
    from tidings.service import Service

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What the bus must have for the services, what it has, what differs.")

_PLAN = {"missing": "make", "fits": "keep", "differs": "delete it by hand, then apply"}


@app.command()
@answering
async def plan(services: Targets = None, json: Json = False) -> int:
    """Show what is needed, what is there, and what 'apply' would do."""
    _show(await _found(*await _needed(services)), json)
    return OK


@app.command()
@answering
async def diff(
    services: Targets = None,
    former: Annotated[
        list[str] | None, typer.Option("--former", metavar="NAME", help="A service that there was once; repeat it.")
    ] = None,
    management: Annotated[
        str | None,
        typer.Option(metavar="URL", help="RabbitMQ's management API, http://host:15672, which lists all queues."),
    ] = None,
    json: Json = False,
) -> int:
    """Show only what is missing or differs, and queues that nobody serves; exit code 1 when there is anything.

    Queues of renamed and retired services are known by the databases, by --former, or by --management.
    """
    from tidings.cli._orphans import former_services, orphans

    settings, subscriptions = await _needed(services)
    names = {subscription.service for subscription in subscriptions}
    past = await former_services(settings, names) | set(former or ())
    async with open_bus(settings.bus) as bus:
        found = [thing for thing in await bus.inspect(subscriptions) if thing.state != "fits"]
        listed: list[Found] = []
        if management is not None:
            if not isinstance(bus, ListsQueues):
                raise Refused(USAGE, f"{redact(settings.bus)} cannot list its queues: leave out --management")
            listed = await bus.listed_queues(management)
        found += await orphans(bus, past - names, {subscription.queue for subscription in subscriptions}, listed)
    _show(found, json)
    if json and not found:
        say(facts({"differences": 0}))
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
    settings, subscriptions = await _needed(services)
    async with open_bus(settings.bus) as bus:
        for subscription in subscriptions:
            try:
                await bus.provision(subscription)
            except TopologyMismatch:
                continue  # the outcome names it
        found = await bus.inspect(subscriptions)
    _show(found, json)
    return OK if all(thing.state == "fits" for thing in found) else NO


@app.command()
@answering
async def export(
    services: Targets = None,
    relay: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A relay's name; by default 'main'.")] = None,
    secrets: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Passwords, a JSON object by user; those it lacks are made and added."),
    ] = None,
) -> int:
    """Print RabbitMQ definitions: a user for each service and relay who may do only what it needs, and the exchanges.

    'rabbitmqctl import_definitions FILE' takes them. They hold salted hashes; the passwords themselves are in the file
    of --secrets alone, and without it nobody can log in before 'rabbitmqctl change_password USER'. Users are named as
    their queues: tidings.SERVICE, tidings.relay.NAME. The vhost is that of TIDINGS_BUS, which need not answer.
    """
    settings, chosen = _chosen(services)
    names, relays = [service.name for service in chosen], list(dict.fromkeys(relay or ("main",)))
    async with open_bus(settings.bus) as bus:
        if not isinstance(bus, ExportsUsers):
            raise Refused(USAGE, f"{redact(settings.bus)} has no users and permissions that could be exported")
        passwords = _passwords(secrets, bus.users(names, relays)) if secrets is not None else {}
        say(json_.dumps(bus.definitions(names, relays, passwords), indent=2))
    if secrets is None:
        print("Imported like this, these users have no passwords; --secrets FILE makes some.", file=sys.stderr)
    return OK


def _passwords(file: Path, users: Sequence[str]) -> dict[str, str]:
    """What the file has, and for whom it has nothing a new one, kept there before anybody hears of its hash."""
    try:
        known = json_.loads(file.read_bytes()) if file.exists() else {}
        if not isinstance(known, dict) or not all(isinstance(word, str) and word for word in known.values()):
            raise ValueError("it is no object of texts")
        if missing := [user for user in users if user not in known]:
            known |= {user: random.token_urlsafe(24) for user in missing}
            fresh = file.with_name(f"{file.name}.new")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as writing:
                json_.dump(known, writing, indent=2)
                writing.flush()
                os.fsync(writing.fileno())
            fresh.replace(file)
    except (OSError, ValueError, RecursionError) as error:
        # Never with a part of the file, which json's own errors do not quote either.
        raise Refused(
            USAGE,
            f"the passwords in {str(file)!r} cannot be kept: {error}. Name a file that this user may write, with JSON "
            'as {"tidings.order": "..."} in it, or none yet',
        ) from error
    return known


def _chosen(targets: Sequence[str] | None) -> tuple[Settings, list[Service]]:
    settings = Settings()
    if settings.embedded_bus:
        raise Refused(
            USAGE,
            f"TIDINGS_BUS is {redact(settings.bus)}: such a bus lives in the process of its services, which make there "
            "what they need. Set TIDINGS_BUS=amqp://user:password@host:5672/vhost",
        )
    return settings, list(find_services(targets or (), settings).values())


async def _needed(targets: Sequence[str] | None) -> tuple[Settings, list[Subscription]]:
    settings, services = _chosen(targets)
    return settings, [part for service in services for part in await subscriptions_of(settings, service)]


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
            say(plain(f"{thing.name}: {thing.detail}"))  # what the broker says may quote others
