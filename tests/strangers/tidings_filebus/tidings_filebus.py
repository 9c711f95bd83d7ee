"""An event bus in one SQLite file, for all processes of one machine: `TIDINGS_BUS=file:///var/lib/shop/bus.db`.

Queues are rows of the file. The operating system's file locks say which consumer is active and who holds a lock; they
end with the process that has them. Nothing is pushed: consumers look every `POLL` seconds.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import json
import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tidings.buses import Delivery, Message, Subscription, TopologyItem
from tidings.errors import BusUnavailable, ConfigurationError, PublishRejected, TopologyMismatch, Unroutable

__all__ = ["FileBus", "open_file"]

POLL: Final = 0.01
"""Seconds between two looks at the file while nothing comes."""
BATCH: Final = 256
"""Messages that a consumer reads at once."""
EXCHANGE: Final = "tidings.events"

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS queues (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, low INTEGER, high INTEGER
);
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, queue INTEGER NOT NULL, delivered INTEGER NOT NULL DEFAULT 0,
    body BLOB NOT NULL, properties TEXT NOT NULL, bucket INTEGER
);
CREATE INDEX IF NOT EXISTS messages_of_queue ON messages (queue, id);
CREATE TABLE IF NOT EXISTS consumers (id INTEGER PRIMARY KEY AUTOINCREMENT, queue INTEGER NOT NULL, pid INTEGER);
"""


class _Connection:
    """The file as one publisher or consumer has it open, and the file lock that it holds or asks for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost: str | None = None
        self._lock: int | None = None
        self._on_lost: list[Callable[[], None]] = []
        try:
            self.database = sqlite3.connect(path, timeout=5, isolation_level=None)
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = NORMAL")
            self.database.executescript(_TABLES)
        except sqlite3.Error as error:
            raise BusUnavailable(f"the bus file {str(path)!r} cannot be opened: {error}") from error

    def check(self) -> None:
        if self.lost is not None:
            raise BusUnavailable(self.lost)

    @contextmanager
    def changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that writes. Raises `BusUnavailable` where the file cannot be written."""
        self.check()
        try:
            self.database.execute("BEGIN IMMEDIATE")
            try:
                yield self.database
            except BaseException:
                self.database.execute("ROLLBACK")
                raise
            self.database.execute("COMMIT")
        except sqlite3.Error as error:
            self.cut(f"the bus file {str(self.path)!r} cannot be written: {error}")
            raise BusUnavailable(str(self.lost)) from error

    def take(self, name: str) -> bool:
        """Whether this connection has the file lock of that name now. It never waits."""
        if self._lock is not None:
            return True
        place = self.path.with_name(f"{self.path.name}.{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock")
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        self._lock = handle
        return True

    def when_lost(self, call: Callable[[], None]) -> None:
        self._on_lost.append(call)

    def cut(self, reason: str) -> None:
        """End it, without a word to anybody else."""
        if self.lost is not None:
            return
        self.lost = reason
        for call in self._on_lost:
            call()
        self.database.close()
        if self._lock is not None:
            os.close(self._lock)


class _Publisher:
    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._waiting: list[tuple[Message, str, asyncio.Future[None]]] = []
        connection.when_lost(self._give_up)

    async def send(self, message: Message) -> None:
        await (await self.begin(message))

    async def begin(self, message: Message) -> asyncio.Future[Any]:
        """Messages of one turn of the loop are one transaction."""
        self._connection.check()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        try:
            properties = _written(message)
        except (TypeError, ValueError) as error:
            raise PublishRejected(message.message_id, f"it cannot be written as JSON: {error}") from error
        self._waiting.append((message, properties, future))
        if len(self._waiting) == 1:
            loop.call_soon(self._flush)
        return future

    def _flush(self) -> None:
        if self._connection.lost is not None:
            return
        routed = []
        with suppress(BusUnavailable), self._connection.changing() as database:
            for message, properties, _ in self._waiting:
                inserted = database.execute(
                    "INSERT INTO messages (queue, body, properties, bucket) SELECT id, ?1, ?2, ?3 FROM queues "
                    "WHERE low IS NOT NULL AND (?3 IS NULL OR ?3 BETWEEN low AND high)",
                    (message.body, properties, message.bucket),
                )
                routed.append(inserted.rowcount > 0)
        if self._connection.lost is not None:
            return
        waiting, self._waiting = self._waiting, []
        for (message, _, future), reached in zip(waiting, routed, strict=True):
            if future.done():  # its sender gave it up
                continue
            if reached:
                future.set_result(None)
            else:
                future.set_exception(Unroutable(EXCHANGE, message.message_id))

    def _give_up(self) -> None:
        for _, _, future in self._waiting:
            if not future.done():
                future.set_exception(BusUnavailable(str(self._connection.lost)))


