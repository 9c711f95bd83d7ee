"""Appends to the SQLite log: one thread that writes, many appends to a commit. What they may do is in `deciding`."""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from queue import Empty, SimpleQueue
from typing import Final, Protocol, TypeVar

from tidings.errors import StoreError, StoreUnavailable
from tidings.stores import ANY, JSON, STREAM_EXISTS, Appended, EventData, Expected
from tidings.stores.deciding import Deciding
from tidings.stores.rules import Facts, retention_of
from tidings.stores.sqlite.log import Database, head, last_version, latest_data
from tidings.stores.table import Kind

T = TypeVar("T")
Row = tuple[int, str, int, str, bytes, bytes, bool, bytes, int]
"""A row of the log, in the order of its columns."""

GROUP_WRITES: Final = 256
GROUP_BYTES: Final = 8 * 1024 * 1024
"""Most of one commit: bounds the wait of the first append for the last, and the memory of a transaction."""
POLL: Final = 0.05
"""Seconds between looks at what other processes have appended, while somebody subscribes."""
CACHED_STREAMS: Final = 65_536
FIRST_STREAMS: Final = 65_536
"""Ids whose first stream is known, where that matters: of older ones any stream knows its own."""
_ROWS: Final = (64, 32, 16, 8, 4, 2, 1)
# OR ROLLBACK: to be able to undo one statement of many rows, SQLite would copy every page that it touches to a file
# (measured: 16 microseconds a row instead of 5). A row that violates a constraint ends the transaction anyway.
_INSERTS: Final = {
    count: "INSERT OR ROLLBACK INTO log VALUES " + ", ".join(["(?,?,?,?,?,?,?,?,?)"] * count) for count in _ROWS
}


# ---- one transaction ---------------------------------------------------------------


class Write:
    """Something to be written, and who waits for the outcome."""

    __slots__ = ("events", "expected", "kind", "member", "size", "stream")

    def __init__(
        self, member: Member, kind: Kind, stream: str, events: tuple[EventData, ...], expected: Expected, size: int
    ) -> None:
        self.member = member
        self.kind = kind
        self.stream = stream
        self.events = events
        self.expected = expected
        self.size = size

    def apply(self, appender: Appender) -> Appended:
        """Decide about it, and put what it writes. A refusal leaves no trace."""
        return appender.apply(self.kind, self.stream, self.expected, self.events)


Outcome = Appended | StoreError


