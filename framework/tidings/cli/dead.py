"""`tidings dead`: what services gave up, and what becomes of it. Nothing is retried or dropped without a yes."""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._find import find_services, named
from tidings.cli._output import BOLD, Json, columns, document_lines, facts, moment, paint, plain, say
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
from tidings.cli.verify import Targets
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.operations.dead import DeadLetter, DeadLetters
    from tidings.service import Service

__all__ = ["Of", "Yes", "app", "chosen", "confirmed"]

app = typer.Typer(no_args_is_help=True, help="Events that a service gave up: list, show, retry, drop.")

Of = Annotated[
    str | None,
    typer.Option(
        "--service", "-s", metavar="MODULE:SERVICE", help="Or its name; by default the only one of TIDINGS_SERVICES."
    ),
]
Ids = Annotated[list[int] | None, typer.Argument(metavar="ID", min=1, max=BIGGEST, help="As 'dead list' shows them.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; needed where nobody can answer.")]


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
    """List the dead letters of services, oldest first, and say how many more there are."""
    settings = Settings()
    selection = selected(handler, error, type, key, stream, since, until)
    rows: list[tuple[Any, ...]] = []
    shown = total = 0
    for service in find_services(services or (), settings).values():
        async with _letters(settings, service) as letters:
            found = await letters.list(selection, limit=limit) if letters else []
            total += await letters.count(selection) if letters else 0
            shown += len(found)
            for letter in found:
                if json:
                    say(facts(_facts(service.name, letter)))
                else:
                    place = f"{letter.stream}@{letter.version}" if letter.stream and letter.version is not None else ""
                    died = moment(letter.died_at)
                    why = letter.reason.partition("\n")[0]
                    rows.append((service.name, letter.id, died, letter.kind, letter.type, place or letter.stream, why))
    if rows:
        for line in columns(("SERVICE", "ID", "DIED", "KIND", "TYPE", "EVENT", "REASON"), rows, right=(1,)):
            say(line)
    if json and (shown < total or not total):
        say(facts({"shown": shown, "total": total}))
    elif shown < total:
        say(f"{shown} of {total} are shown; --limit {total} shows all of them")
    elif not total:
        print("No dead letters.", file=sys.stderr)
    return OK


@app.command()
@answering
async def show(
    id: Annotated[int, typer.Argument(metavar="ID", min=1, max=BIGGEST, help="As 'dead list' shows it.")],
    service: Of = None,
    json: Json = False,
) -> int:
    """Show one dead letter whole: the event, the reason, the traceback."""
    settings = Settings()
    of = chosen(service, settings)
    async with _letters(settings, of) as letters:
        letter = await _existing(letters).get(id)
    if json:
        say(facts(_facts(of.name, letter)))
        return OK
    say(paint(f"dead letter {letter.id} of {of.name}: {plain(letter.reason.partition(chr(10))[0])}", BOLD))
    for name in ("kind", "position", "stream", "version", "type", "event_id", "key", "handler", "attempts"):
        value = getattr(letter, name)
        if value is not None:
            say(f"  {name:<9} {plain(str(value))}")
    say(f"  {'died':<9} {moment(letter.died_at)}")
    if letter.holds_key:
        say(f"  {'holds':<9} later events of its key wait until it is retried or dropped")
    documents = (
        ("data", letter.data),
        ("metadata", letter.metadata),
        ("detail", (letter.detail or "").rstrip().encode()),
    )
    for name, content in documents:
        if content:
            for line in document_lines(name, content, is_json=name != "detail"):
                say(line)
    return OK


@app.command()
@answering
async def retry(
    ids: Ids = None,
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
    """Hand dead letters to their handlers again: mend the handler first."""
    choice = Choice("dead retry ID...", ids, everything, (handler, error, type, key, stream, since, until), limit)
    return await _act("retry", "retried", choice, dry_run, yes, service, json)


@app.command()
@answering
async def drop(
    ids: Ids = None,
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
    """Forget dead letters for good: nobody will handle these events in this service."""
    choice = Choice("dead drop ID...", ids, everything, (handler, error, type, key, stream, since, until), limit)
    return await _act("drop", "dropped", choice, dry_run, yes, service, json)


async def _act(
    verb: str, done: str, choice: Choice[int], dry_run: bool, yes: bool, target: str | None, json: bool
) -> int:
    settings = Settings()
    service = chosen(target, settings)
    async with _letters(settings, service) as letters:
        wanted, left = choice.named, 0
        if wanted and dry_run:
            for number in wanted:
                await _existing(letters).get(number)
        elif not wanted and letters is not None:
            found = await letters.ids(choice.selection, limit=choice.limit)
            wanted = [number for number, kind in found if verb == "drop" or kind != "message"]
            left = len(found) - len(wanted)
        count = len(wanted)
        if wanted and not dry_run:
            existing = _existing(letters)
            if not confirmed(f"{verb.capitalize()} {count} of the dead letters of {service.name}?", yes):
                print("Nothing was changed.", file=sys.stderr)
                return NO
            count = await (existing.retry(wanted) if verb == "retry" else existing.drop(wanted))
    stays = f" {left} are no events and cannot be retried: drop them." if left else ""
    if json:
        say(facts({"service": service.name, done: count, "left": left} | ({"dry_run": True} if dry_run else {})))
    elif dry_run:
        say(f"{count} would be {done}; nothing was changed.{stays}")
    else:
        more = "" if verb == "drop" else " Its handler runs again as soon as the service does."
        say(f"{count} {done}.{more}{stays}")
    return OK


def confirmed(question: str, yes: bool) -> bool:
    """A person says yes, now or with --yes. Raises `Refused` where nobody can answer."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise Refused(USAGE, f"{question} Nobody can answer here: say --yes")
    # The event loop's own handler would wait for this very question to be answered.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return typer.confirm(question, err=True)
    finally:
        signal.signal(signal.SIGINT, before)


def chosen(target: str | None, settings: Settings) -> Service:
    if target is not None:
        return named(target, settings)[1]
    found = find_services((), settings)
    if len(found) > 1:
        names = ", ".join(service.name for service in found.values())
        raise Refused(USAGE, f"of which service? Say --service with one of {names}")
    return next(iter(found.values()))


@asynccontextmanager
async def _letters(settings: Settings, service: Service) -> AsyncIterator[DeadLetters | None]:
    """None for a service that has never run."""
    from tidings.operations.dead import DeadLetters
    from tidings.operations.writer import naming_the_writer

    async with (
        existing_store(settings) as store,
        naming_the_writer(store, settings, service),
        existing_database(settings, service.name) as database,
    ):
        yield None if database is None else DeadLetters(database, service.name, await store.log_id())


def _existing(letters: DeadLetters | None) -> DeadLetters:
    if letters is None:
        raise Refused(NO, "this service has never run here, so it has no dead letters")
    return letters


def _facts(service: str, letter: DeadLetter) -> dict[str, Any]:
    return {"service": service} | asdict(letter)