class _Consumer:
    def __init__(self, connection: _Connection, queue: int, name: str, prefetch: int) -> None:
        self._connection, self._queue, self._name, self._prefetch = connection, queue, name, prefetch
        self._read: deque[tuple[int, Message]] = deque()
        """Rows that were read and not given out."""
        self._unsettled: deque[tuple[int, int]] = deque()
        """Tag and row of each delivery that was given out."""
        self._given = 0
        with connection.changing() as database:
            inserted = database.execute("INSERT INTO consumers (queue, pid) VALUES (?, ?)", (queue, os.getpid()))
        self._row = inserted.lastrowid

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self

    async def __anext__(self) -> Delivery:
        if self._given % BATCH == BATCH - 1:
            await asyncio.sleep(0)
        while True:
            self._connection.check()
            if self._read or self._fill():
                row, message = self._read.popleft()
                self._given += 1
                self._unsettled.append((self._given, row))
                return Delivery(self._given, message)
            await asyncio.sleep(POLL)

    def settle_through(self, tag: int) -> None:
        last = None
        while self._unsettled and self._unsettled[0][0] <= tag:
            last = self._unsettled.popleft()[1]
        if last is not None and self._connection.lost is None:
            with suppress(BusUnavailable), self._connection.changing() as database:
                database.execute("DELETE FROM messages WHERE queue = ? AND id <= ?", (self._queue, last))

    def leave(self) -> None:
        """Say that what is unsettled waits again."""
        if self._connection.lost is None:
            with suppress(BusUnavailable), self._connection.changing() as database:
                database.execute("DELETE FROM consumers WHERE id = ?", (self._row,))
                if self._connection.take(self._name):
                    database.execute("UPDATE messages SET delivered = 0 WHERE queue = ?", (self._queue,))
            self._connection.cut("this consumer was left")

    def _fill(self) -> bool:
        """Read what the prefetch has room for; False when there is nothing."""
        connection, room = self._connection, min(BATCH, self._prefetch - len(self._unsettled))
        there = connection.database.execute("SELECT 1 FROM queues WHERE id = ?", (self._queue,)).fetchone()
        if there is None:
            connection.cut(f"queue {self._name!r} of {str(connection.path)!r} was deleted")
            connection.check()
        if room <= 0 or not connection.take(self._name):
            return False
        if self._given == 0:  # whoever was active before has left, with or without a word
            with connection.changing() as database:
                database.execute("UPDATE messages SET delivered = 0 WHERE queue = ? AND delivered", (self._queue,))
        rows = connection.database.execute(
            "SELECT id, body, properties, bucket FROM messages WHERE queue = ? AND NOT delivered ORDER BY id LIMIT ?",
            (self._queue, room),
        ).fetchall()
        if not rows:
            return False
        with connection.changing() as database:
            database.execute(
                "UPDATE messages SET delivered = 1 WHERE queue = ? AND id <= ?", (self._queue, rows[-1][0])
            )
        self._read.extend((row, _read(body, properties, bucket)) for row, body, properties, bucket in rows)
        return True