class Appender(Deciding):
    """Applies writes in order inside transactions on one connection. One thread uses it.

    A group is decided write by write against what the log and the group's earlier writes say, and inserted at the end:
    a write that is refused has left no trace. What is known of streams is kept from one transaction to the next for as
    long as the log's head shows that nobody else has written: everything that happens to a stream is an append.
    """

    def __init__(
        self,
        database: Database,
        clock: Callable[[], int],
        remember_ids: bool = True,
        stride: int = 1,
        first_streams: bool = False,
    ) -> None:
        self._database = database
        self._clock = clock
        self._stride = stride
        self.head = database.opened_at
        # The one place where it is decided which ids `ANY` and `STREAM_EXISTS` recognise: those above this position.
        self._ids_after = 0 if remember_ids else self.head
        self._streams: dict[str, Facts] = {}
        self._known: dict[tuple[str, bytes], Appended | None] = {}
        self._pending: dict[tuple[str, bytes], Appended] = {}
        self._firsts: dict[bytes, str] | None = {} if first_streams else None
        """Ids with the stream that had them first, the oldest first; None where every stream knows its own."""
        self._new_firsts: dict[bytes, str] = {}  # of the present transaction
        self._rows: list[Row] = []
        self._last = 0
        self._connection: sqlite3.Connection | None = None
        """Of the last transaction."""

    def commit(self, writes: Sequence[Write]) -> list[Outcome]:
        """The outcome of each, durable when this returns. Never raises."""
        try:
            with self._database.writing() as connection:
                try:
                    return self._transaction(connection, writes)
                except BaseException:
                    self._streams.clear()
                    with suppress(sqlite3.Error):  # SQLite has often rolled back by itself
                        connection.execute("ROLLBACK")
                    raise
        except Exception as error:
            busy = getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
            if len(writes) > 1 and not busy:
                # One of them may be too large for the room that is left: the others need not fail with it.
                return [outcome for write in writes for outcome in self.commit([write])]
            return [self._failed(error) for _ in writes]

    def _failed(self, error: Exception) -> StoreUnavailable:
        failure = self._database.unavailable(error)
        failure.__cause__ = error
        return failure

    def _transaction(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> list[Outcome]:
        self._connection = connection
        connection.execute("BEGIN IMMEDIATE")
        # AUTOINCREMENT's own number, not max(position): a position stays used even if its row were removed.
        (last,) = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'log'").fetchone()
        if last != self.head or len(self._streams) > CACHED_STREAMS:
            self._streams.clear()
        self._last = last
        self._rows.clear()
        self._look_up(connection, writes)
        outcomes: list[Outcome] = []
        for write in writes:
            try:
                outcomes.append(write.apply(self))
            except StoreError as refusal:
                outcomes.append(refusal.with_traceback(None))  # which has this frame, and so all that the group writes
        self._insert(connection)
        connection.execute("COMMIT")
        self.head = self._last
        if self._firsts is not None:
            self._keep_firsts(self._firsts)
        return outcomes

    def put(self, stream: str, version: int, event: EventData) -> None:
        position, id_ = self._last + self._stride, event.id.bytes
        is_json = event.content_type == JSON
        self._rows.append(
            (position, stream, version, event.type, event.data, event.metadata, is_json, id_, self._clock())
        )
        self._pending.setdefault((stream, id_), Appended(version, position))
        if self._firsts is not None:
            self._new_firsts.setdefault(id_, stream)
        self._last = position
        self._streams[stream].last = version  # it is known, because something was decided about it
        if stream.startswith("$$"):
            original = stream[2:]
            self.facts(original).soft = retention_of(original, event.data).soft_deleted

    @property
    def reached(self) -> int:
        return self._last

    def _insert(self, connection: sqlite3.Connection) -> None:
        """What was decided so far. Many rows to a statement: see `sqlite_log._page` for the reason."""
        rows, at = self._rows, 0
        for count in _ROWS:
            while len(rows) - at >= count:
                connection.execute(_INSERTS[count], tuple(chain.from_iterable(rows[at : at + count])))
                at += count
        rows.clear()

    def facts(self, stream: str) -> Facts:
        facts = self._streams.get(stream)
        if facts is None:
            connection = self._within()
            facts = self._streams[stream] = self._read_facts(connection, stream, last_version(connection, stream))
        return facts

    def document(self, stream: str) -> bytes:
        return latest_data(self._within(), f"$${stream}")[0]

    def _within(self) -> sqlite3.Connection:
        """Return the connection of the present transaction, which then sees all that was put."""
        connection = self._connection
        assert connection is not None
        self._insert(connection)
        return connection

    def _read_facts(self, connection: sqlite3.Connection, stream: str, last: int) -> Facts:
        return Facts(last, retention_of(stream, latest_data(connection, f"$${stream}")[0]).soft_deleted)

    def _look_up(self, connection: sqlite3.Connection, writes: Sequence[Write]) -> None:
        """What the group will ask, in two questions instead of some for each write."""
        self._known.clear()
        self._pending.clear()
        self._new_firsts.clear()
        new = {write.stream for write in writes if write.stream not in self._streams}
        last: dict[str, int] = {}
        for count, names in _padded([name for stream in new for name in (stream, f"$${stream}")], ""):
            last.update(connection.execute(_LAST[count], names).fetchall())
        for stream in new:
            metastream = f"$${stream}"
            if last[metastream] < 0:
                self._streams[stream] = Facts(last[stream], False)
            else:
                self._streams[stream] = self._read_facts(connection, stream, last[stream])
            self._streams.setdefault(metastream, Facts(last[metastream], False))
        wanted = [
            (write.stream, write.events[0].id.bytes)
            for write in writes
            if write.events and (write.expected is ANY or write.expected is STREAM_EXISTS)
        ]
        self._known.update(dict.fromkeys(wanted))
        # A stream without events has no ids to be asked for.
        for count, keys in _padded([key for key in wanted if self._streams[key[0]].last >= 0], ("", b"")):
            found = connection.execute(_FIND[count], (*chain.from_iterable(keys), self._ids_after)).fetchall()
            for stream, id_, version, position in found:
                self._known[stream, id_] = Appended(version, position)

    def _keep_firsts(self, firsts: dict[bytes, str]) -> None:
        for id_, stream in self._new_firsts.items():
            firsts.setdefault(id_, stream)
        for id_ in list(islice(firsts, max(len(firsts) - FIRST_STREAMS, 0))):
            del firsts[id_]

    def _belongs_elsewhere(self, stream: str, id_: bytes) -> bool:
        """Another stream had the id first."""
        firsts = self._firsts
        return firsts is not None and (firsts.get(id_) or self._new_firsts.get(id_, stream)) != stream

    def recorded(self, stream: str, id_: bytes) -> Appended | None:
        if self._belongs_elsewhere(stream, id_):
            return None
        key = (stream, id_)
        if key not in self._known:
            assert self._connection is not None
            found = self._connection.execute(_FIND[1], (stream, id_, self._ids_after)).fetchone()
            self._known[key] = None if found is None else Appended(found[2], found[3])
        return self._known[key] or self._pending.get(key)

    def recorded_at(self, stream: str, version: int) -> tuple[bytes, int] | None:
        query = "SELECT id, position FROM log WHERE stream = ? AND version = ?"
        found: tuple[bytes, int] | None = self._within().execute(query, (stream, version)).fetchone()
        return found


def _padded(items: list[T], filler: T) -> Iterator[tuple[int, list[T]]]:
    """The items in pieces of a few fixed lengths, so that SQLite's statements are prepared once."""
    for at in range(0, len(items), _ROWS[0]):
        piece = items[at : at + _ROWS[0]]
        count = next(count for count in reversed(_ROWS) if count >= len(piece))
        yield count, piece + [filler] * (count - len(piece))


# Only numbers of placeholders are formatted into these.
_LAST: Final = {
    count: f"WITH wanted (stream) AS (VALUES {', '.join(['(?)'] * count)}) SELECT wanted.stream, "  # nosec
    "coalesce((SELECT max(version) FROM log WHERE log.stream = wanted.stream), -1) FROM wanted"
    for count in _ROWS
}
# The first recording of an id is the one that counts.
_FIND: Final = {
    count: f"WITH wanted (stream, id) AS (VALUES {', '.join(['(?, ?)'] * count)}) "  # nosec
    "SELECT log.stream, log.id, log.version, min(log.position) FROM wanted CROSS JOIN log "
    "ON log.stream = wanted.stream AND log.id = wanted.id WHERE log.position > ? GROUP BY log.stream, log.id"
    for count in _ROWS
}


# ---- the thread --------------------------------------------------------------------


class Member(Protocol):
    """Who takes part in a log: one open store. Both are called on the writer's thread."""

    def settled(self, outcomes: list[tuple[Write, Outcome]], head: int) -> None:
        """Outcomes of this member's writes, if there were any, and how far the log goes now."""
        ...

    def left(self) -> None:
        """All of this member's writes are settled, and nothing follows."""
        ...


class _Leaving:
    def __init__(self, member: Member, last: bool) -> None:
        self.member = member
        self.last = last


class Writer:
    """The thread that commits: takes what is queued, makes it durable with one commit, tells everybody.

    It also looks, while somebody subscribes, whether another process has appended.
    """

    def __init__(self, database: Database, appender: Appender, finish: Callable[[], None]) -> None:
        self._database = database
        self._appender = appender
        self._finish = finish
        self._queue: SimpleQueue[list[Write] | _Leaving] = SimpleQueue()
        self._lock = threading.Lock()
        self._members: set[Member] = set()
        self._watching = 0
        self._data_version = 0
        self._thread = threading.Thread(target=self._run, name="tidings-sqlite-writer", daemon=True)
        self._thread.start()

    def join(self, member: Member) -> int:
        """From now on `member` hears of every commit. Returns a position that the log had reached before."""
        with self._lock:
            self._members = {*self._members, member}  # a new set: the thread may be walking over the old one
        return self._appender.head

    def submit(self, writes: list[Write]) -> None:
        self._queue.put(writes)

    def watch(self, more: int) -> None:
        """A subscription begins to wait (+1) or ends (-1). Called in one thread per member."""
        with self._lock:
            self._watching += more
        if more > 0:
            self._queue.put([])  # the thread may be waiting without a limit

    def leave(self, member: Member, *, last: bool) -> None:
        """After everything that was submitted before: `member.left()`. The last one ends the thread and the log."""
        self._queue.put(_Leaving(member, last))

    def wait(self) -> None:
        """Wait for the thread to be gone; for after `left` of the last member."""
        self._thread.join()

    def _run(self) -> None:
        backlog: deque[Write | _Leaving] = deque()
        while True:
            try:
                polling = self._watching > 0 and self._database.path is not None
                item = self._queue.get(block=not backlog, timeout=POLL if polling else None)
                while True:
                    if isinstance(item, _Leaving):
                        backlog.append(item)
                    else:
                        backlog.extend(item)
                    item = self._queue.get_nowait()
            except Empty:
                pass
            group: list[Write] = []
            size = 0
            while backlog and isinstance(first := backlog[0], Write) and len(group) < GROUP_WRITES:
                size += first.size
                if group and size > GROUP_BYTES:
                    break
                group.append(first)
                backlog.popleft()
            if group:
                self._tell(list(zip(group, self._appender.commit(group), strict=True)), self._appender.head)
            elif backlog:
                leaving = backlog.popleft()
                if isinstance(leaving, _Leaving) and self._dismiss(leaving):
                    return
            elif self._watching:
                self._look()

    def _tell(self, outcomes: list[tuple[Write, Outcome]], reached: int) -> None:
        by_member: dict[Member, list[tuple[Write, Outcome]]] = {member: [] for member in self._members}
        for pair in outcomes:
            by_member[pair[0].member].append(pair)
        for member, its in by_member.items():
            member.settled(its, reached)

    def _dismiss(self, leaving: _Leaving) -> bool:
        with self._lock:
            self._members = self._members - {leaving.member}
        try:
            if leaving.last:
                self._finish()
        finally:
            leaving.member.left()
        return leaving.last

    def _look(self) -> None:
        """Whether another process has committed; `data_version` costs a look into shared memory."""
        with suppress(sqlite3.Error), self._database.writing() as connection:
            (version,) = connection.execute("PRAGMA data_version").fetchone()
            if version != self._data_version:
                self._data_version = version
                self._tell([], head(connection))
