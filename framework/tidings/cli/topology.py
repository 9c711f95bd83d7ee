"""`tidings topology`: shows what services need on the bus and what it has, and makes users. It deletes nothing."""

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
from tidings.buses import ExportsUsers, ListsBindings, ListsLimits, ListsQueues, Subscription, TopologyItem
from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._find import find_services
from tidings.cli._output import Json, columns, facts, plain, say
from tidings.cli.verify import Targets
from tidings.errors import ConfigurationError, DatabaseUnavailable, TopologyMismatch
from tidings.operations.looking import existing_layout, subscriptions_of
from tidings.protocol.position import BUCKETS
from tidings.settings import Settings
from tidings.urls import redact

if TYPE_CHECKING:
    from tidings.service import Service

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="What services need on the bus, what it has, and what differs.")

_PLAN = {"missing": "make", "fits": "keep", "differs": "delete it by hand, then apply"}


@app.command()
@answering
async def plan(services: Targets = None, json: Json = False) -> int:
    """Show what services need, what the bus has, and what 'apply' would do."""
    _show(await _found(*await _needed(services)), json)
    return OK


@app.command()
@answering
async def diff(
    services: Targets = None,
    former: Annotated[
        list[str] | None,
        typer.Option("--former", metavar="NAME", help="A service that no longer exists. Repeat it for more."),
    ] = None,
    management: Annotated[
        str | None,
        typer.Option(metavar="URL", help="RabbitMQ's management API, http://host:15672, which lists all queues."),
    ] = None,
    json: Json = False,
) -> int:
    """Show what is missing or differs, queues that no service consumes, and foreign bindings. Exit code 1 if any.

    Queues of renamed and retired services are found through the databases, --former, or --management. Foreign bindings
    to Tidings' exchanges and queues are only seen with --management; without it, the command says so.
    """
    from tidings.cli._orphans import former_services, orphans, unneeded

    settings, subscriptions = await _needed(services)
    names = {subscription.service for subscription in subscriptions}
    past = await former_services(settings, names) | set(former or ())
    async with open_bus(settings.bus) as bus:
        there = await bus.inspect(subscriptions)
        found = [thing for thing in there if thing.state != "fits"]
        for thing in there:
            if thing.state == "fits" and thing.detail:
                print(plain(f"{thing.kind} {thing.name}: {thing.detail}"), file=sys.stderr)
        listed: list[TopologyItem] = []
        if management is not None:
            if not isinstance(bus, ListsQueues):
                raise Refused(USAGE, f"{redact(settings.bus)} cannot list its queues: leave out --management")
            listed = await bus.listed_queues(management)
        if isinstance(bus, ListsBindings):
            if management is None:
                print(bus.bindings_unseen, file=sys.stderr)
            else:
                found += await bus.foreign_bindings(management, subscriptions)
        if isinstance(bus, ListsLimits) and management is not None:
            found += await bus.limiting_policies(management, subscriptions)
        found += await unneeded(bus, subscriptions)
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

    Queues and exchanges with other properties are left alone and named (exit code 1). Services and relay do the same
    when they start.
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
        typer.Option(metavar="FILE", help="JSON object of passwords by user. Missing ones are made and added."),
    ] = None,
    partitions: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COUNT", help="Allow a service this many partitions. Repeat it for more."),
    ] = None,
) -> int:
    """Print RabbitMQ definitions: the exchanges, and a user with only the necessary rights for each service and relay.

    Each service's user may make the queues of its present partitions, and its number of connections is limited. Before
    'tidings partitions --resize', export and import with --partitions.

    'rabbitmqctl import_definitions FILE' imports them. They contain salted hashes; only the file of --secrets has the
    passwords. Without --secrets, nobody can log in until 'rabbitmqctl change_password USER' sets a password. Users have
    the names of their queues: tidings.SERVICE, tidings.relay.NAME. The vhost is that of TIDINGS_BUS, which need not
    answer.
    """
    settings, chosen = _chosen(services)
    names, relays = [service.name for service in chosen], list(dict.fromkeys(relay or ("main",)))
    counts = _counts(partitions or (), names)
    queues = [
        queue for service in chosen for queue in await _own_queues(settings, service, counts.get(service.name, 0))
    ]
    async with open_bus(settings.bus) as bus:
        if not isinstance(bus, ExportsUsers):
            raise Refused(USAGE, f"{redact(settings.bus)} has no users and permissions to export")
        passwords = _passwords(secrets, bus.users(names, relays)) if secrets is not None else {}
        say(json_.dumps(bus.definitions(queues, relays, passwords), indent=2))
    if secrets is None:
        print("Imported as they are, these users have no passwords; --secrets FILE makes some.", file=sys.stderr)
    return OK


