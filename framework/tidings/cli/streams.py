"""`tidings streams`: shows the log, and appends to it. It never changes an existing event."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import suppress
from typing import Annotated, Final
from uuid import UUID, uuid4

import typer

from tidings.cli._exits import USAGE, Refused, answering
from tidings.cli._find import find_services
from tidings.cli._handmade import (
    Handmade,
    check_against,
    check_data,
    checked,
    classes_of,
    dry_lines,
    given_metadata,
    made,
)
from tidings.cli._output import Json, columns, event_facts, event_lines, facts, moment, one_line, plain, say
from tidings.errors import StoreUnavailable, StreamNotFound
from tidings.operations.looking import existing_store, writable_store
from tidings.protocol.position import RESERVED
from tidings.settings import Settings
from tidings.stores import (
    ANY,
    EVERYTHING,
    JSON,
    NO_STREAM,
    OCTETS,
    STREAM_EXISTS,
    EventStore,
    Expected,
    Filter,
    RecordedEvent,
    check_stream_name,
)

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Look into the log: list, show, tail; or append to it.")

_STATES: Final = {"any": ANY, "no-stream": NO_STREAM, "exists": STREAM_EXISTS}

Category = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only streams whose name begins with NAME and '-', as order-1.")
]
System = Annotated[
    bool, typer.Option("--system", help="Also streams of Tidings ('tidings_...') and of the store ('$...').")
]


@app.command("list")
@answering
async def list_(
    category: Category = None,
    system: System = False,
    limit: Annotated[int, typer.Option(min=1, help="Read at most this many of the newest events.")] = 10_000,
    json: Json = False,
) -> None:
    """List streams, beginning with the one that was written last.

    A store has no list of its streams. So this reads the log backwards, at most --limit events, and lists the streams
    of these events, also deleted ones. EVENTS counts only the events that were read. 10,000 events take a fraction of a
    second from the embedded store.
    """
    streams: dict[str, tuple[RecordedEvent, int]] = {}
    looked = 0
    async with existing_store(Settings()) as store:
        async for event in store.read_all(backwards=True, limit=limit, filter=_filter(category, system)):
            looked += 1
            newest, count = streams.get(event.stream, (event, 0))
            streams[event.stream] = (newest, count + 1)
    if json:
        for name, (event, count) in streams.items():
            last = {"last_type": event.type, "last_position": event.position, "last_recorded_at": event.recorded_at}
            say(facts({"stream": name, "version": event.version, "events": count} | last))
    elif streams:
        rows = [
            (name, event.version, count, event.position, moment(event.recorded_at), event.type)
            for name, (event, count) in streams.items()
        ]
        titles = ("STREAM", "VERSION", "EVENTS", "POSITION", "RECORDED", "TYPE")
        for line in columns(titles, rows, right=(1, 2, 3)):
            say(line)
    if looked == limit:
        print(f"Only the newest {limit} events were read; --limit reads more.", file=sys.stderr)
    elif not streams:
        print("No streams.", file=sys.stderr)


@app.command()
@answering
async def show(
    stream: Annotated[str, typer.Argument(metavar="STREAM")],
    start: Annotated[
        int | None, typer.Option("--from", min=0, metavar="VERSION", help="Begin at this version.")
    ] = None,
    backwards: Annotated[
        bool, typer.Option("--backwards", "-b", help="Read backwards, from the end or from --from.")
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="At most this many events.")] = None,
    json: Json = False,
) -> None:
    """Show the events of a stream with their data and metadata."""
    async with existing_store(Settings()) as store:
        async for event in store.read_stream(stream, start=start, backwards=backwards, limit=limit):
            if json:
                say(facts(event_facts(event)))
            else:
                for line in event_lines(event):
                    say(line)


@app.command()
@answering
async def tail(
    stream: Annotated[str | None, typer.Argument(metavar="STREAM", help="By default all streams.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new events, until Ctrl-C.")] = False,
    count: Annotated[int, typer.Option("--lines", "-n", min=0, help="Begin with this many of the last events.")] = 10,
    category: Category = None,
    system: System = False,
    json: Json = False,
) -> None:
    """Show the last events, one per line: position, time, stream@version, type, data."""
    if stream is not None and (category or system):
        raise Refused(USAGE, "give either a STREAM, or --category and --system, which are for all streams")
    async with existing_store(Settings()) as store:
        if stream is not None:
            events = _of_stream(store, stream, count, follow)
        else:
            events = _of_all(store, _filter(category, system), count, follow)
        async for event in events:
            print(facts(event_facts(event)) if json else one_line(event), flush=follow)


async def _of_stream(store: EventStore, stream: str, count: int, follow: bool) -> AsyncIterator[RecordedEvent]:
    after = -1
    try:
        last = [event async for event in store.read_stream(stream, backwards=True, limit=max(count, 1))]
    except StreamNotFound:
        if not follow:
            raise
        last = []
    for event in reversed(last):
        after = event.version
        if count:
            yield event
    if follow:
        async for item in store.subscribe_stream(stream, after_version=after):
            if isinstance(item, RecordedEvent):
                yield item


async def _of_all(store: EventStore, filter: Filter, count: int, follow: bool) -> AsyncIterator[RecordedEvent]:
    after = await store.head()
    if count:
        last = [event async for event in store.read_all(backwards=True, limit=count, filter=filter)]
        for event in reversed(last):
            after = event.position
            yield event
    if follow:
        async for item in store.subscribe_all(after=after, filter=filter):
            if isinstance(item, RecordedEvent):
                yield item


@app.command()
@answering
async def append(
    stream: Annotated[str, typer.Argument(metavar="STREAM")],
    type: Annotated[str, typer.Argument(metavar="TYPE", help="The event's wire name.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="JSON; '-' reads it from standard input.")] = "{}",
    metadata: Annotated[str, typer.Option(metavar="JSON", help="A JSON object for handlers.")] = "{}",
    key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Partition key. Default: as the event's class says.")
    ] = None,
    schema_version: Annotated[
        int | None, typer.Option("--schema-version", min=1, metavar="N", help="Default: as the event's class says.")
    ] = None,
    expected: Annotated[
        str, typer.Option(metavar="any|no-stream|exists|VERSION", help="State that the stream must be in.")
    ] = "any",
    id: Annotated[UUID | None, typer.Option(metavar="UUID", help="The event's id; by default a new one.")] = None,
    octets: Annotated[bool, typer.Option("--octets", help="DATA is bytes, not JSON; nothing is checked.")] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Do not compare it with classes or other events.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be appended; append nothing.")] = False,
    json: Json = False,
) -> None:
    """Append one event, and print its version and position.

    It is checked with the classes that the services of TIDINGS_SERVICES declare for its type, and gets its partition
    key and schema version from them. Without such a class, the name of the stream is its key, unless --key gives
    another. The metadata of an event appended with --unchecked says so, and later events of its type are not compared
    with it. With --id and --expected no-stream or VERSION, the command can be repeated without appending twice. Use an
    id in one stream only, because a server remembers the first stream that had it.
    """
    _check_names(stream, type)
    content = sys.stdin.buffer.read() if data == "-" else data.encode("utf-8", "surrogateescape")
    if not octets:
        check_data(content)
    wanted, settings = _expected(expected), Settings()
    given = Handmade(stream, type, content, given_metadata(metadata, key, schema_version, unchecked=unchecked))
    looked = not octets and not unchecked
    services = find_services((), settings, needed=False) if looked else {}
    known = checked(given, classes_of(type, services))
    event = made(given, known, id or uuid4(), JSON if not octets else OCTETS)
    for note in known.notes:
        print(f"Note: {plain(note)}", file=sys.stderr)
    if dry_run:
        if looked and not known.by:
            with suppress(StoreUnavailable):  # there is no log yet, or it does not answer
                async with existing_store(settings) as store:
                    _ask_about(type, services, await check_against(given, store))
        for line in dry_lines(stream, event, expected, known, json):
            say(line)
        return
    async with writable_store(settings) as store:
        if looked and not known.by:
            _ask_about(type, services, await check_against(given, store))
        done = await store.append(stream, [event], expected=wanted)
    values = (stream, done.version, done.position, event.id)
    if json:
        say(facts(dict(zip(("stream", "version", "position", "id"), values, strict=True))))
    else:
        for line in columns(("STREAM", "VERSION", "POSITION", "ID"), [values], right=(1, 2)):
            say(line)


def _check_names(stream: str, type: str) -> None:
    """Raise `Refused` for a name that is reserved for Tidings or the store, `InvalidStreamName` for an invalid one."""
    for what, name in (("stream", stream), ("type", type)):
        if name.startswith(RESERVED):
            raise Refused(USAGE, f"{what} {name!r}: names that begin with '$', 'tidings_' or 'tidings.' are reserved")
    check_stream_name(stream)


def _ask_about(type: str, services: Collection[str], known: bool) -> None:
    """Ask whether the name is right if no service declares the type and the log does not have it."""
    if services and not known:
        print(f"Note: no service of TIDINGS_SERVICES declares {plain(repr(type))}: is the name right?", file=sys.stderr)


def _expected(text: str) -> Expected:
    if text in _STATES:
        return _STATES[text]
    if text.isdecimal() and len(text) < 20:  # no version has more digits, and Python limits how many it reads
        return int(text)
    raise Refused(
        USAGE, f"--expected {text!r}: write any, no-stream, exists, or the version of the stream's last event"
    )


def _filter(category: str | None, system: bool) -> Filter:
    included: Iterable[str] = (f"{category}-",) if category else ()
    if system and not category:
        return EVERYTHING
    return Filter(stream_prefixes=tuple(included), exclude_stream_prefixes=() if system else RESERVED)
