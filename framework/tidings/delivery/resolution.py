"""Whether a staged event is in the log already, and at which version to append it if not. It only reads.

Each stream is read backwards from its end, no further than needed. What was read of a long stream is remembered, so
that many events that wait for the same stream share one reading of it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from tidings.database.staged_events import StagedEvent
from tidings.errors import StreamDeleted, StreamNotFound
from tidings.protocol.position import CARRIED
from tidings.stores import NO_STREAM, Appended, EventStore, Expected, RecordedEvent

__all__ = ["Ids", "Resolver"]

REMEMBERED: Final = 2_000_000
"""Event ids that one resolver remembers at most; some 25 bytes each."""
LONG: Final = 50
"""Events of a stream, read at once, from which on its ids are remembered."""
_HANDLER: Final = b'"tidingsHandler"'
"""In the metadata of everything that handlers emit."""


class Ids:
    """A set of event ids in little memory: 16 bytes each, on shelves by their first two bytes."""

    def __init__(self) -> None:
        self._shelves: dict[bytes, bytearray] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, id_bytes: bytes) -> None:
        """Add an id that is not in it."""
        shelf = self._shelves.get(id_bytes[:2])
        if shelf is None:
            self._shelves[id_bytes[:2]] = bytearray(id_bytes)
        else:
            shelf += id_bytes
        self._count += 1

    def __contains__(self, id_bytes: bytes) -> bool:
        shelf = self._shelves.get(id_bytes[:2])
        if shelf is None:
            return False
        at = shelf.find(id_bytes)
        while at >= 0 and at % 16:  # the end of one id and the beginning of the next may look like it
            at = shelf.find(id_bytes, at + 1)
        return at >= 0


class _Part:
    """The end of a stream as it was read, or a stretch of the log."""

    __slots__ = ("after", "counted", "high", "ids", "low")

    def __init__(self) -> None:
        self.ids = Ids()
        self.counted = 0
        """Ids when it was remembered last."""
        self.low = -1
        """Version of the oldest event that was read."""
        self.high = -1
        """Version of the newest event that was read; of a stretch of the log, the position up to which it was read."""
        self.after = -1
        """All events above this position were read."""

    def holds(self, row: StagedEvent) -> bool:
        return any(identity.bytes in self.ids for identity in row.ids)


class Resolver:
    """The resolver of one stager. Rows of one stream are resolved one after the other, each within its `turn`."""

    def __init__(self, store: EventStore, *, remembered: int = REMEMBERED) -> None:
        self._store = store
        self._limit = remembered
        self._parts: OrderedDict[str, _Part] = OrderedDict()
        """Streams of which much was read, the least recently used first."""
        self._remembered = 0
        """Ids in all of them."""
        self._log: _Part | None = None
        """What handlers emitted, as the log shows it: streams may hide events, the log does not."""
        self._log_turn = asyncio.Lock()
        self._turns: dict[str, tuple[asyncio.Lock, list[None]]] = {}

    def forget(self) -> None:
        """Forget what was read."""
        self._parts.clear()
        self._remembered = 0
        self._log = None

    @asynccontextmanager
    async def turn(self, stream: str) -> AsyncIterator[None]:
        """Wait until nobody else resolves or appends a row of this stream."""
        lock, users = self._turns.setdefault(stream, (asyncio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._turns[stream]

    async def resolve(self, row: StagedEvent, actual: int) -> Expected | None:
        """Return the version to append at, None when the event is in the log already.

        `actual` is the stream's version as a refused append named it; -1 when there was none. Raises `StreamDeleted`
        for an event that is not in its tombstoned stream; `StoreUnavailable`.
        """
        stream = row.stream
        part = self._parts.get(stream)
        whole = None if part is None else await self._read_on(part, row, actual)
        if part is None or whole is None:
            part = _Part()
            try:
                whole = await self._read_down(part, row, None)
            except StreamDeleted:
                if await self._in_log(row):
                    return None
                raise
        self._keep(stream, part)
        if part.holds(row) or (not whole and await self._is_hidden(row)):
            return None
        if part.high >= 0:
            return part.high
        return NO_STREAM if actual < 0 else actual

    def appended(self, row: StagedEvent, done: Appended) -> None:
        """Take note that a row was appended where `resolve` said: nothing came between what was read and it."""
        part = self._parts.get(row.stream)
        if part is not None and done.version == part.high + 1:
            part.ids.add(row.event.id.bytes)
            part.high = done.version

    async def _read_on(self, part: _Part, row: StagedEvent, actual: int) -> bool | None:
        """Read what is needed beyond what is known; as `_read_down`. None when the stream is not what it was."""
        try:
            if actual > part.high and not part.holds(row):
                async for event in self._store.read_stream(row.stream, start=part.high + 1):
                    part.ids.add(event.id_bytes)
                    part.high = event.version
                if actual > part.high:
                    return None
            if part.holds(row) or row.cause >= part.after:
                return True
            return await self._read_down(part, row, part.low - 1)
        except (StreamNotFound, StreamDeleted):
            return None

    async def _read_down(self, part: _Part, row: StagedEvent, start: int | None) -> bool:
        """Read backwards as far as the row, or its cause, below which it cannot be. True when it came so far."""
        wanted = frozenset(identity.bytes for identity in row.ids)
        try:
            async for event in self._store.read_stream(row.stream, start=start, backwards=True):
                if part.high < 0:
                    part.high = event.version
                if event.position <= row.cause:
                    part.after = row.cause
                    return True
                part.low, part.after = event.version, event.position - 1
                part.ids.add(event.id_bytes)
                if event.id_bytes in wanted:
                    return True
                if event.version == 0:
                    part.after = -1
                    return True
        except StreamNotFound:
            pass
        return False

    def _keep(self, stream: str, part: _Part) -> None:
        """Remember it if that is worth while, and forget what was not used for longest."""
        former = self._parts.pop(stream, None)
        if former is not None:
            self._remembered -= former.counted
        if len(part.ids) < LONG:
            return
        self._parts[stream] = part
        part.counted = len(part.ids)
        self._remembered += part.counted
        while self._remembered > self._limit:
            self._remembered -= self._parts.popitem(last=False)[1].counted

    async def _is_hidden(self, row: StagedEvent) -> bool:
        """Was it appended, and then truncated or deleted? What a stream hides, the log still shows."""
        return (await self._store.get_metadata(row.stream)).version >= 0 and await self._in_log(row)

    async def _in_log(self, row: StagedEvent) -> bool:
        async with self._log_turn:
            part = self._log
            if part is None:
                part = self._log = _Part()
                part.high = part.after = row.cause
            if row.cause < part.after:
                async for event in self._store.read_all(after=row.cause, filter=CARRIED):
                    if event.position > part.after:
                        break
                    _remember(part.ids, event)
                part.after = row.cause
            async for event in self._store.read_all(after=part.high, filter=CARRIED):
                _remember(part.ids, event)
                part.high = event.position
            if len(part.ids) > self._limit:
                self._log = None
            return part.holds(row)


def _remember(ids: Ids, event: RecordedEvent) -> None:
    if _HANDLER in event.metadata:
        ids.add(event.id_bytes)
