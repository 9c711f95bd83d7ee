"""Staged events on their way back into the log: each appended exactly once, in order per bucket of their cause."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID

import structlog

from tidings.errors import (
    EventTooLarge,
    InvalidStreamName,
    StoreUnavailable,
    StreamDeleted,
    StreamNotFound,
    WrongExpectedVersion,
)
from tidings.inbox import Letter, StagedEvent
from tidings.position import Lanes
from tidings.stores import ANY, NO_STREAM, EventStore, Expected, Filter

__all__ = ["Stager"]

log = structlog.get_logger("tidings.staged")

FLIGHTS: Final = 64
"""Appends under way at once, each of another bucket."""

_NEVER: Final = (StreamDeleted, EventTooLarge, InvalidStreamName)


FRESH_SECONDS: Final = 1.0
"""So long nobody else can have taken over and appended the same row: a successor first has to notice and to join."""


class _Row:
    __slots__ = ("actual", "attempts", "fresh_until", "staged")

    def __init__(self, staged: StagedEvent, fresh_until: float) -> None:
        self.staged = staged
        self.fresh_until = fresh_until
        """Until then (by the stager's clock) never tried by anyone: `ANY` cannot write it twice."""
        self.attempts = 0
        self.actual = -1
        """The stream's version as a refused append named it."""


class Stager:
    """Appends what handlers emitted, after their transaction was committed.

    A fresh row is appended with `ANY`. A row found at the start, or tried with an unknown outcome, may be in the log
    already, and stores forget the ids of `ANY` appends: its stream is read back to its cause first, then it is appended
    at the version just read. `appended` and `buried` are called with what may be forgotten, or is given up.
    """

    def __init__(
        self,
        store: EventStore,
        appended: Callable[[UUID], None],
        buried: Callable[[UUID, Letter], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._appended = appended
        self._buried = buried
        self._lanes: Lanes[_Row] = Lanes()
        self._ready: asyncio.Queue[tuple[int, _Row]] = asyncio.Queue()
        self._clock = clock
        self._outage = -FRESH_SECONDS
        """When the store was last away: what was staged before is fresh no more."""

    def __len__(self) -> int:
        """Events not appended yet."""
        return len(self._lanes)

    def add(self, rows: Sequence[StagedEvent], *, since: float | None) -> None:
        """`since`: when, at the earliest, rows were committed that nobody tried yet; None for rows of any age."""
        for row in rows:
            self._lanes.push(row.bucket, _Row(row, 0.0 if since is None else since + FRESH_SECONDS))
        self._pump()

    def _pump(self) -> None:
        while (taken := self._lanes.take()) is not None:
            self._ready.put_nowait(taken)

    async def run(self) -> None:
        """Until cancelled. A cancelled append is found again at the next start."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(FLIGHTS):
                tasks.create_task(self._fly())

    async def _fly(self) -> None:
        while True:
            bucket, row = await self._ready.get()
            identity = row.staged.event.id
            try:
                await self._append(row)
            except _NEVER as error:
                reason = f"{type(error).__name__}: {error}"
                log.error("staged.dead", stream=row.staged.stream, event_id=str(identity), reason=reason)
                self._buried(identity, Letter.of_staged(row.staged, row.attempts + 1, reason))
            else:
                self._appended(identity)
            self._lanes.finish(bucket)
            self._pump()

    async def _append(self, row: _Row) -> None:
        while True:
            try:
                fresh = row.fresh_until > max(self._clock(), self._outage + FRESH_SECONDS)
                row.fresh_until = 0.0
                expected: Expected | None = ANY if fresh else await self._resolve(row)
                if expected is not None:
                    await self._store.append(row.staged.stream, [row.staged.event], expected=expected)
                return
            except WrongExpectedVersion as error:
                row.actual = error.actual  # somebody appended between reading and writing, or the stream hides events
            except StoreUnavailable as error:
                self._outage = self._clock()
                row.attempts += 1
                pause = min(0.1 * 2**row.attempts, 5.0)
                if row.attempts in (1, 10) or row.attempts % 100 == 0:
                    log.warning(
                        "staged.waiting", stream=row.staged.stream, attempts=row.attempts, pause=pause, error=str(error)
                    )
                await asyncio.sleep(pause)

    async def _resolve(self, row: _Row) -> Expected | None:
        """The version to append at, None when the event is in its stream already."""
        staged, expected, whole = row.staged, NO_STREAM if row.actual < 0 else row.actual, False
        newest: Expected | None = None
        try:
            async for event in self._store.read_stream(staged.stream, backwards=True):
                newest = event.version if newest is None else newest
                if event.id_bytes == staged.event.id.bytes:
                    return None
                whole = event.version == 0 or event.position <= staged.cause
                if whole:
                    break
        except StreamNotFound:
            pass
        except StreamDeleted:
            if await self._in_log(staged):
                return None
            raise
        if not whole and await self._hidden(staged):
            return None
        return expected if newest is None else newest

    async def _hidden(self, staged: StagedEvent) -> bool:
        """Was it appended, and then truncated or deleted? What a stream hides, the log still shows."""
        return (await self._store.get_metadata(staged.stream)).version >= 0 and await self._in_log(staged)

    async def _in_log(self, staged: StagedEvent) -> bool:
        async for event in self._store.read_all(after=staged.cause, filter=Filter(stream_prefixes=(staged.stream,))):
            if event.id_bytes == staged.event.id.bytes:
                return True
        return False
