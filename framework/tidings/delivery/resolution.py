"""Whether a staged event is in the log already, and at which version to append it if not. It only reads.

Each stream is read backwards from its end, no further than needed. What was read of a long stream is remembered, so
that many events that wait for the same stream share one reading of it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, NamedTuple
from uuid import UUID

import structlog

from tidings.database.staged_events import StagedEvent
from tidings.delivery.claims import Sought, claim
from tidings.errors import StreamDeleted, StreamNotFound
from tidings.modelling.taken_ids import TakenIds
from tidings.protocol.identity import instead_of
from tidings.protocol.position import CARRIED
from tidings.stores import NO_STREAM, Appended, EventStore, Expected, RecordedEvent

__all__ = ["Ids", "Place", "Resolver"]

log = structlog.get_logger("tidings.staged")

REMEMBERED: Final = 2_000_000
"""Event ids, and what events say of themselves, that one resolver remembers at most; some 25 bytes each."""
LONG: Final = 50
"""Events of a stream, read at once, from which on its ids are remembered."""


class Place(NamedTuple):
    """Where to append a staged event."""

    expected: Expected
    identity: UUID
    """The id to append it under: its own, unless somebody else has used that for another event."""


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

    __slots__ = ("after", "claims", "counted", "high", "ids", "low")

    def __init__(self) -> None:
        self.ids = Ids()
        """Ids of all events that were read; of a stretch of the log, of none."""
        self.claims = Ids()
        """What the events say of themselves that somebody emitted."""
        self.counted = 0
        """Ids when it was remembered last."""
        self.low = -1
        """Version of the oldest event that was read."""
        self.high = -1
        """Version of the newest event that was read; of a stretch of the log, the position up to which it was read."""
        self.after = -1
        """All events above this position were read."""

    def __len__(self) -> int:
        """Ids and claims."""
        return len(self.ids) + len(self.claims)

    def add(self, event: RecordedEvent) -> None:
        self.ids.add(event.id_bytes)
        self.claim(event)

    def claim(self, event: RecordedEvent) -> None:
        """Remember what the event says of itself, if somebody emitted it."""
        said = claim(event)
        if said is not None:
            self.claims.add(said)

    def holds(self, sought: Sought) -> bool:
        return any(said in self.claims for said in sought.claims)


class Resolver:
    """The resolver of one stager. Rows of one stream are resolved one after the other, each within its `turn`."""

    def __init__(self, store: EventStore, *, remembered: int = REMEMBERED, taken: TakenIds | None = None) -> None:
        """`taken` is told of ids under which somebody else has appended something."""
        self._store = store
        self._taken = TakenIds() if taken is None else taken
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

    async def resolve(self, row: StagedEvent, actual: int) -> Place | None:
        """Return where to append the event, None when it is in the log already.

        `actual` is the stream's version as a refused append named it; -1 when there was none. Raises `StreamDeleted`
        for an event that is not in its tombstoned stream; `StoreUnavailable`.
        """
        stream, sought = row.stream, Sought(row)
        part = self._parts.get(stream)
        whole = None if part is None else await self._read_on(part, sought, actual)
        if part is None or whole is None:
            part = _Part()
            try:
                whole = await self._read_down(part, sought, None)
            except StreamDeleted:
                if await self._in_log(sought):
                    return None
                raise
        self._keep(stream, part)
        if part.holds(sought) or (not whole and await self._is_hidden(sought)):
            return None
        expected: Expected = NO_STREAM if actual < 0 else actual
        return Place(part.high if part.high >= 0 else expected, _free(part, sought, self._taken))

    def appended(self, row: StagedEvent, place: Place, done: Appended) -> None:
        """Take note that a row was appended where `resolve` said: nothing came between what was read and it."""
        part = self._parts.get(row.stream)
        if part is not None and done.version == part.high + 1:
            event = row.event
            part.add(
                RecordedEvent(
                    done.position,
                    row.stream,
                    done.version,
                    event.type,
                    b"",
                    event.metadata,
                    True,
                    place.identity.bytes,
                    0,
                )
            )
            part.high = done.version

    async def _read_on(self, part: _Part, sought: Sought, actual: int) -> bool | None:
        """Read what is needed beyond what is known; as `_read_down`. None when the stream is not what it was."""
        row = sought.row
        try:
            if actual > part.high and not part.holds(sought):
                async for event in self._store.read_stream(row.stream, start=part.high + 1):
                    sought.is_it(event)
                    part.add(event)
                    part.high = event.version
                if actual > part.high:
                    return None
            if part.holds(sought) or row.cause >= part.after:
                return True
            return await self._read_down(part, sought, part.low - 1)
        except (StreamNotFound, StreamDeleted):
            return None

    async def _read_down(self, part: _Part, sought: Sought, start: int | None) -> bool:
        """Read backwards as far as the row, or its cause, below which it cannot be. True when it came so far."""
        row = sought.row
        try:
            async for event in self._store.read_stream(row.stream, start=start, backwards=True):
                if part.high < 0:
                    part.high = event.version
                if event.position <= row.cause:
                    part.after = row.cause
                    return True
                part.low, part.after = event.version, event.position - 1
                part.add(event)
                if sought.is_it(event):
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
        part.counted = len(part)
        self._remembered += part.counted
        while self._remembered > self._limit:
            self._remembered -= self._parts.popitem(last=False)[1].counted

    async def _is_hidden(self, sought: Sought) -> bool:
        """Was it appended, and then truncated or deleted? What a stream hides, the log still shows."""
        return (await self._store.get_metadata(sought.row.stream)).version >= 0 and await self._in_log(sought)

    async def _in_log(self, sought: Sought) -> bool:
        row = sought.row
        async with self._log_turn:
            part = self._log
            if part is None:
                part = self._log = _Part()
                part.high = part.after = row.cause
            if row.cause < part.after:
                async for event in self._store.read_all(after=row.cause, filter=CARRIED):
                    if event.position > part.after:
                        break
                    part.claim(event)
                part.after = row.cause
            async for event in self._store.read_all(after=part.high, filter=CARRIED):
                part.claim(event)
                part.high = event.position
            if len(part) > self._limit:
                self._log = None
            return part.holds(sought)


def _free(part: _Part, sought: Sought, noted: TakenIds) -> UUID:
    """Return the id to append the event under, and name in the log who has used its own."""
    row, foreign = sought.row, sought.foreign
    taken = [identity for identity in row.ids if identity.bytes in part.ids]
    identity = instead_of(row.event.id) if row.event.id in taken else row.event.id
    if taken:
        kind, position = (None, None) if foreign is None else (foreign.type, foreign.position)
        noted.note(taken[0], row.stream, kind, position)
        log.error(
            "staged.foreign",
            stream=row.stream,
            event_id=str(taken[0]),
            type=row.event.type,
            appended_as=str(identity),
            foreign_position=position,
            foreign_type=kind,
            advice="somebody else has appended another event under an id that only this service should use; the real "
            "event is appended beside it. See who may write to the stream, and set TIDINGS_ID_KEYS (docs/trust.md)",
        )
    return identity
