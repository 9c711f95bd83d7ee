"""The embedded event store: EventStoreDB's semantics on one SQLite file, or in memory. Here is its asyncio edge.

A file may be used by several processes of one host. Appends of all tasks share commits (one thread writes), reads run
in threads and come in pages, so that neither holds up the event loop.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Concatenate, Final, ParamSpec, TypeVar
from uuid import UUID

import tidings.stores.sqlite.log as reading
from tidings.errors import (
    ConfigurationError,
    EventTooLarge,
    StoreError,
    StoreUnavailable,
    StreamDeleted,
)
from tidings.stores import (
    ANY,
    APPEND_LIMIT,
    EVERYTHING,
    NO_STREAM,
    OCTETS,
    Appended,
    CaughtUp,
    Checkpoint,
    EventData,
    Expected,
    Filter,
    RecordedEvent,
    StreamMetadata,
    check_stream_name,
    check_text,
)
from tidings.stores.metadata import check_closing, check_metadata_write
from tidings.stores.rules import MAX_VERSION, METADATA, STREAM_DELETED, check_event
from tidings.stores.sqlite.conditions import condition_of
from tidings.stores.sqlite.log import PAGE_EVENTS, Database, Page, now
from tidings.stores.sqlite.writer import Appender, Kind, Outcome, Write, Writer

__all__ = ["SqliteStore", "open_sqlite"]

P = ParamSpec("P")
T = TypeVar("T")

READERS: Final = 4


async def open_sqlite(
    url: str, *, clock: Callable[[], int] = now, busy_timeout: float = 5.0, remember_ids: bool = True, stride: int = 1
) -> SqliteStore:
    """Open, and if need be create, the store that `url` names.

    `sqlite:///relative/path`, `sqlite:////absolute/path`, or `memory://name`, which all of a process share while one of
    them has it open (the options are then those of the first). `clock` gives ticks of 100 ns since 1970;
    `busy_timeout` is how many seconds to wait for another process's transaction. With `remember_ids=False` the store
    forgets at opening, as EventStoreDB does, which ids `ANY` and `STREAM_EXISTS` appends had. `stride` is the distance
    of the positions that are given from now on: above 1 not every number between two positions is one.

    Raises `ConfigurationError` for a URL that cannot be meant, a file of another application, a newer schema;
    `StoreUnavailable` for a file that cannot be opened for writing.
    """
    path, name = _target(url)
    if path is None:
        with _SHARING:
            log = _IN_MEMORY.get(name)
            if log is None:
                log = _IN_MEMORY[name] = Log(Database(None, busy_timeout), clock, remember_ids, stride)
            log.users += 1
        return SqliteStore(log, name)
    opener = ThreadPoolExecutor(1, thread_name_prefix="tidings-sqlite-open")
    opening = opener.submit(Database, path, busy_timeout)
    opener.shutdown(wait=False)
    try:
        database = await asyncio.wrap_future(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unused)
        raise
    log = Log(database, clock, remember_ids, stride)
    log.users = 1
    return SqliteStore(log, None)


def _close_unused(opening: Future[Database]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _target(url: str) -> tuple[str | None, str]:
    """The file, or None and a name in memory. Raises `ConfigurationError`."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in ("sqlite", "memory"):
        raise ConfigurationError(f"{url!r} names no embedded store: write sqlite:///path/to/file or memory://name")
    if "?" in rest or "#" in rest or "\0" in rest:
        raise ConfigurationError(f"{url!r}: the embedded store's URL ends with its path; nothing follows '?' or '#'")
    if scheme == "memory":
        if "/" in rest or "@" in rest:
            raise ConfigurationError(f"{url!r}: the name of a store in memory is one plain word: memory://name")
        return None, rest
    if not rest.startswith("/"):
        raise ConfigurationError(
            f"{url!r}: three slashes begin a relative path, four an absolute one; did you mean sqlite:///{rest} ?"
        )
    path = rest[1:]
    if path == ":memory:":
        raise ConfigurationError(f"{url!r}: a store in memory is memory://name")
    if not path or path.endswith("/"):
        raise ConfigurationError(f"{url!r} names no file: write sqlite:///path/to/file")
    return path, ""


