"""`tidings replay`: runs a service's handlers again, from a position or time on. Nothing is done without a yes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from tidings.cli._asking import Yes, confirmed
from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._find import named
from tidings.cli._output import Json, columns, facts, moment, plain, say
from tidings.cli._selecting import DryRun, HandlerName, Key, Stream
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.operations.authors import UnknownAuthor
    from tidings.operations.replay import Plan, Start
    from tidings.operations.selective_replay import ReplayConditions
    from tidings.service import Service
    from tidings.stores import EventStore

__all__ = ["replay"]


From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="POSITION|TIME",
        help="Replay events at or above this position of the log, or recorded at or after this time in ISO 8601, UTC "
        "if it names no zone (2026-11-24T18:00, 2026-11-24T18:00+01:00). Optional with --key, --stream or --handler.",
    ),
]
Cancel = Annotated[bool, typer.Option("--cancel", help="Cancel what replays of the service have not run yet.")]
Gone = Annotated[
    list[str] | None,
    typer.Option(
        "--gone",
        metavar="HANDLER",
        help="The log has events that a handler of this name emitted. It no longer exists, and no handler is its "
        "successor: let today's handlers emit their own events beside them.",
    ),
]


@answering
async def replay(
    service: Annotated[str, typer.Argument(metavar="MODULE:SERVICE", help="Or a name of one in TIDINGS_SERVICES.")],
    since: From = None,
    key: Key = None,
    stream: Stream = None,
    handler: HandlerName = None,
    cancel: Cancel = False,
    gone: Gone = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> int:
    """Run a service's handlers again for events that it has settled.

    Handlers declared with replay=False are passed over, both by the code found here and by the code that runs. The
    service may be running; then it begins within seconds. Handlers without a session that are running at that moment
    run twice, as after a kill. A second replay can only extend a replay under way. A replay is refused if it would
    append events again that a handler emitted under a name that no handler has today.

    With --key, --stream or --handler, only those events run again, in the order of their keys; nothing else of the
    service is sent back. 'tidings held list' shows which of them have not run yet.
    """
    from tidings.operations.replay import find_start
    from tidings.operations.selective_replay import ReplayConditions

    chooses = any(choice is not None for choice in (key, stream, handler))
    if cancel and (since is not None or chooses):
        raise Refused(
            USAGE, "--cancel cancels all replays of the service: leave out --from, --key, --stream and --handler"
        )
    if since is None and not chooses and not cancel:
        raise Refused(
            USAGE, "say where to begin: --from POSITION or TIME; or what to replay: --key, --stream or --handler"
        )
    settings = Settings()
    target, of = named(service, settings)
    if cancel:
        return await _cancel(settings, of, dry_run, yes, json)
    since = "0" if since is None else since
    wanted = _wanted(since)
    async with _opened(settings, of) as (store, database):
        start = await find_start(store, wanted)
        if start is None:
            raise Refused(
                NO, f"the log has no event from {since} on that is carried to services: there is nothing to replay"
            )
        if not chooses:
            return await _everything(
                store, database, of, target, start, gone or (), dry_run=dry_run, yes=yes, json=json
            )
        chosen = ReplayConditions(key, stream, handler)
        return await _some(store, database, of, start, chosen, gone or (), dry_run=dry_run, yes=yes, json=json)


async def _everything(
    store: EventStore,
    database: Database,
    service: Service,
    target: str,
    start: Start,
    gone: Sequence[str],
    *,
    dry_run: bool,
    yes: bool,
    json: bool,
) -> int:
    """Send the whole service back, after a question; return the exit code."""
    from tidings.operations.genuine import Contradicted
    from tidings.operations.replay import plan, send_back

    found = await plan(store, database, service, start)
    doubling = [author for author in found.unknown_authors if author.name not in gone]
    if json:
        doubled = {"unknown_authors": [asdict(author) | {"line": author.line} for author in found.unknown_authors]}
        doubled |= {"forged": [one._asdict() for one in found.forged]}
        say(facts(asdict(found) | doubled | {"start": start._asdict(), "dry_run": dry_run}))
    else:
        _show(found, doubling)
        for forged in found.forged:
            say(f"FORGED, or changed by hand: the log has something else in the place of {plain(str(forged))}")
    if dry_run:
        return OK
    if found.forged:
        raise Contradicted(found.forged)
    if doubling:
        raise Refused(NO, _refusal(doubling))
    if not confirmed(f"Run {found.run} events again in service {service.name}?", yes):
        return NO
    await send_back(database, service, found.log, start)
    if not json:
        say(
            f"{service.name} is sent back to position {start.position}. If it runs, it begins within seconds; else "
            f"start it: tidings run {plain(target)}. tidings verify {plain(target)} shows how far it is."
        )
    return OK


async def _some(
    store: EventStore,
    database: Database,
    service: Service,
    start: Start,
    chosen: ReplayConditions,
    gone: Sequence[str],
    *,
    dry_run: bool,
    yes: bool,
    json: bool,
) -> int:
    """Run chosen events again, after a question; return the exit code."""
    from tidings.operations.authors import unknown_authors
    from tidings.operations.selective_replay import pick, run_again

    picked = await pick(store, database, service, start, chosen)
    names = {turn.handler for turn in picked.turns}
    doubling = [
        one
        for one in await unknown_authors(store, service, start.before)
        if one.name not in gone and one.handler in names
    ]
    count = len(picked.turns)
    if doubling and not dry_run:
        raise Refused(NO, _refusal(doubling))
    told = {"service": service.name, "dry_run": dry_run, "unsettled": picked.unsettled}
    told |= {"passed_over": picked.passed_over, "unknown_authors": [asdict(one) for one in doubling]}
    stays = f"; {picked.unsettled} are held, dead or not handled yet, and stay as they are" if picked.unsettled else ""
    stays += f"; {picked.passed_over} are passed over, because their handlers have replay=False" * bool(
        picked.passed_over
    )
    if dry_run or not count:
        say(facts(told | {"run": count}) if json else f"{count} would run again{stays}. Nothing was changed.")
        if doubling and not json:
            say(f"NOT now: {_refusal(doubling)}")
        return OK if count or dry_run else NO
    if not confirmed(f"Run {count} events again in service {service.name}{stays}?", yes):
        return NO
    count = await run_again(database, service.name, await store.log_id(), picked)
    if json:
        say(facts(told | {"run": count}))
    else:
        say(f"{count} run again as soon as {service.name} runs{stays}. --cancel cancels those that have not begun.")
    return OK


async def _cancel(settings: Settings, service: Service, dry_run: bool, yes: bool, json: bool) -> int:
    from tidings.operations.selective_replay import cancel

    if dry_run:
        raise Refused(
            USAGE,
            "--cancel has no --dry-run: 'tidings held list --error \"replayed by operator\"' shows the chosen events",
        )
    async with _opened(settings, service) as (store, database):
        if not confirmed(f"Cancel what replays of {service.name} have not run yet?", yes):
            return NO
        done = await cancel(database, service.name, await store.log_id())
    if json:
        say(facts({"service": service.name, "events": done.events, "buckets": done.buckets}))
    else:
        say(
            f"{done.events} chosen events do not run again; {done.buckets} of 256 buckets had been sent back, and "
            "are again where they were. Events that have run and failed stay held."
        )
    return OK


def _wanted(given: str) -> int | datetime:
    try:
        position = int(given)
    except ValueError:
        position = None
    if position is not None:
        if position < 0:
            raise Refused(USAGE, f"--from {position}: positions begin with 0")
        return position
    try:
        when = datetime.fromisoformat(given)
    except ValueError:
        raise Refused(
            USAGE, f"--from {given!r} is neither a position nor a time: write 1234, or 2026-11-24T18:00+01:00"
        ) from None
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)


@asynccontextmanager
async def _opened(settings: Settings, service: Service) -> AsyncIterator[tuple[EventStore, Database]]:
    from tidings.operations.writer import naming_the_writer

    async with (
        existing_store(settings) as store,
        naming_the_writer(store, settings, service),
        existing_database(settings, service.name) as database,
    ):
        if database is None:
            raise Refused(NO, f"service {service.name!r} has never run here: it will run every event when it starts")
        yield store, database


def _refusal(doubling: Sequence[UnknownAuthor]) -> str:
    names = list(dict.fromkeys(author.name for author in doubling))
    remedies = "; ".join(author.remedy for author in doubling)
    ends = " ".join(f"--gone {name}" for name in names)
    return (
        f"what {plain(', '.join(names))} emitted would be appended twice, so nothing was changed. To append nothing "
        f"twice: {plain(remedies)}. To append what today's handlers emit beside it, add {plain(ends)}"
    )


def _show(found: Plan, doubling: Sequence[UnknownAuthor]) -> None:
    start = found.start
    say(
        f"replay of {found.service} from position {start.position} ({moment(start.recorded_at)}); it has settled "
        f"events up to position {found.upto}"
    )
    rows = [
        (
            share.handler,
            share.type,
            share.run,
            share.passed_over,
            share.held + share.never_given,
            share.first,
            share.last,
            "" if share.replay else "replay=False",
        )
        for share in found.shares
    ]
    titles = ("HANDLER", "TYPE", "RUN AGAIN", "PASSED OVER", "NEVER DONE", "FIRST", "LAST", "")
    for line in columns(titles, rows, right=range(2, 7)):
        say(line.removesuffix("  -"))
    if found.held or found.dead_again:
        say(
            f"{found.held} held events stay held, {found.dead_again} dead letters become held: none of them was ever "
            "done, so each runs when the replay comes to it, even with replay=False"
        )
    if found.dead_stay:
        say(f"{found.dead_stay} dead letters stay as they are: their handlers have replay=False, or are gone")
    if found.staged:
        say(f"{found.staged} emitted events are still to be appended, as before")
    if found.missing:
        names = f" (in {plain(', '.join(found.missing_streams))})" if found.missing_streams else ""
        say(
            f"NOT all of it is in the log any more: at least {found.missing} events are missing{names}. Retention or a "
            "deletion removed them, and no replay brings them back"
        )
    say("The service's own tables are not emptied: handlers write to them as they are. Empty a read model first, while")
    say("the service is stopped.")
    for share in found.shares:
        if share.never_given:
            say(
                f"{share.never_given} {plain(share.type)} were settled before handler {plain(share.handler)} began, or "
                "while it was away: now it is given them for the first time"
            )
    emitting = [share.handler for share in found.shares if share.may_emit and share.run]
    if emitting:
        say(
            f"May emit: {plain(', '.join(dict.fromkeys(emitting)))}. Events that the log already has are not appended "
            "again: each handler's n-th event of a type to a stream, also under its former names. An event to another "
            "stream, or of another type, is new."
        )
    for author in doubling:
        say(
            f"TWICE: the log holds {author.count} events ({plain(', '.join(author.emitted))}) that handler "
            f"{plain(author.name)} emitted for {plain(', '.join(author.causes))}. No handler of these has that "
            f"name today; {plain(author.handler)} runs for them, and what it emits is appended beside them."
        )
        say(f"To append nothing twice: {plain(author.remedy)}")
