"""`tidings why`: shows one event's timeline, from its causes to what it caused. It only reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidings.cli._exits import answering
from tidings.cli._find import event_named, find_services
from tidings.cli._output import BOLD, Json, facts, moment, paint, plain, say
from tidings.cli._reading import Reading
from tidings.cli._unseen import Unseen
from tidings.cli.verify import Targets
from tidings.operations.looking import existing_database, existing_store
from tidings.operations.report import moment_of
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.operations.timeline import Standing, Timeline, TracedEvent

__all__ = ["why"]


@answering
async def why(
    event: Annotated[str, typer.Argument(metavar="EVENT", help="Its id, STREAM@VERSION, or its global position.")],
    services: Targets = None,
    relay: Annotated[str, typer.Option(metavar="NAME", help="The relay whose checkpoint is compared.")] = "main",
    json: Json = False,
) -> int:
    """Show what became of one event: its causes, whether it was published, its state in each service, what it caused.

    STREAM@VERSION is found at once, and a position by reading the log from its nearer end. An id is searched in the
    services' databases, and then backwards in the log. What the event caused is found by reading the log from the event
    on. Ctrl-C ends a long search. Without arguments, the services are those of TIDINGS_SERVICES; without any services,
    only the log is searched.
    """
    settings, target = Settings(), event_named(event)
    found = find_services(services or (), settings, needed=False).values()
    unseen = Unseen(len(found))
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(existing_store(settings))
        pairs = []
        for service in found:
            with unseen.without(service.name):
                database = await stack.enter_async_context(existing_database(settings, service.name))
                pairs.append((service, database))
        from tidings.operations.timeline import trace

        with Reading() as reading:
            timeline = await trace(store, pairs, target, relay=relay, progress=reading.reached)
    if json:
        say(facts(_facts(timeline) | ({"unseen": unseen.facts()} if unseen.errors else {})))
    else:
        for line in _lines(timeline):
            say(line)
    unseen.tell()
    return unseen.code


# ---- JSON ----------------------------------------------------------------------------


def _facts(timeline: Timeline) -> dict[str, Any]:
    """Return the timeline for JSON. What was caused is a flat list in the order of the tree, which may be very deep."""
    return {
        "event": _traced(timeline.event),
        "causes": [_traced(cause) for cause in timeline.causes],
        "unknown_cause": timeline.unknown_cause,
        "relay": {"name": timeline.relay, "checkpoint": timeline.checkpoint, "wrong": timeline.wrong},
        "published": _published(timeline, timeline.event),
        "caused": [_traced(traced) | {"published": _published(timeline, traced)} for traced in timeline.event.tree()],
        "more": timeline.more,
    }


def _traced(traced: TracedEvent) -> dict[str, Any]:
    facts = {name: getattr(traced, name) for name in traced.__slots__ if name not in ("services", "caused")}
    return facts | {"services": [asdict(standing) for standing in traced.services]}


def _published(timeline: Timeline, traced: TracedEvent) -> bool | None:
    """Return whether the event was published; None if that is not known."""
    if traced.position is None or traced.bucket is None:
        return False
    return None if timeline.checkpoint is None else traced.position <= timeline.checkpoint


# ---- text ----------------------------------------------------------------------------


def _lines(timeline: Timeline) -> Iterator[str]:
    event = timeline.event
    yield paint(_one(event), BOLD)
    if event.recorded_at is not None:
        yield f"  {'recorded':<12} {moment(event.recorded_at)}"
    if event.correlation_id is not None:
        yield f"  {'correlation':<12} {plain(event.correlation_id)}"
    if event.actor is not None or event.principal is not None:
        yield f"  {'actor':<12} {_who(event)}"
    for cause in timeline.causes:
        yield f"  {'caused by':<12} {_one(cause)}"
    if timeline.unknown_cause is not None:
        yield f"  {'caused by':<12} {plain(timeline.unknown_cause)}, which was not found in the log before it"
    elif event.causation_id is None:
        yield f"  {'caused by':<12} no event: it was appended from outside"
    yield f"  {'published':<12} {_told(timeline)}"
    for standing in event.services:
        yield f"  {standing.service:<12} {_stands(standing)}"
    tree = list(event.tree())
    yield f"  {'caused':<12} {f'{len(tree) + timeline.more} events' if tree else 'nothing'}"
    for traced in tree:
        yield f"  {'  ' * min(traced.depth, 30)}-> {_one(traced)}{_brief(traced)}"
    if timeline.more:
        yield f"    and {timeline.more} more"


def _one(traced: TracedEvent) -> str:
    where = plain(traced.stream)
    if traced.version is not None:
        where += f"@{traced.version}, position {traced.position}"
    by = f", by {plain(traced.handler)}" if traced.handler else ""
    waiting = f" ({plain(_first_line(traced.waiting))})" if traced.waiting else ""
    return f"{plain(traced.type)} {traced.event_id} at {where}{by}{waiting}"


def _who(traced: TracedEvent) -> str:
    proved = traced.principal
    if traced.actor is None or traced.actor == proved:
        return plain(proved or "")
    return plain(traced.actor) if proved is None else f"{plain(traced.actor)}, as {plain(proved)} says"


def _told(timeline: Timeline) -> str:
    event = timeline.event
    if event.position is None:
        return "no: it is not in the log"
    if event.bucket is None:
        return "never: such events stay in the log"
    if timeline.checkpoint is None:
        return plain(f"unknown: {timeline.wrong}")
    where = f"the checkpoint of relay {timeline.relay} is {timeline.checkpoint}"
    return plain(f"yes: {where}" if event.position <= timeline.checkpoint else f"not known: {where}")


def _stands(standing: Standing) -> str:
    if standing.state not in ("held", "dead"):
        if standing.state == "not given":
            return f"not given to {plain(standing.handler or 'its handler')}: it was settled before that handler began"
        return f"{standing.state} by {plain(standing.handler)}" if standing.handler else standing.state
    attempts = "1 attempt" if standing.attempts == 1 else f"{standing.attempts} attempts"
    tried = f"{attempts} of {plain(standing.handler or 'its handler')}"
    since = ""
    if standing.due is not None:
        since = f" until {moment_of(standing.due)}"
    elif standing.died_at is not None:
        since = f" since {moment(standing.died_at)}"
    remedy = f" (tidings dead show {standing.letter})" if standing.letter is not None else ""
    return f"{standing.state}{since}, {tried}: {plain(_first_line(standing.reason))}{remedy}"


def _brief(traced: TracedEvent) -> str:
    """Return in which services the event is handled, and its state there."""
    states = [
        f"{standing.service} {standing.state}"
        for standing in traced.services
        if standing.state not in ("not handled here", "not carried")
    ]
    return f"; {', '.join(states)}" if states else ""


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
