"""The simulated store: one log, and each process's access to it, with replicas that lag and answers that get lost.

It keeps EventStoreDB's rules for appends and, like EventStoreDB, forgets the ids of `ANY` appends at a restart. It has
only what relays and services use: it deletes nothing and cannot follow a single stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID
from weakref import WeakSet

from tidings.errors import StoreUnavailable, StreamNotFound
from tidings.stores import (
    ANY,
    EVERYTHING,
    JSON,
    Appended,
    CaughtUp,
    Checkpoint,
    EventData,
    Expected,
    Filter,
    RecordedEvent,
    StreamMetadata,
)
from tidings.stores.rules import METADATA, Facts, decide, retention_of
from tidings.testing.simulation.dice import Dice
from tidings.testing.simulation.loop import Process, SimulatedLoop

__all__ = ["LOG", "SimulatedLog", "SimulatedStore"]

LOG: Final = UUID("5eed5eed-0000-4000-8000-000000000001")

ANSWER_LOST: Final = 0.02
"""Share of appends whose answer is lost."""


OTHER_REPLICA: Final = 0.3
"""Share of tasks that are answered by another replica when they ask for the head."""


class SimulatedLog:
    """The log that all processes share, without faults of its own. Positions rise by more than 1, as in
    EventStoreDB."""

    def __init__(self, loop: SimulatedLoop, dice: Dice, tell: Callable[..., None]) -> None:
        self.loop = loop
        self.dice = dice
        self.tell = tell
        self.events: list[RecordedEvent] = []
        """All events that were ever appended."""
        self.removed: set[int] = set()
        """Positions that retention has removed."""
        self.term = 0
        """Number of restarts. A restart ends the calls that are under way."""
        self.changed = asyncio.Event()
        self._streams: dict[str, list[RecordedEvent]] = {}
        self._remembered: dict[tuple[str, bytes], Appended] = {}
        self._gaps = dice.random("positions")
        self.append("tidings_log", [EventData("tidings_Log", b"{}", id=LOG)], ANY)

    @property
    def newest(self) -> int:
        """The last position of the log, -1 when it is empty."""
        return self.events[-1].position if self.events else -1

    def append(self, stream: str, events: Sequence[EventData], expected: Expected) -> Appended:
        """Append by EventStoreDB's rules. Raises as `EventStore.append`."""
        known = self._streams.get(stream, [])

        def recorded_at(version: int) -> tuple[bytes, int] | None:
            return (known[version].id_bytes, known[version].position) if version < len(known) else None

        done = decide(
            stream,
            Facts(len(known) - 1, soft=False),
            expected,
            [event.id.bytes for event in events],
            has_metadata=lambda: f"$${stream}" in self._streams,
            recorded=lambda identity: self._remembered.get((stream, identity)),
            recorded_at=recorded_at,
        )
        if done is not None:
            return done
        for event in events:
            self._write(stream, event)
        self.wake()
        return Appended(len(self._streams[stream]) - 1, self.newest)

    def _write(self, stream: str, event: EventData) -> None:
        versions = self._streams.setdefault(stream, [])
        position = max(self.newest, 0) + self._gaps.randint(1, 4)
        ticks = int(self.loop.time() * 10_000_000)
        is_json = event.content_type == JSON
        row = RecordedEvent(
            position, stream, len(versions), event.type, event.data, event.metadata, is_json, event.id.bytes, ticks
        )
        versions.append(row)
        self.events.append(row)
        self._remembered.setdefault((stream, row.id_bytes), Appended(row.version, position))
        if not stream.startswith(("tidings_", "$")):
            self.tell("log", f"{position}: {event.type} in {stream}")

    def wake(self) -> None:
        """Wake the subscriptions: there may be something new to read."""
        self.changed.set()
        self.changed = asyncio.Event()

    def remove(self, position: int) -> None:
        """Remove an event, as retention does."""
        self.removed.add(position)

    def forget(self) -> None:
        """Forget the ids of appended events, as a store with a bounded memory does after many appends."""
        self._remembered.clear()

    def restart(self) -> None:
        """Restart the store: calls under way are lost, and it forgets the ids of `ANY` appends."""
        self.term += 1
        self.forget()
        self.wake()

    def stream(self, stream: str) -> list[RecordedEvent]:
        """Return the events of a stream that can be read."""
        known = self._streams.get(stream, [])
        first = retention_of(stream, self.document(stream)).first(len(known) - 1)
        return [event for event in known[first:] if event.position not in self.removed]

    def document(self, stream: str) -> bytes:
        """Return the metadata of a stream as JSON, empty if there is none."""
        known = self._streams.get(f"$${stream}")
        return known[-1].data if known else b""

    def after(self, position: int, upto: int) -> RecordedEvent | None:
        """Return the first event after a position, up to `upto`, or None."""
        low, high = 0, len(self.events)
        while low < high:
            middle = (low + high) // 2
            if self.events[middle].position <= position:
                low = middle + 1
            else:
                high = middle
        for event in self.events[low:]:
            if event.position > upto:
                break
            if event.position not in self.removed:
                return event
        return None


