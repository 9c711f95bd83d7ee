"""Appends in flight on one BatchAppend call, and what becomes of them when it is lost. It never repeats `ANY` blindly.

The server applies the appends of one call in the order in which they were sent, and answers each. When the call is
lost, the outcome of those without an answer is unknown. `NO_STREAM` and explicit versions are then sent again: they are
idempotent. The ids of `ANY` and `STREAM_EXISTS` appends live in a bounded memory of the server, which a restart clears
(measured on EventStoreDB 24.2): for those the log is asked first, and then they are appended at the version just read.
New appends wait until that is done, so that none overtakes an older one of its stream.

An append that the server answers with `Timeout` is alone with its unknown outcome: it is looked for or repeated on the
same call, later ones of its stream wait for it, and all others go on.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import Final

import structlog

from tidings._support.backoff import Backoff
from tidings._support.tasks import leading, task_group
from tidings._support.telling import Telling
from tidings.errors import StoreError, StoreUnavailable, WrongExpectedVersion
from tidings.stores import ANY, STREAM_EXISTS, Appended, EventData, Expected
from tidings.stores.eventstoredb.grpc import Connection
from tidings.stores.eventstoredb.grpc_call import Call, CallFailed, ConnectionLost
from tidings.stores.eventstoredb.leader import Leader
from tidings.stores.eventstoredb.wire import (
    BATCH_APPEND,
    Answer,
    TimedOut,
    Undecided,
    append_request,
    number_of,
    outcome_of,
)

__all__ = ["Appends", "Write"]

log = structlog.get_logger("tidings.stores.eventstoredb")

RESOLVING: Final = 32
"""Streams whose appends of unknown outcome are looked for at once."""
PAUSE_SECONDS: Final = (0.02, 0.5)
"""First and longest pause before connecting again."""

Outcome = Appended | StoreError


def _rank(write: Write) -> int:
    return write.rank


class Write:
    """One append."""

    __slots__ = (
        "answer",
        "changes",
        "events",
        "expected",
        "floor",
        "future",
        "rank",
        "refused_at",
        "repeated",
        "since",
        "size",
        "stream",
    )

    def __init__(
        self, stream: str, events: Sequence[EventData], expected: Expected, size: int, future: asyncio.Future[Appended]
    ) -> None:
        self.stream, self.events, self.expected, self.size, self.future = stream, events, expected, size, future
        self.rank = 0
        """Its place in the order in which appends began."""
        self.floor = -1
        """A position that the log had reached before the append was first sent: it can only be behind it."""
        self.refused_at = -1
        """The stream's last version, as the server said when it refused the version that was read."""
        self.changes = 0
        """Which log it was first sent to, by `Leader.changes`."""
        self.repeated = False
        """It may have been applied before."""
        self.since = 0.0
        """When it began to wait for a connection, or was first answered with a time-out."""
        self.answer: asyncio.Future[Outcome | TimedOut] | None = None
        """Who repeats it waits here for the answer; else it goes to the caller at once."""

    def settle(self, outcome: Outcome | TimedOut) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(outcome)
        elif self.answer is None and not isinstance(outcome, TimedOut):
            self.tell(outcome)

    def tell(self, outcome: Outcome) -> None:
        """The caller hears it, unless it has gone."""
        if not self.future.done():
            if isinstance(outcome, StoreError):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)


