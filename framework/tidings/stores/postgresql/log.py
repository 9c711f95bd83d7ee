"""The log as a PostgreSQL table: what may be read of it. It never appends.

One table holds everything; what an append or a read must know of a stream (its last version, its metadata, whether it
is deleted) is looked up in it, so that there is no second truth that could disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

from tidings.errors import StoreUnavailable, StreamDeleted, StreamNotFound
from tidings.stores import Filter, RecordedEvent, StreamMetadata
from tidings.stores.postgresql.conditions import condition_of
from tidings.stores.postgresql.connections import Connection
from tidings.stores.postgresql.schema import LOG_STREAM, RENEWED, key_of
from tidings.stores.rules import MAX_VERSION, document_of, original_of, retention_of
from tidings.stores.table import PAGE_EVENTS, Page, View

PAGE_BYTES: Final = 4 * 1024 * 1024
"""What a page of a read holds in memory at most, unless one event alone is larger."""
WINDOW: Final = 16_384
"""Positions that one page of a filtered read looks at: bounds the time that one statement takes."""


# ---- facts about streams -----------------------------------------------------------


async def head(connection: Connection) -> int:
    """Return the position of the last event."""
    position = await connection.fetchval("SELECT max(position) FROM tidings_log.events")
    return -1 if position is None else int(position)


async def log_id(connection: Connection) -> UUID:
    """Return what the first event says, or the last one that gave a restored log a new identity."""
    data = await connection.fetchval(
        "SELECT data FROM tidings_log.events WHERE key = $1 AND (version = 0 OR type = $2) "
        "ORDER BY version DESC LIMIT 1",
        key_of(LOG_STREAM),
        RENEWED.encode(),
    )
    try:
        return UUID(document_of(data)["log"])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise StoreUnavailable(
            "the event store has lost its identity (first event of stream 'tidings_log'): restore a backup",
            waiting_helps=False,
        ) from error


class Standing(NamedTuple):
    """How a stream stands at one moment, that of all streams which were asked for together."""

    last: int
    """Version of its last event; -1 without one, `MAX_VERSION` when tombstoned."""
    document: bytes
    """Data of its last event, if it is a metadata stream."""
    head: int
    now: int
    """Ticks, by the server's clock."""


_STANDINGS: Final = (
    "SELECT coalesce(e.version, -1), coalesce(e.data, ''), (SELECT max(position) FROM tidings_log.events), "
    "(extract(epoch FROM clock_timestamp()) * 10000000)::bigint "
    "FROM unnest($1::uuid[], $2::boolean[]) WITH ORDINALITY AS asked (key, wanted, n) LEFT JOIN LATERAL ("
    "SELECT version, CASE WHEN asked.wanted THEN data END AS data FROM tidings_log.events "
    "WHERE events.key = asked.key ORDER BY version DESC LIMIT 1) e ON true ORDER BY n"
)


async def standings(connection: Connection, streams: Sequence[str]) -> list[Standing]:
    """Return how each of the streams stands."""
    keys = [key_of(stream) for stream in streams]
    rows = await connection.fetch(_STANDINGS, keys, [stream.startswith("$$") for stream in streams])
    return [Standing(row[0], row[1], -1 if row[2] is None else row[2], row[3]) for row in rows]


async def _readable(connection: Connection, stream: str) -> tuple[Standing, Standing]:
    """How the stream and its metadata stream stand. Raises `StreamDeleted`: a metadata stream is closed with its
    stream."""
    original = original_of(stream)
    asked = [stream, f"$${stream}"] + ([] if original is None else [original])
    own, meta, *of = await standings(connection, asked)
    if own.last == MAX_VERSION or any(each.last == MAX_VERSION for each in of):
        raise StreamDeleted(stream)
    return own, meta


async def metadata_of(connection: Connection, stream: str) -> StreamMetadata:
    """Return the stream's metadata. Raises `StreamDeleted`."""
    _, meta = await _readable(connection, stream)
    return StreamMetadata(document_of(meta.document), meta.last)


async def view_of(connection: Connection, stream: str) -> View:
    """Raises `StreamNotFound` (also for a softly deleted stream) and `StreamDeleted`."""
    return _view(stream, *await _readable(connection, stream))


def _view(stream: str, own: Standing, meta: Standing) -> View:
    kept = retention_of(stream, meta.document)
    if own.last < 0 or kept.soft_deleted:
        raise StreamNotFound(stream)
    since = max(own.now - kept.max_age * 10_000_000, 0) if kept.max_age else 0
    return View(kept.first(own.last), own.last, since)


