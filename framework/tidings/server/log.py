"""The log as the server reads it: pages of events with links resolved, for any filter. It never writes."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import tidings.stores.sqlite.log as reading
from tidings.errors import StreamDeleted, StreamNotFound
from tidings.server.expressions import Expression
from tidings.server.pages import PAGE_BYTES, Pages, size_of
from tidings.server.permissions import Reader
from tidings.server.wire import Resolved
from tidings.stores import RecordedEvent
from tidings.stores.rules import MAX_VERSION, METADATA, STREAM_DELETED
from tidings.stores.sqlite.store import SqliteStore
from tidings.stores.table import PAGE_EVENTS, View

__all__ = ["LINK", "Batch", "Choice", "ServedLog", "target_of"]

T = TypeVar("T")

LINK: Final = "$>"
_EVERYTHING: Final = ("", ())
_HIDDEN: Final = re.compile(
    r"(?:\$\$)?tidings_log$|\$epoch-information$|\$persistentsubscription-\$all::.*-(?:checkpoint|parked)$"
)


class Choice(NamedTuple):
    """Which events of `$all` are wanted. Regular expressions are searched for, not anchored, as EventStoreDB does."""

    by_type: bool = False
    """The condition is about the event's type, otherwise about its stream."""
    prefixes: tuple[str, ...] = ()
    """One of them begins it; where there are none, and no pattern, nothing is wanted."""
    pattern: Expression | re.Pattern[str] | None = None

    def wants(self, event: RecordedEvent) -> bool:
        text = event.type if self.by_type else event.stream
        if self.pattern is not None:
            return bool(self.pattern.search(text))
        return text.startswith(self.prefixes)


def hidden(event: RecordedEvent) -> bool:
    """Events that `$all` never shows: EventStoreDB's own bookkeeping, and the embedded store's, which is its like."""
    return event.stream[:1] in "$t" and _HIDDEN.match(event.stream) is not None


class Batch(NamedTuple):
    """A piece of `$all`."""

    events: list[Resolved]
    """What was wanted."""
    after: list[int]
    """For each of them, how many events were considered before it, itself included."""
    considered: list[int]
    """The positions of all events that were considered, wanted or not."""
    reached: int
    """The next piece begins behind it."""
    end: bool


