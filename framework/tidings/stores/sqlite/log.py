"""The log as a SQLite database, synchronously: its schema, its connections, what may be read of it. It never appends.

One table holds everything; what an append or a read must know of a stream (its last version, its metadata, whether it
is deleted) is looked up in it, so that there is no second truth that could disagree.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from pathlib import Path
from struct import Struct
from time import monotonic, sleep, time_ns
from typing import Concatenate, Final, NamedTuple, ParamSpec, TypeVar
from uuid import UUID, uuid4

from pydantic_core import from_json

from tidings._support.private_files import make_private
from tidings.errors import ConfigurationError, StoreUnavailable, StreamDeleted, StreamNotFound
from tidings.stores import RecordedEvent, StreamMetadata
from tidings.stores.rules import MAX_VERSION, document_of, original_of, retention_of
from tidings.stores.table import PAGE_EVENTS, Page, View

P = ParamSpec("P")
T = TypeVar("T")

PAGE_BYTES: Final = 4 * 1024 * 1024
"""What a page of a read holds in memory at most, unless one event alone is larger."""
WINDOW: Final = 16_384
"""Positions that one page of a filtered read looks at: bounds the time for which it holds a snapshot (some 10 ms)."""

CACHE_KIB: Final = 32 * 1024
"""The writing connection's page cache: every stream's end is somewhere else in the indexes."""

APPLICATION_ID: Final = 0x54494447
SCHEMA_VERSION: Final = 1
SCHEMA: Final = f"""
CREATE TABLE log (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    stream   TEXT    NOT NULL,
    version  INTEGER NOT NULL,
    type     TEXT    NOT NULL,
    data     BLOB    NOT NULL,
    metadata BLOB    NOT NULL,
    is_json  INTEGER NOT NULL,
    id       BLOB    NOT NULL,
    ticks    INTEGER NOT NULL
);
CREATE UNIQUE INDEX log_stream_version ON log (stream, version);
CREATE INDEX log_stream_id ON log (stream, id);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


def now() -> int:
    """The store's clock: ticks of 100 ns since 1970."""
    return time_ns() // 100


# ---- connections -------------------------------------------------------------------


