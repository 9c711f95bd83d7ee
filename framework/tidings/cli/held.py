"""`tidings held`: what failed for now and is tried again, and what becomes of it. Nothing is changed without a yes."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tidings.cli._exits import NO, OK, Refused, answering
from tidings.cli._find import event_named, find_services
from tidings.cli._output import BOLD, Json, columns, document_lines, facts, paint, plain, say
from tidings.cli._selecting import (
    BIGGEST,
    All,
    Choice,
    DryRun,
    Error,
    HandlerName,
    Key,
    Limit,
    Since,
    Stream,
    Type,
    Until,
    selected,
)
from tidings.cli.dead import Of, Yes, chosen, confirmed
from tidings.cli.verify import Targets
from tidings.operations.looking import existing_database, existing_store
from tidings.operations.report import moment_of
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.operations.held import HeldEntry, HeldOperations
    from tidings.service import Service

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Events that failed for now and are tried again: list, show, retry, skip.")

Events = Annotated[
    list[str] | None,
    typer.Argument(metavar="EVENT", help="A position, an id, or STREAM@VERSION, as 'held list' shows."),
]


@app.command("list")
@answering
async def list_(
    services: Targets = None,
    handler: HandlerName = None,
    error: Error = None,
    type: Type = None,
    key: Key = None,
    stream: Stream = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(min=1, max=BIGGEST, help="At most so many of each service.")] = 100,
    json: Json = False,
) -> int:
    """List held events, in the order of the log, and how many each handler has failed at.

    What waits behind an earlier event of its partition key is listed too, without attempts of its own.
    """
    from tidings.database.held_code import reason_in_code

    settings = Settings()
    selection = selected(handler, error, type, key, stream, since, until)
    rows: list[tuple[Any, ...]] = []
    counted: list[str] = []
    shown = total = 0
    for service in find_services(services or (), settings).values():
        async with _opened(settings, service) as held:
            found = await held.list(selection, limit=limit) if held else []
            of = await held.count(selection) if held else 0
            counts = await held.by_handler() if held else ()
        shown, total = shown + len(found), total + of
        counted += [
            f"{service.name}.{count.handler}: {count.events} failed, the oldest held since "
            f"{moment_of(count.since) if count.since is not None else 'an older version'}: "
            f"{reason_in_code(service, count.handler, None, count.reason)}"
            for count in counts
        ]
        for entry in found:
            if json:
                say(facts(_facts(service, entry)))
                continue
            due = moment_of(entry.due) if entry.attempts else None
            place = f"{entry.stream}@{entry.version}"
            why = reason_in_code(service, entry.handler, entry.type, entry.reason).partition("\n")[0]
            held_at = None if entry.since is None else moment_of(entry.since)
            rows.append((service.name, entry.position, held_at, due, entry.attempts, entry.type, place, why))
    if json:
        if shown < total or not total:
            say(facts({"shown": shown, "total": total}))
        return OK
    if rows:
        titles = ("SERVICE", "POSITION", "HELD", "NEXT TRY", "ATTEMPTS", "TYPE", "EVENT", "REASON")
        for line in columns(titles, rows, right=(1, 4)):
            say(line)
        for line in counted:
            say(plain(line))
    if shown < total:
        say(f"{shown} of {total} are shown; --limit {total} shows all of them")
    elif not total:
        print("No held events.", file=sys.stderr)
    return OK


@app.command()
@answering
async def show(
    event: Annotated[str, typer.Argument(metavar="EVENT", help="A position, an id, or STREAM@VERSION.")],
    service: Of = None,
    json: Json = False,
) -> int:
    """Show one held event whole: the event, its attempts, the reason, the traceback."""
    from tidings.database.held_code import reason_in_code

    settings = Settings()
    of = chosen(service, settings)
    async with _opened(settings, of) as held:
        existing = _existing(held)
        entry = await existing.get(await _position(existing, event))
    if json:
        say(facts(_facts(of, entry)))
        return OK
    reason = reason_in_code(of, entry.handler, entry.type, entry.reason)
    say(paint(f"held event at position {entry.position} of {of.name}: {plain(reason.partition(chr(10))[0])}", BOLD))
    for name in ("stream", "version", "type", "event_id", "key", "handler", "attempts", "tries"):
        say(f"  {name:<9} {plain(str(getattr(entry, name)))}")
    if entry.since is not None:
        say(f"  {'held':<9} since {moment_of(entry.since)}")
    say(f"  {'next try':<9} {moment_of(entry.due) if entry.attempts else 'after the earlier events of its key'}")
    documents = (("data", entry.data), ("metadata", entry.metadata), ("detail", (entry.detail or "").rstrip().encode()))
    for name, content in documents:
        if content:
            for line in document_lines(name, content, is_json=name != "detail"):
                say(line)
    return OK


@app.command()
@answering
async def retry(
    events: Events = None,
    everything: All = False,
    handler: HandlerName = None,
    error: Error = None,
    type: Type = None,
    key: Key = None,
    stream: Stream = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    service: Of = None,
    json: Json = False,
) -> int:
    """Try held events again now: mend what they fail for first."""
    choice = Choice("held retry EVENT...", events, everything, (handler, error, type, key, stream, since, until), limit)
    return await _act("retry", "due now", choice, dry_run, yes, service, json)


@app.command()
@answering
async def skip(
    events: Events = None,
    everything: All = False,
    handler: HandlerName = None,
    error: Error = None,
    type: Type = None,
    key: Key = None,
    stream: Stream = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    service: Of = None,
    json: Json = False,
) -> int:
    """Make held events dead letters, which 'dead retry' can bring back; what waits behind them goes on."""
    choice = Choice("held skip EVENT...", events, everything, (handler, error, type, key, stream, since, until), limit)
    return await _act("skip", "skipped", choice, dry_run, yes, service, json)


@app.command()
@answering
async def drop(
    events: Events = None,
    everything: All = False,
    handler: HandlerName = None,
    error: Error = None,
    type: Type = None,
    key: Key = None,
    stream: Stream = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    service: Of = None,
    json: Json = False,
) -> int:
    """Forget held events for good: nobody will handle them in this service; what waits behind them goes on."""
    choice = Choice("held drop EVENT...", events, everything, (handler, error, type, key, stream, since, until), limit)
    return await _act("drop", "dropped", choice, dry_run, yes, service, json)


async def _act(
    verb: Literal["retry", "skip", "drop"],
    done: str,
    choice: Choice[str],
    dry_run: bool,
    yes: bool,
    target: str | None,
    json: bool,
) -> int:
    settings = Settings()
    service = chosen(target, settings)
    async with _opened(settings, service) as held:
        positions = None
        if choice.named:
            existing = _existing(held)
            positions = [await _position(existing, event) for event in choice.named]
            count = len([await existing.get(position) for position in positions])
        else:
            count = await held.count(choice.selection) if held else 0
            count = count if choice.limit is None else min(count, choice.limit)
        if count and not dry_run:
            if not confirmed(f"{verb.capitalize()} {count} of the held events of {service.name}?", yes):
                print("Nothing was changed.", file=sys.stderr)
                return NO
            act = getattr(_existing(held), verb)
            count = await act(choice.selection, positions=positions, limit=choice.limit)
    if json:
        say(facts({"service": service.name, "command": verb, "events": count, "dry_run": dry_run}))
    elif dry_run:
        say(f"{count} would be {done}; nothing was changed.")
    else:
        more = {"retry": " The service runs them within seconds.", "skip": " 'tidings dead list' has them."}.get(
            verb, ""
        )
        say(f"{count} {done}.{more if count else ''}")
    return OK


async def _position(held: HeldOperations, event: str) -> int:
    named = event_named(event)
    if isinstance(named, int):
        return named
    return await held.find(named if isinstance(named, tuple) else str(named))


@asynccontextmanager
async def _opened(settings: Settings, service: Service) -> AsyncIterator[HeldOperations | None]:
    """None for a service that has never run."""
    from tidings.operations.held import HeldOperations
    from tidings.operations.writer import naming_the_writer

    async with (
        existing_store(settings) as store,
        naming_the_writer(store, settings, service),
        existing_database(settings, service.name) as database,
    ):
        yield None if database is None else HeldOperations(database, service.name, await store.log_id())


def _existing(held: HeldOperations | None) -> HeldOperations:
    if held is None:
        raise Refused(NO, "this service has never run here, so it holds no events")
    return held


def _facts(service: Service, entry: HeldEntry) -> dict[str, Any]:
    from tidings.database.held_code import in_code

    return {"service": service.name, "handler_in_code": in_code(service, entry.handler, entry.type)} | {
        name: getattr(entry, name) if name not in ("since", "due") else _time(getattr(entry, name))
        for name in entry.__slots__
        if not (name in ("data", "metadata") and not getattr(entry, name))
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else moment_of(seconds)