class ServedLog:
    """Reads one store. Every method takes one look at it, on a thread of its own."""

    def __init__(self, store: SqliteStore, clock: Callable[[], int]) -> None:
        self.store = store
        self._clock = clock
        self._looks: dict[object, asyncio.Future[Any]] = {}

    async def all(
        self,
        choice: Choice | None,
        resolve: bool,
        *,
        after: int,
        before: int,
        backwards: bool,
        count: int,
        reader: Reader | None,
        most: int = PAGE_BYTES,
    ) -> Batch:
        """A piece of `$all` between two positions, both exclusive; looks at `count` events and `most` bytes at most.
        Of events and links, it shows what `reader` may see; None sees everything."""
        return await self.store.look(self._piece_of_all(choice, resolve, after, before, backwards, count, reader, most))

    async def history(
        self, choice: Choice | None, resolve: bool, *, after: int, count: int, reader: Reader | None, pages: Pages
    ) -> AsyncGenerator[Batch, None]:
        """Yield `$all` behind a position, piece by piece, up to the piece that reaches its end.

        While its caller is busy with one piece, the next one is read: at most one waits in memory.
        """

        def read(behind: int) -> asyncio.Task[Batch]:
            def look(most: int) -> Awaitable[Batch]:
                piece = self._piece_of_all(choice, resolve, behind, MAX_VERSION, False, count, reader, most)
                return self.store.look(piece)

            return asyncio.create_task(pages.read(look, _events), name="tidings-server-history")

        reading = read(after)
        try:
            while True:
                batch = await reading
                if batch.end:
                    yield batch
                    return
                reading = read(batch.reached)
                yield batch
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            if not reading.cancelled():
                reading.exception()  # the caller has left, or heard of it

    async def news(
        self, choice: Choice | None, resolve: bool, after: int, reader: Reader | None, most: int = PAGE_BYTES
    ) -> Batch:
        """As `all` for who follows the log at its end, where many ask the same at once: one look answers all of them.

        It may be a look that began a moment ago: what it misses is behind `reached`.
        """
        job = self._piece_of_all(choice, resolve, after, MAX_VERSION, False, PAGE_EVENTS, reader, most)
        return await self._shared((choice, resolve, after, reader, most), job)

    async def touched(self, stream: str, reached: int) -> None:
        """Until the stream has an event behind the position. Followers of quiet streams share one look at what came."""
        touched: set[str] = set()
        while stream not in touched:
            await self.store.beyond(reached)
            touched, reached = await self._shared(reached, _streams_behind(reached))

    async def _shared(self, key: object, job: Callable[[sqlite3.Connection], T]) -> T:
        look = self._looks.get(key)
        if look is None:
            look = self._looks[key] = asyncio.ensure_future(self.store.look(job))
            look.add_done_callback(lambda done: (self._looks.pop(key), done.cancelled() or done.exception()))
        found: T = await asyncio.shield(look)  # who leaves does not take it from the others
        return found

    def _piece_of_all(
        self,
        choice: Choice | None,
        resolve: bool,
        after: int,
        before: int,
        backwards: bool,
        count: int,
        reader: Reader | None,
        most: int,
    ) -> Callable[[sqlite3.Connection], Batch]:
        def job(connection: sqlite3.Connection) -> Batch:
            count_ = min(count, PAGE_EVENTS)
            page = reading.page_of_all(connection, after, before, backwards, _EVERYTHING, count_, most)
            left = most
            events: list[Resolved] = []
            ranks: list[int] = []
            considered: list[int] = []
            for event in page.events:
                if hidden(event) or not (reader is None or reader.sees(event.stream)):
                    continue
                considered.append(event.position)
                if choice is None or choice.wants(event):
                    ranks.append(len(considered))
                    if not resolve or event.type != LINK:
                        events.append((event, None))
                        continue
                    events.append(self._resolve(connection, event, reader))
                    left -= size_of(events[-1:])
                    if left <= 0:  # what links lead to is not part of the page that was measured
                        return Batch(events, ranks, considered, event.position, False)
            return Batch(events, ranks, considered, page.reached, page.end)

        return job

    async def view(self, stream: str) -> tuple[View, int]:
        """What may be read of a stream, and its last version. Raises `StreamNotFound` and `StreamDeleted`."""

        def job(connection: sqlite3.Connection) -> tuple[View, int]:
            view = reading.view_of(connection, stream, self._clock())
            return view, view.last

        return await self.store.look(job)

    async def stream(
        self,
        stream: str,
        view: View,
        resolve: bool,
        *,
        backwards: bool,
        count: int,
        reader: Reader | None,
        most: int = PAGE_BYTES,
    ) -> tuple[list[Resolved], int, bool]:
        """A piece of a stream, the version of its last event, and whether there is more."""

        def job(connection: sqlite3.Connection) -> tuple[list[Resolved], int, bool]:
            count_ = min(count, PAGE_EVENTS)
            events, more = reading.page_of_stream(connection, stream, view, backwards, count_, most)
            resolved = self._all_resolved(connection, events, resolve, reader, most)
            last = events[len(resolved) - 1].version if resolved else -1
            return resolved, last, more or len(resolved) < len(events)

        return await self.store.look(job)

    async def follow(
        self, stream: str, after: int, history: bool, resolve: bool, reader: Reader | None, most: int = PAGE_BYTES
    ) -> tuple[list[Resolved], reading.Following]:
        """What comes behind a version of a stream: see `sqlite_log.follow`."""

        def job(connection: sqlite3.Connection) -> tuple[list[Resolved], reading.Following]:
            piece = reading.follow(connection, stream, after, history, self._clock(), most)
            resolved = self._all_resolved(connection, piece.events, resolve, reader, most)
            if len(resolved) < len(piece.events):
                piece = piece._replace(version=piece.events[len(resolved) - 1].version, end=False)
            return resolved, piece._replace(events=[])

        return await self.store.look(job)

    async def is_readable(self, stream: str, version: int) -> bool:
        """Whether neither deletion nor retention hides the event."""

        def job(connection: sqlite3.Connection) -> bool:
            try:
                view = reading.view_of(connection, stream, self._clock())
            except (StreamNotFound, StreamDeleted):
                return False
            view = view._replace(first=max(view.first, version), last=min(view.last, version))
            return bool(reading.page_of_stream(connection, stream, view, False, 1)[0])

        return await self.store.look(job)

    async def is_record(self, position: int) -> bool:
        """Whether an event has this position."""
        query = "SELECT 1 FROM log WHERE position = ?"
        return await self.store.look(lambda connection: connection.execute(query, (position,)).fetchone() is not None)

    async def last_version(self, stream: str) -> int:
        """-1 without events, `MAX_VERSION` when tombstoned."""
        return await self.store.look(reading.last_version, stream)

    async def head(self) -> int:
        return await self.store.head()

    # ---- links

    def _all_resolved(
        self,
        connection: sqlite3.Connection,
        events: Sequence[RecordedEvent],
        resolve: bool,
        reader: Reader | None,
        most: int,
    ) -> list[Resolved]:
        """The first events with what they lead to: all of them, unless that is more than `most` bytes."""
        if not resolve:
            return [(event, None) for event in events]
        resolved: list[Resolved] = []
        for event in events:
            resolved.append(self._resolve(connection, event, reader))
            most -= size_of(resolved[-1:])
            if most <= 0:
                break
        return resolved

    async def may_read(self, reader: Reader, stream: str) -> bool:
        """Whether the reader may see the stream's events through a link."""
        return await self.store.look(reader.may, stream)

    def _resolve(self, connection: sqlite3.Connection, event: RecordedEvent, reader: Reader | None) -> Resolved:
        """The event that a link leads to, and the link. A target that is gone, or that the reader may not read, is left
        out, as EventStoreDB does."""
        if event.type != LINK:
            return event, None
        target = target_of(event)
        if target is None:
            return event, None  # a payload that names no event: the link is shown as it is
        version, stream = target
        if reader is not None and not reader.may(connection, stream):
            return None, event
        try:
            view = reading.view_of(connection, stream, self._clock())
        except (StreamNotFound, StreamDeleted):
            return None, event
        if not view.first <= version <= view.last:
            return None, event
        events, _ = reading.page_of_stream(connection, stream, View(version, version, view.since), False, 1)
        return (events[0] if events else None), event