class Database:
    """The connections to one log: one that writes, some that read. Methods may be called from any thread.

    In memory there is a single connection and a lock: SQLite's shared cache would answer readers with errors whenever
    they meet a writer.
    """

    def __init__(self, path: str | None, busy_timeout: float) -> None:
        self.path = path
        """None: in memory."""
        self.busy_timeout = busy_timeout
        """Seconds to wait for another process's transaction."""
        self._alone = threading.Lock() if path is None else None
        self._idle: deque[sqlite3.Connection] = deque()
        self.opened_at = -1
        """The head when the database was opened."""
        self._writer = self._open()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path or ":memory:", timeout=self.busy_timeout, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self) -> sqlite3.Connection:
        if self.path is not None:
            folder = Path(self.path).absolute().parent
            if not folder.is_dir():
                raise StoreUnavailable(
                    f"the event store {self.path} cannot be opened: there is no folder {folder}", waiting_helps=False
                )
            make_private(self.path)
        connection: sqlite3.Connection | None = None
        try:
            connection = self._connect()
            # Looked at before anything is written: a file of somebody else stays as it is.
            self._is_ours(connection)
            self._enter_wal(connection)
            connection.execute("BEGIN IMMEDIATE")
            if self._is_ours(connection):
                # A write that is taken back finds out now, not at the first append, whether the file can be written.
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                connection.execute("ROLLBACK")
            else:
                _create(connection)
                connection.execute("COMMIT")
            self.opened_at = head(connection)
            log_id(connection)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, sqlite3.Error):
                if _code(error) == sqlite3.SQLITE_NOTADB:
                    raise ConfigurationError(f"{self.path} is not a SQLite database: name another file") from error
                raise self.unavailable(error) from error
            raise
        return connection

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """Whether the log is there; False for a file with nothing in it."""
        # Another process may be making it now, in one commit: what is read last says whose it is.
        (things,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (foreign,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        if application != APPLICATION_ID:
            if application or foreign or things:
                raise ConfigurationError(
                    f"{self.path} is a SQLite database of another application: nothing was written to it; "
                    "name another file for the event store"
                )
            return False
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        if schema != SCHEMA_VERSION:
            raise ConfigurationError(
                f"the event store {self.path} has schema version {schema}, this Tidings knows {SCHEMA_VERSION}: "
                "install the version of Tidings that wrote it, or a newer one"
            )
        return True

    def _enter_wal(self, connection: sqlite3.Connection) -> None:
        if self.path is None:
            return
        # SQLite does not call its busy handler here: two processes that create the file at once meet a lock.
        deadline = monotonic() + self.busy_timeout
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or monotonic() > deadline:
                    raise
                sleep(0.01)
        if mode != "wal":
            raise StoreUnavailable(
                f"the event store {self.path} cannot use write-ahead logging ({mode}): put it on a local file system"
            )
        connection.execute("PRAGMA journal_size_limit = 67108864")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The writing connection; in memory nobody reads meanwhile, because readers would see what is not committed."""
        if self._alone is None:
            yield self._writer
        else:
            with self._alone:
                yield self._writer

    def read(self, job: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`job(connection, ...)`; what SQLite raises becomes `StoreUnavailable`."""
        try:
            if self._alone is not None:
                with self._alone:
                    return job(self._writer, *args, **kwargs)
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._connect()
            try:
                return job(connection, *args, **kwargs)
            finally:
                self._idle.append(connection)
        except sqlite3.Error as error:
            raise self.unavailable(error) from error

    def close(self) -> None:
        """Move what the write-ahead log holds into the file, and close it. Nobody may be reading."""
        while self._idle:
            self._idle.pop().close()
        if self.path is not None:
            try:
                self._writer.execute("PRAGMA busy_timeout = 0")  # another process may be reading: then it is for later
                self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            except sqlite3.Error:
                pass  # everything acknowledged is safe in the write-ahead log
        self._writer.close()

    def unavailable(self, error: Exception) -> StoreUnavailable:
        """What SQLite said, and what to do about it."""
        remedy = _REMEDIES.get(_code(error), "See the cause")
        waited = f" (waited {self.busy_timeout:g} s)" if _code(error) == sqlite3.SQLITE_BUSY else ""
        return StoreUnavailable(
            f"the event store {self.path or 'in memory'} failed: {error}{waited}. {remedy}.",
            waiting_helps=_code(error) in _PASSING,
        )


_PASSING: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_REMEDIES: Final = {
    sqlite3.SQLITE_BUSY: "Another process holds the file locked: end its transaction, or try again",
    sqlite3.SQLITE_FULL: "The disk, or the room that is allowed, is full: free some and try again",
    sqlite3.SQLITE_READONLY: "The file or its folder cannot be written: correct the permissions, or the mount",
    sqlite3.SQLITE_CANTOPEN: "The file cannot be opened: check that it is a file, and its and its folder's permissions",
    sqlite3.SQLITE_IOERR: "The disk failed, or is full: look into the system's log before you go on",
    sqlite3.SQLITE_CORRUPT: "The file is damaged: restore a backup",
    sqlite3.SQLITE_NOTADB: "The file is not a database any more: restore a backup",
}


def _code(error: Exception) -> int:
    """SQLite's primary result code."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _create(connection: sqlite3.Connection) -> None:
    """Schema and identity in the transaction that is open: another process sees both or neither."""
    for statement in SCHEMA.split(";\n"):
        connection.execute(statement)
    identity = uuid4()
    connection.execute(
        "INSERT INTO log VALUES (NULL, 'tidings_log', 0, 'tidings_LogCreated', ?, x'', 1, ?, ?)",
        (json.dumps({"log": str(identity)}).encode(), identity.bytes, now()),
    )


# ---- facts about streams -----------------------------------------------------------


def head(connection: sqlite3.Connection) -> int:
    """Position of the last event; -1 without one."""
    (position,) = connection.execute("SELECT max(position) FROM log").fetchone()
    return -1 if position is None else int(position)


def log_id(connection: sqlite3.Connection) -> UUID:
    # The first event says it, or the last one that gave a restored log a new identity (`tidings.database.lineage`).
    row = connection.execute(
        "SELECT data FROM log WHERE stream = 'tidings_log' AND (version = 0 OR type = 'tidings_LogRenewed') "
        "ORDER BY version DESC LIMIT 1"
    ).fetchone()
    try:
        return UUID(document_of(row[0])["log"])
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise StoreUnavailable(
            "the event store has lost its identity (first event of stream 'tidings_log'): restore a backup"
        ) from error


def last_version(connection: sqlite3.Connection, stream: str) -> int:
    """-1 without events, `MAX_VERSION` when tombstoned."""
    (version,) = connection.execute("SELECT max(version) FROM log WHERE stream = ?", (stream,)).fetchone()
    return -1 if version is None else int(version)


def latest_data(connection: sqlite3.Connection, stream: str) -> tuple[bytes, int]:
    """Data and version of the stream's last event; (b"", -1) without one."""
    query = "SELECT data, version FROM log WHERE stream = ? ORDER BY version DESC LIMIT 1"
    return connection.execute(query, (stream,)).fetchone() or (b"", -1)


def _refuse_tombstoned(connection: sqlite3.Connection, stream: str) -> int:
    """The stream's last version. A metadata stream is closed with its stream."""
    last, original = last_version(connection, stream), original_of(stream)
    if last == MAX_VERSION or (original is not None and last_version(connection, original) == MAX_VERSION):
        raise StreamDeleted(stream)
    return last


def metadata_of(connection: sqlite3.Connection, stream: str) -> StreamMetadata:
    """The stream's metadata. Raises `StreamDeleted`."""
    _refuse_tombstoned(connection, stream)
    document, version = latest_data(connection, f"$${stream}")
    return StreamMetadata(document_of(document), version)


def view_of(connection: sqlite3.Connection, stream: str, now: int) -> View:
    """Raises `StreamNotFound` (also for a softly deleted stream) and `StreamDeleted`."""
    last = _refuse_tombstoned(connection, stream)
    kept = retention_of(stream, latest_data(connection, f"$${stream}")[0])
    if last < 0 or kept.soft_deleted:
        raise StreamNotFound(stream)
    return View(kept.first(last), last, max(now - kept.max_age * 10_000_000, 0) if kept.max_age else 0)


# ---- pages -------------------------------------------------------------------------


def page_of_all(
    connection: sqlite3.Connection,
    after: int,
    before: int,
    backwards: bool,
    condition: tuple[str, tuple[str, ...]],
    count: int,
    most: int = PAGE_BYTES,
) -> Page:
    """Events with positions between `after` and `before`, both exclusive, from one of the two ends."""
    # The head first: what is at or below it is committed, so that a page may say that it looked so far.
    bottom, top = min(max(after, 0), MAX_VERSION), min(head(connection), before - 1)
    low = max(bottom, top - WINDOW) if backwards else bottom
    high = top if backwards else min(bottom + WINDOW, top)
    where = f"position > ? AND position <= ?{condition[0]}"
    events, cut = _page(connection, where, (low, high, *condition[1]), "position", backwards, count, most)
    if cut:
        reached = events[-1].position
        return Page(events, reached, False)
    if backwards:
        return Page(events, low + 1, low == bottom)
    return Page(events, max(high, after), high >= top)


def page_of_stream(
    connection: sqlite3.Connection, stream: str, view: View, backwards: bool, count: int, most: int = PAGE_BYTES
) -> tuple[list[RecordedEvent], bool]:
    """Events in a view from one of its two ends, and whether there are more."""
    where = "stream = ? AND version >= ? AND version <= ? AND ticks >= ?"
    return _page(connection, where, (stream, *view), "version", backwards, count, most)


class Following(NamedTuple):
    """A piece of a stream that is followed."""

    events: list[RecordedEvent]
    version: int
    """The next piece begins behind it."""
    reached: int
    """The log's head when it was looked at."""
    end: bool


def follow(
    connection: sqlite3.Connection, stream: str, after: int, history: bool, now: int, most: int = PAGE_BYTES
) -> Following:
    """Events behind version `after`; `history`: only those that may be read, as opposed to what has just happened.

    A subscriber that is at the end receives what is appended whatever retention says of it (EventStoreDB pushes it),
    the tombstone included. Raises `StreamDeleted` for a stream whose history ends with a tombstone.
    """
    reached, last = head(connection), last_version(connection, stream)  # before all else: what comes later is live
    view = View(0, MAX_VERSION, 0)
    if history:
        try:
            view = view_of(connection, stream, now)
        except StreamNotFound:
            return Following([], max(after, last), reached, True)
    view = view._replace(first=max(view.first, min(after, MAX_VERSION - 1) + 1))
    events, more = page_of_stream(connection, stream, view, False, PAGE_EVENTS, most)
    version = events[-1].version if events else after
    if history and not more:
        version = max(version, view.last)
    return Following(events, version, reached, not more)


def _page(
    connection: sqlite3.Connection,
    where: str,
    values: tuple[object, ...],
    key: str,
    backwards: bool,
    count: int,
    most: int,
) -> tuple[list[RecordedEvent], bool]:
    """Return up to `count` events, and whether it stopped before the end of `where`: at `count`, or because of memory.

    All rows are packed into one: Python's sqlite3 gives up the interpreter lock at each row, and winning it back from a
    busy event loop takes 5 ms. Measured beside a busy thread, 512 events took 11 ms packed and 1 s row by row.
    """
    # `where` and `key` are texts of this module; what comes from outside is a parameter. The inner query names its
    # columns: with `*`, SQLite copies each row's data once more, also where only its length is asked for.
    rest = f"FROM log WHERE {where} ORDER BY {key} {'DESC' if backwards else 'ASC'} LIMIT ?)"  # nosec
    while count > 1:
        found, size = connection.execute(_SIZES + rest, (*values, count)).fetchone()
        if size <= most:
            if not found:
                return [], False
            break
        count = max(1, min(found, count) // 2)
    heads, packed = connection.execute(_PACKED + rest, (*values, count)).fetchone()
    events = _unpacked(heads, packed)
    return events, len(events) == count


_SIZES: Final = "SELECT count(*), total(size) FROM (SELECT length(data) + length(metadata) AS size "
_PACKED: Final = (
    "SELECT json_array(json_group_array(position), json_group_array(stream), json_group_array(version), "
    "json_group_array(type), json_group_array(is_json), json_group_array(ticks), json_group_array(data_size), "
    "json_group_array(metadata_size)), CAST(group_concat(payload, '') AS BLOB) FROM (SELECT position, stream, version, "
    "type, is_json, ticks, length(data) AS data_size, length(metadata) AS metadata_size, id || data || metadata "
    "AS payload "
)


def _unpacked(heads: str, packed: bytes | None) -> list[RecordedEvent]:
    """Return the events of a page. Column by column, because no step of it then runs Python code for each event."""
    if packed is None:
        return []
    positions, streams, versions, types, is_json, ticks, *sizes = from_json(heads)
    layout = "16s%ds%ds" * len(positions) % tuple(chain.from_iterable(zip(*sizes, strict=True)))
    parts = Struct(layout).unpack(packed)
    columns = (positions, streams, versions, types, parts[1::3], parts[2::3], map(bool, is_json), parts[::3], ticks)
    # What `RecordedEvent._make` does, without its checks.
    return list(map(tuple.__new__, repeat(RecordedEvent), zip(*columns, strict=True)))