def _counts(given: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Read --partitions: the number of partitions that each service may have. Raises `Refused`."""
    counts = {}
    for text in given:
        name, _, count = text.partition("=")
        if name not in names or not count.isdecimal() or not 1 <= int(count) <= BUCKETS:
            raise Refused(
                USAGE,
                f"--partitions {text!r}: write NAME=COUNT, with the name of a service that is exported ("
                f"{', '.join(names)}) and a number from 1 to {BUCKETS}",
            )
        counts[name] = int(count)
    return counts


async def _own_queues(settings: Settings, service: Service, count: int) -> list[Subscription]:
    """Return every queue that the service may make or delete.

    These are the queues of its layout, of the layout before, and of `count` partitions.
    """
    numbered = max(count, service.partitions or 1)
    try:
        layout = await existing_layout(settings, service)
        numbered = max(numbered, layout.count, layout.former)
        divided = numbered > 1 or layout.epoch > 0
    except (
        DatabaseUnavailable,
        ConfigurationError,
    ):  # it has no layout yet, or its database is not reachable from here
        divided = numbered > 1
    return [Subscription(service.name), *(Subscription(service.name, n, BUCKETS) for n in range(numbered * divided))]


def _passwords(file: Path, users: Sequence[str]) -> dict[str, str]:
    """Return the file's passwords, with new ones for missing users, which are stored before a hash is printed."""
    try:
        known = json_.loads(file.read_bytes()) if file.exists() else {}
        if not isinstance(known, dict) or not all(isinstance(word, str) and word for word in known.values()):
            raise ValueError("it is not an object of strings")
        if missing := [user for user in users if user not in known]:
            known |= {user: random.token_urlsafe(24) for user in missing}
            fresh = file.with_name(f"{file.name}.new")
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as writing:
                json_.dump(known, writing, indent=2)
                writing.flush()
                os.fsync(writing.fileno())
            fresh.replace(file)
    except (OSError, ValueError, RecursionError) as error:
        # The error must not quote the file; json's own errors do not either.
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
            f"TIDINGS_BUS is {redact(settings.bus)}: such a bus is in the process of its services, which make what "
            "they need. Set TIDINGS_BUS=amqp://user:password@host:5672/vhost",
        )
    return settings, list(find_services(targets or (), settings).values())


async def _needed(targets: Sequence[str] | None) -> tuple[Settings, list[Subscription]]:
    settings, services = _chosen(targets)
    return settings, [part for service in services for part in await subscriptions_of(settings, service)]


async def _found(settings: Settings, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
    async with open_bus(settings.bus) as bus:
        return await bus.inspect(subscriptions)


def _plan(thing: TopologyItem) -> str:
    return _PLAN[thing.state] if thing.kind in ("exchange", "queue") else "mend it by hand, see below"


def _show(found: Sequence[TopologyItem], json: bool) -> None:
    if json:
        for thing in found:
            say(facts(thing))
        return
    rows = [(thing.kind, thing.name, thing.state, thing.messages, thing.consumers, _plan(thing)) for thing in found]
    if rows:
        titles = ("KIND", "NAME", "STATE", "MESSAGES", "CONSUMERS", "PLAN")
        for line in columns(titles, rows, right=(3, 4)):
            say(line)
    for thing in found:
        if thing.detail:
            say(plain(f"{thing.name}: {thing.detail}"))  # the broker may quote foreign text