def _events(batch: Batch) -> list[Resolved]:
    return batch.events


def _streams_behind(after: int) -> Callable[[sqlite3.Connection], tuple[set[str], int]]:
    """Which streams have events behind the position, and how far that was looked."""

    def job(connection: sqlite3.Connection) -> tuple[set[str], int]:
        reached = max(reading.head(connection), after)  # first: what comes meanwhile is seen, or left for the next look
        query = "SELECT stream, position FROM log WHERE position > ? ORDER BY position LIMIT ?"
        rows = connection.execute(query, (after, PAGE_EVENTS)).fetchall()
        if len(rows) == PAGE_EVENTS:
            reached = rows[-1][1]
        return {stream for stream, _ in rows}, reached

    return job


def target_of(link: RecordedEvent) -> tuple[int, str] | None:
    """The version and stream that a link names; None for a payload that names none."""
    version, separator, stream = link.data.partition(b"@")
    if not separator or not stream or not re.fullmatch(rb"[0-9]{1,19}", version) or int(version) > MAX_VERSION:
        return None
    try:
        return int(version), stream.decode()
    except UnicodeDecodeError:
        return None


def is_system(event: RecordedEvent) -> bool:
    """An event of the store's own, which no projection links to."""
    return event.type in (METADATA, STREAM_DELETED, LINK) or event.stream.startswith("$")


def json_object(data: bytes) -> dict[str, object]:
    """A JSON object, or an empty one for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