class Appends:
    """Every append of one store. `run` belongs to the store's own task."""

    def __init__(self, leader: Leader, find: Callable[[Write], Awaitable[Appended | Expected]]) -> None:
        """`find` tells where an append of unknown outcome is in the log; if it is not, the version to append at."""
        self._leader = leader
        self._find = find
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._ranks = count(1)
        self._flights: dict[int, Write] = {}
        """Sent and not answered, in the order of sending."""
        self._unknown: list[Write] = []
        """Sent on a call that was lost, in that order."""
        self._queue: deque[Write] = deque()
        self._held: dict[str, list[Write]] = {}
        """By stream, in the order in which they began: what timed out on the present call, and what came after it."""
        self._tasks: asyncio.TaskGroup | None = None
        """Those of the present call."""
        self._call: Call | None = None
        """Takes new appends; None while there is none, or those before them are not settled."""
        self._connection: Connection | None = None
        self._telling = Telling(log)
        self._live = False
        """What was unknown is settled on the present call."""
        self._wanted = asyncio.Event()
        self._troubled = asyncio.Event()
        self._reason: BaseException | None = None
        self._broken: BaseException | None = None
        """The error in this program that ended `run`: nobody would answer an append any more."""

    def submit(
        self, stream: str, events: Sequence[EventData], expected: Expected, size: int
    ) -> asyncio.Future[Appended]:
        """Hand over an append. No await before that: it keeps appends in the order in which they began."""
        if self._broken is not None:
            raise self._ended(self._broken)
        write = Write(stream, events, expected, size, self._loop.create_future())
        write.since, write.rank = self._loop.time(), next(self._ranks)
        call = self._call
        if call is not None and not call.over and self._connection is not None and not self._connection.leaving:
            if stream in self._held:
                self._held[stream].append(write)
            else:
                self._send(call, write)
        else:
            if call is not None:
                self._call = None
                call.send(end=True)  # the server answers what it has, and ends the call
            self._queue.append(write)
            self._wanted.set()
        return write.future

    @property
    def idle(self) -> bool:
        return not (self._flights or self._unknown or self._queue or self._held)

    def _open(self) -> list[Write]:
        """Return all that is not settled; some may be in it twice."""
        held = [write for writes in self._held.values() for write in writes]
        return [*self._flights.values(), *self._unknown, *held, *self._queue]

    async def finish(self, seconds: float) -> None:
        """Wait for the answers to what was begun, but no longer."""
        waiting = [write.future for write in self._open()]
        if waiting:
            await asyncio.wait(waiting, timeout=seconds)

    def fail(self, error: StoreError) -> None:
        """Tell everybody who waits."""
        for write in self._open():
            write.tell(error)
        self._flights.clear()
        self._unknown.clear()
        self._held.clear()
        self._queue.clear()

    def _send(self, call: Call, write: Write, expected: Expected | None = None) -> None:
        number = next(self._numbers)
        if not write.repeated:
            write.floor, write.changes = self._leader.known, self._leader.changes
        expected = write.expected if expected is None else expected
        call.send(append_request(number, write.stream, write.events, expected, self._leader.seconds))
        self._flights[number] = write

    # ---- the life of calls ---------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. Who waits, or comes later, hears of an error that nobody foresaw; it is logged, too."""
        try:
            await self._sessions()
        except Exception as error:
            self._broken = leading(error)
            log.error("store.appends_ended", exc_info=error)
            self.fail(self._ended(self._broken))

    def _ended(self, error: BaseException) -> StoreUnavailable:
        return StoreUnavailable(
            f"appending to EventStoreDB at {self._leader.place} has ended by an error in the adapter ({error!r}): the "
            "log of this process has the traceback. What waits may or may not have been appended; open the store again",
            waiting_helps=False,
        )

    async def _sessions(self) -> None:
        """A call while there is something to append, and another one when it is lost."""
        async with task_group() as tasks:
            tasks.create_task(self._expire())
            backoff = Backoff(*PAUSE_SECONDS)
            while True:
                await self._wanted.wait()
                try:
                    await self._session()
                except Exception as error:
                    if self._live:
                        backoff.reset()
                    cause = leading(error)
                    if not isinstance(cause, CallFailed | ConnectionLost | Undecided | StoreError):
                        log.error("store.appends_failed", exc_info=error)
                    self._lost(cause)
                    if not self.idle:
                        self._telling.failed("store.appends_interrupted", cause, unknown=len(self._unknown))
                        await backoff.wait()

    async def _session(self) -> None:
        """One call, up to its end or loss."""
        self._live = False
        connection = await self._leader.connected()
        call = await self._leader.call(BATCH_APPEND, connection)
        with call:
            async with task_group() as tasks:
                self._tasks = tasks
                receiving = tasks.create_task(self._receive(call))
                watching = tasks.create_task(self._watch(connection))
                await self._settle_unknown(call)
                for write in self._queue:
                    if not write.future.done():
                        self._send(call, write)
                self._queue.clear()
                self._wanted.clear()
                self._troubled.clear()
                self._call, self._connection, self._live = call, connection, True
                await receiving
                watching.cancel()
        self._call = None

    def _lost(self, cause: BaseException) -> None:
        """What is not settled has an unknown outcome from now on, and waits for another call."""
        self._call = None
        for write in self._flights.values():
            if write.answer is None:
                write.repeated, write.since = True, self._loop.time()
                self._unknown.append(write)
        self._flights.clear()
        held = [write for writes in self._held.values() for write in writes]
        self._held.clear()
        self._unknown = sorted({*self._unknown, *(write for write in held if write.repeated)}, key=_rank)
        self._unknown = [write for write in self._unknown if not write.future.done()]
        self._queue.extendleft(reversed([write for write in held if not write.repeated]))
        self._queue = deque(sorted(self._queue, key=_rank))
        for write in self._unknown:
            write.answer = None
        self._reason = cause
        verdict = self._leader.judge(cause)
        if verdict is not None:
            self.fail(verdict)
        if self.idle:
            self._wanted.clear()
        else:
            self._wanted.set()
            self._troubled.set()

    async def _receive(self, call: Call) -> None:
        leader, flights = self._leader, self._flights
        while messages := await call.receive():
            for message in messages:
                answer = Answer.FromString(message)
                number = number_of(answer)
                write = flights.get(number)
                if write is None:
                    continue
                outcome = outcome_of(answer, write.stream, write.expected, write.size)
                if isinstance(outcome, Appended):
                    if outcome.position > leader.known:
                        leader.known = outcome.position
                    self._telling.seems_over("store.appends_resumed")
                elif isinstance(outcome, Undecided) and not isinstance(outcome, TimedOut):
                    raise outcome  # it stays in flight: as unknown as those behind it
                del flights[number]
                if isinstance(outcome, TimedOut) and write.answer is None:
                    self._hold(call, write)
                else:
                    write.settle(outcome)
        if flights or self._held or not self._live:
            raise ConnectionLost("the server ended the call of the appends before it had answered them")

    async def _watch(self, connection: Connection) -> None:
        """The oldest append in flight must be answered within half of the time that a call may take: the other half is
        for finding another leader. Turns are counted, not seconds: a loop that was blocked must not blame the server.
        """
        oldest, turns = None, 0
        while True:
            await asyncio.sleep(self._leader.seconds / 8)
            # Of a call that takes no more (it has no flights then), those who wait for its end are the oldest.
            now = next(iter(self._flights), 0 if self._live and self._queue else None)
            turns = turns + 1 if now is not None and now == oldest else 0
            oldest = now
            if turns == 4:
                reason = f"the oldest append was not answered within {self._leader.seconds / 2:g} s"
                self._leader.distrust(reason, connection)
                raise ConnectionLost(reason)

    async def _expire(self) -> None:
        """Appends that find no connection for too long are given up: their callers hear why."""
        seconds = self._leader.seconds
        while True:
            await self._troubled.wait()
            await asyncio.sleep(min(seconds / 20, 0.25))
            limit = self._loop.time() - seconds
            late = [write for write in (*self._unknown, *self._queue) if write.since <= limit]
            for write in late:
                outcome = "may or may not have been appended" if write.repeated else "was not appended"
                write.tell(
                    StoreUnavailable(
                        f"{len(write.events)} event(s) for stream {write.stream!r}: EventStoreDB was not there for "
                        f"{seconds:g} s ({self._reason}). What was to be appended {outcome}"
                    )
                )
            self._unknown = [write for write in self._unknown if not write.future.done()]
            self._queue = deque(write for write in self._queue if not write.future.done())

    # ---- unknown outcomes ----------------------------------------------------------------

    def _hold(self, call: Call, write: Write) -> None:
        """One that timed out: find out about it, or repeat it, while later ones of its stream wait."""
        write.repeated, write.since = True, self._loop.time()
        held = self._held.get(write.stream)
        if held is None:
            self._held[write.stream] = [write]
            if self._tasks is not None:
                self._tasks.create_task(self._settle_held(call, write.stream))
        else:
            insort(held, write, key=_rank)

    async def _settle_held(self, call: Call, stream: str) -> None:
        held = self._held[stream]
        while (write := next((write for write in held if write.repeated), None)) is not None:
            if not write.future.done():
                write.tell(await self._again(call, write))
            held.remove(write)
        self._check_open(call)
        del self._held[stream]
        for write in held:
            if not write.future.done():
                self._send(call, write)

    def _check_open(self, call: Call) -> None:
        if call.ending or call.over:
            raise ConnectionLost("the call of the appends takes no more, because the server is going down")

    async def _settle_unknown(self, call: Call) -> None:
        """Find out about, or repeat, what was lost: in order within a stream, streams side by side."""
        streams: dict[str, list[Write]] = {}
        for write in self._unknown:
            if not write.future.done():
                streams.setdefault(write.stream, []).append(write)
        room = asyncio.Semaphore(RESOLVING)

        async def settle(writes: list[Write]) -> None:
            async with room:
                for write in writes:
                    if not write.future.done():
                        write.tell(await self._again(call, write))

        async with task_group() as tasks:
            for writes in streams.values():
                tasks.create_task(settle(writes))
        self._unknown.clear()

    async def _again(self, call: Call, write: Write) -> Outcome:
        expected = write.expected
        if write.changes != self._leader.changes:
            return StoreUnavailable(
                f"EventStoreDB at {self._leader.place} now holds another log; what was to be appended to stream "
                f"{write.stream!r} may or may not be in the one before"
            )
        while True:
            if write.expected is ANY or write.expected is STREAM_EXISTS:
                try:
                    found = await self._find(write)
                except StoreUnavailable as error:
                    return StoreUnavailable(
                        f"{len(write.events)} event(s) for stream {write.stream!r} may or may not have been appended, "
                        f"and the log could not be asked: {error}",
                        waiting_helps=error.waiting_helps,
                    )
                except StoreError as error:
                    return error
                if isinstance(found, Appended):
                    return found
                expected = found
            self._check_open(call)
            write.answer = self._loop.create_future()
            self._send(call, write, expected)
            outcome = await write.answer
            write.answer = None
            if isinstance(outcome, TimedOut):
                if self._loop.time() - write.since >= self._leader.seconds:
                    return StoreUnavailable(
                        f"{len(write.events)} event(s) for stream {write.stream!r} may or may not have been appended: "
                        f"EventStoreDB answered each attempt of {self._leader.seconds:g} s that it took too long"
                    )
                await asyncio.sleep(PAUSE_SECONDS[0])
                continue
            if isinstance(outcome, WrongExpectedVersion):
                if expected is write.expected:
                    # It was applied, and then more happened (a soft delete, another append): the log knows.
                    try:
                        again = await self._find(write)
                    except StoreError:
                        return outcome
                    return again if isinstance(again, Appended) else outcome
                write.refused_at = outcome.actual
                continue  # somebody appended between reading and writing
            return outcome
