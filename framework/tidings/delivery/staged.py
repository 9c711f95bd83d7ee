"""Staged events on their way back into the log: each appended exactly once, in order per bucket of their cause."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol
from uuid import UUID

import structlog

from tidings._support.backoff import nth_pause
from tidings._support.telling import Telling
from tidings.database.dead_letters import Letter
from tidings.database.staged_events import StagedEvent
from tidings.delivery.requests import Requests
from tidings.delivery.resolution import Resolver
from tidings.errors import (
    LogBehind,
    LogChanged,
    StoreError,
    StoreUnavailable,
    StreamForbidden,
    WrongExpectedVersion,
)
from tidings.modelling.taken_ids import TakenIds
from tidings.protocol.position import Lanes
from tidings.stores import ANY, EventStore

__all__ = ["Outcome", "Stager"]

log = structlog.get_logger("tidings.staged")

FLIGHTS: Final = 64
"""Appends under way at once, each of another bucket."""

FORBIDDEN_ATTEMPTS: Final = 6
"""Attempts at a forbidden stream before the event is dead: some six seconds, in which a right may arrive."""
RETRY_SECONDS: Final = (0.2, 5.0)
"""First and longest pause before one event is tried again."""

FRESH_SECONDS: Final = 1.0
"""Seconds after the beginning of a commit within which nobody else can have taken over and appended the same row: a
successor first has to notice and to join. They pass while the process is stopped, and while the machine sleeps."""
AWAY_ATTEMPTS: Final = 3
"""Attempts at one event, some 0.6 s, after which nobody is kept waiting for a store that is away."""
FORGET_SECONDS: Final = 60.0
"""Seconds after which what was read of streams is forgotten when nobody needs it."""


class Outcome(Protocol):
    """Who is told what came of staged events."""

    def appended(self, id: UUID) -> None:
        """It is in the store, and needs its row no more."""

    def given_up(self, id: UUID, letter: Letter) -> None:
        """It can never be appended."""


class _Row:
    __slots__ = ("actual", "attempts", "fresh_until", "staged")

    def __init__(self, staged: StagedEvent, fresh_until: float) -> None:
        self.staged = staged
        self.fresh_until = fresh_until
        """Until then (by the stager's clock) no other process can have tried it."""
        self.attempts = 0
        self.actual = -1
        """The stream's version as a refused append named it."""


class Stager:
    """Appends what handlers emitted, after their transaction was committed.

    Stores forget the ids of `ANY` appends, so `ANY` is for what cannot be in the log yet: the first attempt at a row
    that this process has just committed, and whose cause was appended to the log after this process had begun to be the
    one at work. Any other row may have been appended already: by a process before this one, or in an earlier life of
    the service, of which its database knows nothing when it is a new one, or was restored from a backup. Then its
    stream is read back to its cause first, and it is appended at the version just read (`tidings.delivery.resolution`).
    `outcome` is told what may be forgotten, and what is given up.
    """

    def __init__(
        self,
        store: EventStore,
        outcome: Outcome,
        *,
        clock: Callable[[], float] = time.monotonic,
        taken: TakenIds | None = None,
    ) -> None:
        self._store = store
        self._outcome = outcome
        self._lanes: Lanes[_Row] = Lanes()
        self._ready: asyncio.Queue[tuple[int, _Row]] = asyncio.Queue()
        self._clock = clock
        self._outage = -FRESH_SECONDS
        """When the store was last away: what was staged before is fresh no more."""
        self._telling = Telling(log, clock)
        self._requests = Requests(clock)
        self._resolver = Resolver(store, taken=taken)
        self._resolved_at = 0.0
        self._tenure = 0
        """Counts how often this process began to be the one at work."""
        self._newest: int | None = None
        """Position of an append of this tenure. What stands above it was appended later still, so nobody can have
        handled it before. The log's own head would do, if no store ever answered from a replica that lags."""

    def now(self) -> float:
        """The time by which `add` is told since when rows may be committed."""
        return self._clock()

    def __len__(self) -> int:
        """Events not appended yet."""
        return len(self._lanes)

    def begin(self) -> None:
        """This process is the one at work from now on: what was appended until now, others may have handled."""
        self._tenure += 1
        self._newest = None
        self._resolver.forget()

    def add(self, rows: Sequence[StagedEvent], *, since: float | None) -> None:
        """Append these. `since`: when, at the earliest, rows were committed that nobody tried yet; None for rows of any
        age."""
        for row in rows:
            self._requests.began(row)
            self._lanes.push(row.bucket, _Row(row, 0.0 if since is None else since + FRESH_SECONDS))
        self._pump()

    def collect(self, rows: Sequence[StagedEvent], *, all: bool) -> None:
        """Append what requests emitted, in whichever process. `rows` are `all` that wait in the database, or the oldest
        of them; those that are known already are passed over."""
        self.add(self._requests.new(rows, all=all), since=None)

    def watch(self, identity: UUID) -> asyncio.Future[bool]:
        """Return a future that ends when the event is appended (True), or cannot be for now (False): the store is
        away, or refuses it. Ask before the event's row is committed. It may never end, when another process appends."""
        return self._requests.watch(identity)

    def _pump(self) -> None:
        while (taken := self._lanes.take()) is not None:
            self._ready.put_nowait(taken)

    async def run(self) -> None:
        """Until cancelled. A cancelled append is found again at the next start."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(FLIGHTS):
                    tasks.create_task(self._fly())
        finally:
            self._requests.disappoint()

    async def _fly(self) -> None:
        while True:
            bucket, row = await self._ready.get()
            identity = row.staged.event.id
            try:
                await self._append(row)
            except (LogChanged, LogBehind):
                raise
            except StoreError as error:  # about this stream or event alone: others go on
                reason = f"{type(error).__name__}: {error}"
                log.error("staged.dead", stream=row.staged.stream, event_id=str(identity), reason=reason)
                self._outcome.given_up(identity, Letter.of_staged(row.staged, row.attempts + 1, reason))
                self._requests.tell(identity, False)
            else:
                self._outcome.appended(identity)
                self._telling.seems_over("staged.goes_on")
                self._requests.tell(identity, True)
            self._requests.away = False
            self._requests.ended(row.staged)
            self._lanes.finish(bucket)
            self._pump()

    async def _append(self, row: _Row) -> None:
        staged = row.staged
        while True:
            try:
                fresh = row.fresh_until > max(self._clock(), self._outage + FRESH_SECONDS)
                row.fresh_until = 0.0
                if fresh and self._is_new_to_log(staged):
                    await self._store.append(staged.stream, [staged.event], expected=ANY)
                else:
                    await self._resolve(row)
                return
            except WrongExpectedVersion as error:
                row.actual = error.actual  # somebody appended between reading and writing, or the stream hides events
            except StreamForbidden as error:
                row.attempts += 1
                if row.attempts >= FORBIDDEN_ATTEMPTS:
                    raise
                pause = nth_pause(row.attempts, *RETRY_SECONDS)
                log.warning(
                    "staged.forbidden",
                    stream=row.staged.stream,
                    event_id=str(row.staged.event.id),
                    attempts=row.attempts,
                    pause=pause,
                    error=str(error),
                )
                await asyncio.sleep(pause)
            except StoreUnavailable as error:
                self._outage = self._clock()
                row.attempts += 1
                pause = nth_pause(row.attempts, *RETRY_SECONDS)
                if row.attempts >= AWAY_ATTEMPTS and not self._requests.away:
                    self._requests.away = True
                    self._requests.disappoint()
                self._telling.failed("staged.waiting", error, kind="", stream=staged.stream, pause=pause)
                await asyncio.sleep(pause)

    def _is_new_to_log(self, staged: StagedEvent) -> bool:
        """Whether its cause is so new that no earlier life of this service can have handled it."""
        if self._newest is None or staged.cause <= self._newest:
            return False
        if self._resolved_at and self._clock() - self._resolved_at > FORGET_SECONDS:
            self._resolved_at = 0.0
            self._resolver.forget()
        return True

    async def _resolve(self, row: _Row) -> None:
        """Append it, unless it is in the log already."""
        staged, tenure = row.staged, self._tenure
        self._resolved_at = self._clock()
        async with self._resolver.turn(staged.stream):
            place = await self._resolver.resolve(staged, row.actual)
            if place is None:
                return
            event = replace(staged.event, id=place.identity)
            done = await self._store.append(staged.stream, [event], expected=place.expected)
            self._resolver.appended(staged, place, done)
        if self._newest is None and tenure == self._tenure:
            self._newest = done.position