class SimulatedStore:
    """The store as one process sees it."""

    def __init__(self, log: SimulatedLog, process: Process) -> None:
        self._log = log
        self._process = process
        self._appends = 0
        self.away = False
        """Whether the store cannot be reached from this process."""
        self.frozen: int | None = None
        """Position up to which this process's replica has come; None if it does not lag."""
        self._elsewhere: WeakSet[asyncio.Task[Any]] = WeakSet()
        """Tasks that read from another replica, one that does not lag."""

    @property
    def reach(self) -> int:
        """The last position that the replica has from which the task reads that asks."""
        newest = self._log.newest
        return newest if self.frozen is None or asyncio.current_task() in self._elsewhere else self.frozen

    async def _io(self, kind: str) -> None:
        term = self._log.term
        await self._process.io(kind)
        self._check(term)

    def _check(self, term: int) -> None:
        if self.away or self._log.term != term:
            raise StoreUnavailable("the simulated store cannot be reached")

    async def append(self, stream: str, events: Sequence[EventData], *, expected: Expected = ANY) -> Appended:
        """See `EventStore.append`. The answer may be lost."""
        await self._io("append")
        log, process = self._log, self._process
        done = log.append(stream, events, expected)
        self._appends += 1
        term = log.term
        await process.io("appended")
        name = f"answer {process}/{self._appends}"
        if not process.hasty and log.dice.chance(name) < ANSWER_LOST and log.dice.allows(name):
            log.tell("store", f"the answer to {process}'s append to {stream} is lost")
            raise StoreUnavailable("the answer to an append was lost")
        self._check(term)
        return done

    async def read_stream(
        self, stream: str, *, start: int | None = None, backwards: bool = False, limit: int | None = None
    ) -> AsyncIterator[RecordedEvent]:
        """See `EventStore.read_stream`: from the leader, so it never lags."""
        await self._io("read")
        found = self._log.stream(stream)
        if not found:
            raise StreamNotFound(stream)
        if backwards:
            found = [event for event in reversed(found) if start is None or event.version <= start]
        else:
            found = [event for event in found if event.version >= (start or 0)]
        for event in found[:limit]:
            yield event

    async def read_all(
        self, *, after: int = -1, backwards: bool = False, limit: int | None = None, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent]:
        """See `EventStore.read_all`."""
        await self._io("read")
        log = self._log
        if backwards:
            seen = [event for event in reversed(log.events) if after < event.position <= self.reach]
            seen = [event for event in seen if event.position not in log.removed and filter.matches(event)]
            for event in seen[:limit]:
                yield event
            return
        at, left = after, limit
        while left != 0 and (found := log.after(at, self.reach)) is not None:
            at = found.position
            if filter.matches(found):
                left = None if left is None else left - 1
                yield found
                if self._process.chance(0.2):
                    await self._io("read on")

    async def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        """See `EventStore.subscribe_all`."""
        log, at, behind = self._log, after, True
        term = log.term
        while True:
            await self._process.io("follow")
            self._check(term)
            passed = False
            while (found := log.after(at, self.reach)) is not None:
                at, behind, passed = found.position, True, True
                if filter.matches(found):
                    passed = False
                    yield found
            if passed:
                yield Checkpoint(at)
            if behind:
                behind = False
                yield CaughtUp(at)
            changed = log.changed
            if log.after(at, self.reach) is None and not self.away and log.term == term:
                await changed.wait()

    async def head(self) -> int:
        """See `EventStore.head`: of the replica from which the task will read from now on. While one of them lags, the
        answers to two tasks differ, and the second may know of less than the first."""
        await self._io("head")
        task = asyncio.current_task()
        assert task is not None
        if self._process.chance(OTHER_REPLICA):
            self._elsewhere.add(task)
        else:
            self._elsewhere.discard(task)
        return self.reach

    async def log_id(self) -> UUID:
        """See `EventStore.log_id`."""
        await self._io("identity")
        return LOG

    async def get_metadata(self, stream: str) -> StreamMetadata:
        """See `EventStore.get_metadata`."""
        await self._io("read")
        document = self._log.document(stream)
        return StreamMetadata(json.loads(document) if document else {}, 0 if document else -1)

    async def set_metadata(self, stream: str, values: Mapping[str, Any], *, expected: Expected = ANY) -> Appended:
        """See `EventStore.set_metadata`."""
        return await self.append(f"$${stream}", [EventData(METADATA, json.dumps(values).encode())], expected=expected)