# ---- pages -------------------------------------------------------------------------


def _page(where: str, key: str, order: str) -> str:
    """Return a query for one page of at most $1 events. Rows beyond `PAGE_BYTES` have no data, except for the first."""
    size = "octet_length(data) + octet_length(metadata)"
    # Texts of this module; what comes from outside is a parameter.
    return (
        "SELECT position, stream, version, type, "  # nosec
        f"CASE WHEN total <= {PAGE_BYTES} OR total = size THEN data END AS data, "
        f"CASE WHEN total <= {PAGE_BYTES} OR total = size THEN metadata END AS metadata, is_json, id, ticks "
        f"FROM (SELECT *, {size} AS size, sum({size}) OVER (ORDER BY {key} {order}) AS total "
        f"FROM tidings_log.events WHERE {where} ORDER BY {key} {order} LIMIT $1) sized ORDER BY {key} {order}"
    )


def _events_of(rows: Sequence[Any], count: int) -> tuple[list[RecordedEvent], bool]:
    """Return the events of a page, and whether it stopped before its end: at `count`, or because of memory."""
    events = [
        RecordedEvent(row[0], row[1].decode(), row[2], row[3].decode(), row[4], row[5], row[6], row[7].bytes, row[8])
        for row in rows
        if row[4] is not None
    ]
    return events, len(events) < len(rows) or len(events) == count


async def page_of_all(
    connection: Connection, after: int, before: int, backwards: bool, filter: Filter, count: int
) -> Page:
    """Return events with positions between `after` and `before`, both exclusive, from one of the two ends."""
    condition, values = condition_of(filter, 5)
    low, high = ("greatest($2, top - $4)", "top") if backwards else ("$2", "least($2 + $4, top)")
    page = _page(f"position > {low} AND position <= {high}{condition}", "position", "DESC" if backwards else "ASC")
    bottom = min(max(after, 0), MAX_VERSION - WINDOW)
    # The head is of the same moment: what is at or below it is visible, so that a page may say that it looked so far.
    rows = await connection.fetch(
        "SELECT e.*, top FROM (SELECT least(coalesce(max(position), 0), $3::bigint - 1) AS top "  # nosec
        f"FROM tidings_log.events) head LEFT JOIN LATERAL ({page}) e ON true",
        count,
        bottom,
        before,
        WINDOW,
        *values,
    )
    top = rows[0][9] or -1
    if rows[0][0] is None:
        rows = []
    events, cut = _events_of(rows, count)
    if cut:
        return Page(events, events[-1].position, False)
    if backwards:
        low_end = max(bottom, top - WINDOW)
        return Page(events, low_end + 1, low_end == bottom)
    reached = min(bottom + WINDOW, top)
    return Page(events, max(reached, after), reached >= top)


async def page_of_stream(
    connection: Connection, stream: str, view: View, backwards: bool, count: int
) -> tuple[list[RecordedEvent], bool]:
    """Return events in a view from one of its two ends, and whether there may be more."""
    where = "key = $2 AND version >= $3 AND version <= $4 AND ticks >= $5"
    query = _page(where, "version", "DESC" if backwards else "ASC")
    return _events_of(await connection.fetch(query, count, key_of(stream), *view), count)


class Following(NamedTuple):
    """A piece of a stream that is followed."""

    events: list[RecordedEvent]
    version: int
    """The next piece begins behind it."""
    reached: int
    """The log's head when it was looked at."""
    end: bool


async def follow(connection: Connection, stream: str, after: int, history: bool) -> Following:
    """Return events behind version `after`; `history`: only those that may be read, not what has just happened.

    A subscriber that is at the end receives what is appended whatever retention says of it (EventStoreDB pushes it),
    the tombstone included. Raises `StreamDeleted` for a stream whose history ends with a tombstone.
    """
    view = View(0, MAX_VERSION, 0)
    if history:
        own, meta = await _readable(connection, stream)
        reached = own.head
        try:
            view = _view(stream, own, meta)
        except StreamNotFound:
            return Following([], max(after, own.last), reached, True)
    else:
        reached = await head(connection)  # before all else: what comes later is looked for again
    view = view._replace(first=max(view.first, min(after, MAX_VERSION - 1) + 1))
    events, more = await page_of_stream(connection, stream, view, False, PAGE_EVENTS)
    version = events[-1].version if events else after
    if history and not more:
        version = max(version, view.last)
    return Following(events, version, reached, not more)