class Log:
    """One log that is open: its database, the thread that writes, the threads that read; shared by the stores on it."""

    def __init__(self, database: Database, clock: Callable[[], int], remember_ids: bool, stride: int) -> None:
        self.database = database
        self.clock = clock
        self.users = 0
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="tidings-sqlite-reader")
        self.writer = Writer(database, Appender(database, clock, remember_ids, stride), self._finish)

    def _finish(self) -> None:
        self.readers.shutdown()
        self.database.close()


_IN_MEMORY: Final[dict[str, Log]] = {}
_SHARING: Final = threading.Lock()


class SqliteStore:
    """`EventStore` on a `Log`. It belongs to the event loop in which it was opened; close it there."""

    def __init__(self, log: Log, name: str | None) -> None:
        self._log = log
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._outbox: list[Write] = []
        self._answers: dict[Write, asyncio.Future[Appended]] = {}
        self._waiters: set[asyncio.Future[None]] = set()
        self._closing = False
        self._closed = asyncio.Event()
        self._head = log.writer.join(self)

    # ---- writing

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        check_metadata_write(stream, events)
        return await self.begin(Kind.APPEND, stream, events, expected)

    async def set_metadata(self, stream: str, values: Mapping[str, Any], *, expected: Expected = ANY) -> Appended:
        _check_stream(stream)
        document = json.dumps(dict(values), ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
        try:
            return await self.append(f"$${stream}", [EventData(METADATA, document)], expected=expected)
        except StreamDeleted as error:
            raise StreamDeleted(stream, tombstoned=error.tombstoned) from None

    async def delete(self, stream: str, *, expected: Expected = ANY) -> None:
        check_closing(stream)
        await self.begin(Kind.DELETE, stream, [EventData(METADATA, b"")], expected)

    async def tombstone(self, stream: str, *, expected: Expected = ANY) -> None:
        check_closing(stream)
        await self.begin(Kind.TOMBSTONE, stream, [EventData(STREAM_DELETED, b"", content_type=OCTETS)], expected)

    def begin(
        self, kind: Kind, stream: str, events: Sequence[EventData], expected: Expected
    ) -> asyncio.Future[Appended]:
        """Hand a write over without waiting for it; writes are applied in the order in which they are begun.

        For whoever has many in flight. What can be refused without a look at the log is raised here and now.
        """
        size = 0
        for event in events:
            size += event.size
            check_event(stream, event)
        _check_stream(stream)
        if size > APPEND_LIMIT:
            raise EventTooLarge(stream, size, APPEND_LIMIT)
        return self._write(kind, stream, tuple(events), expected, size)

    def _write(
        self, kind: Kind, stream: str, events: tuple[EventData, ...], expected: Expected, size: int
    ) -> asyncio.Future[Appended]:
        self._check_usable()
        if expected == -1:  # what `Appended.version` says of a stream without events
            expected = NO_STREAM
        write = Write(self, kind, stream, events, expected, size)
        answer = self._answers[write] = self._loop.create_future()
        # What tasks write in one round of the loop is handed over together: one wake-up, and rarely a small commit.
        if not self._outbox:
            self._loop.call_soon(self._hand_over)
        self._outbox.append(write)
        return answer

    def _hand_over(self) -> None:
        writes, self._outbox = self._outbox, []
        if writes:
            self._log.writer.submit(writes)

    def settled(self, outcomes: list[tuple[Write, Outcome]], head: int) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._settle, outcomes, head)

    def left(self) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._closed.set)

    def _settle(self, outcomes: list[tuple[Write, Outcome]], head: int) -> None:
        for write, outcome in outcomes:
            answer = self._answers.pop(write)
            if answer.done():  # its caller was cancelled
                continue
            if isinstance(outcome, StoreError):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)
        if head > self._head:
            self._head = head
            self._wake()

    # ---- reading

    async def read_stream(
        self, stream: str, *, start: int | None = None, backwards: bool = False, limit: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        _check_stream(stream)
        view = await self.look(reading.view_of, stream, self._log.clock())
        if start is not None:
            view = (
                view._replace(last=min(view.last, start)) if backwards else view._replace(first=max(view.first, start))
            )
        left = MAX_VERSION if limit is None else limit
        more = True
        while more and left > 0 and view.first <= view.last:
            events, more = await self.look(reading.page_of_stream, stream, view, backwards, min(PAGE_EVENTS, left))
            for event in events:
                yield event
            left -= len(events)
            if events:
                at = events[-1].version
                view = view._replace(last=at - 1) if backwards else view._replace(first=at + 1)

    async def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        condition = _condition(filter)
        left = MAX_VERSION if limit is None else limit
        before, end = MAX_VERSION, False
        while not end and left > 0:
            count = min(PAGE_EVENTS, left)
            page = await self.look(reading.page_of_all, after, before, backwards, condition, count)
            for event in page.events:
                yield event
            left -= len(page.events)
            end = page.end
            if backwards:
                before = page.reached
            else:
                after = page.reached

    async def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        condition = _condition(filter)
        behind = True
        page = Page([], after, False)
        self.watch(+1)
        try:
            while True:
                after = page.reached
                page = await self.look(reading.page_of_all, after, MAX_VERSION, False, condition, PAGE_EVENTS)
                for event in page.events:
                    yield event
                told = page.events[-1].position if page.events else after
                if page.reached > told:
                    yield Checkpoint(page.reached)
                if not page.end:
                    behind = True
                    continue
                if behind:
                    behind = False
                    yield CaughtUp(page.reached)
                await self.beyond(page.reached)
        finally:
            self.watch(-1)

    async def subscribe_stream(
        self, stream: str, *, after_version: int = -1
    ) -> AsyncIterator[RecordedEvent | CaughtUp]:
        _check_stream(stream)
        behind = True
        self.watch(+1)
        try:
            while True:
                page = await self.look(reading.follow, stream, after_version, behind, self._log.clock())
                for event in page.events:
                    yield event
                    if event.version == MAX_VERSION:
                        raise StreamDeleted(stream)
                after_version = page.version
                if not page.end:
                    continue
                if behind:
                    behind = False
                    yield CaughtUp(page.reached)
                await self.beyond(page.reached)
        finally:
            self.watch(-1)

    async def beyond(self, position: int) -> None:
        """Wait until the log goes on behind `position`. Raises `StoreUnavailable` when the store is closed."""
        while self._head <= position:
            self._check_usable()
            waiter = self._loop.create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    @property
    def heard(self) -> int:
        """A position that the log had reached when this store last heard of it: `head`, without a look."""
        return self._head

    async def head(self) -> int:
        return await self.look(reading.head)

    async def log_id(self) -> UUID:
        return await self.look(reading.log_id)

    async def get_metadata(self, stream: str) -> StreamMetadata:
        _check_stream(stream)
        return await self.look(reading.metadata_of, stream)

    async def look(
        self, job: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`job(connection, ...)` on a thread that reads. The connection is the job's own for as long as it runs."""
        self._check_usable()
        return await self._loop.run_in_executor(
            self._log.readers, lambda: self._log.database.read(job, *args, **kwargs)
        )

    # ---- closing

    def watch(self, more: int) -> None:
        """Somebody begins (+1) or ends (-1) to wait for what other processes append: see `beyond`."""
        self._log.writer.watch(more)

    def _check_usable(self) -> None:
        if self._closing:
            raise StoreUnavailable("the event store is closed: open it again")
        if asyncio.get_running_loop() is not self._loop:
            raise StoreUnavailable(
                "the event store was opened in another event loop: open one in this loop", waiting_helps=False
            )

    async def close(self) -> None:
        """End: appends that began are finished, reads and subscriptions raise `StoreUnavailable` at their next step."""
        if not self._closing:
            self._closing = True
            self._hand_over()
            with _SHARING:
                self._log.users -= 1
                last = self._log.users == 0
                if last and self._name is not None:
                    del _IN_MEMORY[self._name]
            self._log.writer.leave(self, last=last)
            self._wake()
            await self._closed.wait()
            if last:
                self._log.writer.wait()
        await self._closed.wait()


def _check_stream(stream: str) -> None:
    check_stream_name(stream)
    check_text(stream)


def _condition(filter: Filter) -> tuple[str, tuple[str, ...]]:
    for text in (*filter.types, *filter.stream_prefixes, *filter.exclude_stream_prefixes):
        check_text(text)
    return condition_of(filter)