class FileBus:
    """An `EventBus` in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._closed = False
        self.connections: set[_Connection] = set()
        """Those open now, for tests that cut them."""

    def __repr__(self) -> str:
        return f"FileBus(file://{self._path})"

    async def provision(self, subscription: Subscription | None = None) -> None:
        with self._connected() as connection, connection.changing() as database:
            if subscription is None:
                return
            if self._foreign(database, subscription.queue):
                raise TopologyMismatch(self._mismatch(subscription.queue))
            buckets = subscription.buckets
            database.execute(
                "INSERT INTO queues (name, low, high) VALUES (?, ?, ?) ON CONFLICT (name) "
                "DO UPDATE SET low = min(low, excluded.low), high = max(high, excluded.high)",
                (subscription.queue, buckets.start, buckets.stop - 1),
            )

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        with self._connected() as connection, connection.changing() as database:
            for subscription in subscriptions:
                name = (subscription.queue,)
                database.execute("DELETE FROM messages WHERE queue IN (SELECT id FROM queues WHERE name = ?)", name)
                database.execute("DELETE FROM queues WHERE name = ?", name)

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        if not self._closed and not self._path.exists():
            missing = [TopologyItem("queue", subscription.queue, "missing") for subscription in subscriptions]
            return [TopologyItem("exchange", EXCHANGE, "missing"), *missing]
        found = [TopologyItem("exchange", EXCHANGE, "fits")]
        with self._connected() as connection:
            found += [self._found(connection.database, subscription.queue) for subscription in subscriptions]
        return found

    def _found(self, database: sqlite3.Connection, name: str) -> TopologyItem:
        row = database.execute("SELECT id FROM queues WHERE name = ?", (name,)).fetchone()
        if row is None:
            return TopologyItem("queue", name, "missing")
        [waiting] = database.execute("SELECT count(*) FROM messages WHERE queue = ? AND NOT delivered", row).fetchone()
        pids = database.execute("SELECT pid FROM consumers WHERE queue = ?", row).fetchall()
        consumers = sum(Path(f"/proc/{pid}").exists() for (pid,) in pids)  # one that was killed has left no word
        if self._foreign(database, name):
            return TopologyItem("queue", name, "differs", self._mismatch(name), waiting, consumers)
        return TopologyItem("queue", name, "fits", "", waiting, consumers)

    @staticmethod
    def _foreign(database: sqlite3.Connection, name: str) -> bool:
        return database.execute("SELECT 1 FROM queues WHERE name = ? AND low IS NULL", (name,)).fetchone() is not None

    def _mismatch(self, name: str) -> str:
        return (
            f"queue {name!r} of {str(self._path)!r} exists, but is bound to no buckets: something else made it. Delete "
            f"it:  sqlite3 {self._path} \"DELETE FROM queues WHERE name = '{name}'\""
        )

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[_Publisher]:
        with self._connected() as connection:
            while lock is not None and not connection.take(f"lock {lock}"):
                await asyncio.sleep(POLL)
                connection.check()
            yield _Publisher(connection)

    @asynccontextmanager
    async def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AsyncIterator[_Consumer]:
        with self._connected() as connection:
            name = subscription.queue
            row = connection.database.execute("SELECT id FROM queues WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise BusUnavailable(f"queue {name!r} of {str(self._path)!r} does not exist: provision it first")
            consumer = _Consumer(connection, row[0], name, prefetch)
            try:
                yield consumer
            finally:
                consumer.leave()

    async def close(self) -> None:
        self._closed = True
        for connection in list(self.connections):
            connection.cut(f"{self!r} was closed")

    @contextmanager
    def _connected(self) -> Iterator[_Connection]:
        if self._closed:
            raise BusUnavailable(f"{self!r} is closed")
        connection = _Connection(self._path)
        self.connections.add(connection)
        try:
            yield connection
        finally:
            self.connections.discard(connection)
            connection.cut("this connection was closed")


def _written(message: Message) -> str:
    """Everything but the body, as JSON; bytes in a list, which no header is."""
    headers = {
        name: [base64.b64encode(value).decode()] if isinstance(value, bytes) else value
        for name, value in message.headers.items()
    }
    rest = (message.message_id, message.type, message.content_type, message.correlation_id, message.app_id)
    return json.dumps([headers, *rest])


def _read(body: bytes, properties: str, bucket: int | None) -> Message:
    headers, message_id, kind, content_type, correlation_id, app_id = json.loads(properties)
    plain = {name: base64.b64decode(value[0]) if isinstance(value, list) else value for name, value in headers.items()}
    return Message(body, message_id, kind, plain, content_type, correlation_id, app_id, bucket)


async def open_file(url: str) -> FileBus:
    """The bus in the file that `file:///path` names. Raises `ConfigurationError` for a URL without a path."""
    path = url.partition("://")[2]
    if not path.startswith("/"):
        raise ConfigurationError("the URL of a file bus must name a file: write file:///var/lib/NAME/bus.db")
    return FileBus(Path(path))
