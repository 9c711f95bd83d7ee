"""From lanes to handlers to the commit: effects, watermarks, emitted events and dead letters in one transaction.

Handlers without a session run side by side, one per bucket at a time, and join the next commit. Handlers with one run
within it, one after the other, each in its savepoint. What was taken from the bus is settled when everything before it
was committed; until then it would come again.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction

from tidings.attempt import Failure, Resources, attempt, is_infrastructure
from tidings.buses import Consumer
from tidings.codec import read_metadata
from tidings.context import Context
from tidings.database import Database, guarded, outages
from tidings.errors import Fenced, TransactionMisuse
from tidings.handlers import Handler, Inject
from tidings.inbox import Inbox, Letter, Remembered, StagedEvent
from tidings.position import Lanes, Settled, Ticket
from tidings.service import Service
from tidings.staged import Stager
from tidings.stores import EventStore, RecordedEvent
from tidings.transaction import GuardedConnection, GuardedSession

__all__ = ["Dispatcher", "Step", "Troubles"]

log = structlog.get_logger("tidings.dispatch")

GROUP: Final = 64
"""Events with a session that share one transaction at most."""
GROUP_SECONDS: Final = 0.025
"""A transaction takes no further event with a session after this long."""
LINGER_SECONDS: Final = 0.005
"""A commit waits this long for others to join it."""
SLOW_SECONDS: Final = 0.25
"""A handler that holds the writer longer than this is named in the log and gets transactions of its own."""
FLOOR_SECONDS: Final = 1.0
"""The floor is stored at most so often."""


class Step(NamedTuple):
    """What to do when everything up to here is settled: settle a delivery, raise the floor, or both."""

    consumer: Consumer | None = None
    tag: int = 0
    floor: int = -1


class Troubles:
    """Attempts that failed, by position: they outlive a rejoin, so that an event cannot be retried for ever."""

    def __init__(self) -> None:
        self.attempts: dict[int, int] = {}
        self.condemned: dict[int, Failure] = {}
        """Dead without being run again: the handler ended the transaction that it was part of."""


class _Item:
    """An accepted event on its way through its lane."""

    __slots__ = ("bucket", "emissions", "event", "handler", "letter", "ticket")

    def __init__(self, event: RecordedEvent, bucket: int, handler: Handler, ticket: Ticket[Step | None]) -> None:
        self.event = event
        self.bucket = bucket
        self.handler = handler
        self.ticket = ticket
        self.letter: Letter | None = None
        self.emissions: list[StagedEvent] = []


class Dispatcher:
    """Volatile: made anew at each join from what the inbox remembers; any error out of `run` ends it."""

    def __init__(
        self,
        service: Service,
        store: EventStore,
        database: Database,
        inbox: Inbox,
        log_id: UUID,
        remembered: Remembered,
        resources: Resources,
        troubles: Troubles,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._database = database
        self._inbox = inbox
        self._log_id = log_id
        self._resources = resources
        self._troubles = troubles
        self._clock = clock
        self._watermarks = dict(remembered.watermarks)
        self._floor = self._stored_floor = remembered.floor
        self._floor_at = clock()
        self._lanes: Lanes[_Item] = Lanes()
        self._settled: Settled[Step | None] = Settled()
        self._free: asyncio.Queue[_Item] = asyncio.Queue()
        self._transactional: deque[_Item] = deque()
        self._uncommitted: set[int] = set()
        """Buckets with effects in the group under way: who has no session would not see them, so it waits."""
        self._deferred: list[_Item] = []
        self._finished: list[_Item] = []
        self._foreign: list[tuple[Letter, Ticket[Step | None]]] = []
        self._appended: list[UUID] = []
        self._never: list[Letter] = []
        self._slow: set[str] = set()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._timers: set[asyncio.TimerHandle] = set()
        self._floor_timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._busy = 0
        self._threads = ThreadPoolExecutor(service.concurrency, thread_name_prefix=f"tidings-{service.name}")
        self.working: dict[int, tuple[str, float]] = {}
        """Position to the handler at work on it and since when, by `clock`: for whoever must name a stuck one."""
        self.stager = Stager(store, self._was_appended, self._was_buried)

    # ---- what comes in -------------------------------------------------------------

    @property
    def floor(self) -> int:
        """Everything up to here is settled (durably at most a second later)."""
        return self._floor

    @property
    def unsettled(self) -> int:
        """Events, messages and markers that were taken and are not settled yet."""
        return len(self._settled)

    def submit(self, event: RecordedEvent, bucket: int, step: Step | None = None) -> None:
        """An accepted event. One that this service does not handle is settled without a trace."""
        handler = self._service.handlers.get(event.type)
        if handler is None:
            if step is not None:
                self.settle(step)
            return
        self._lanes.push(bucket, _Item(event, bucket, handler, self._settled.begin(step)))
        if len(self._settled) >= 2 * self._service.prefetch:
            self._room.clear()
        self._pump()

    def settle(self, step: Step) -> None:
        """Nothing to handle, but to be settled in its turn: a marker, a duplicate, the progress of a pass."""
        self._settled.begin(step, done=True)
        self._wake.set()

    def bury(self, letter: Letter, step: Step) -> None:
        """A message that is not ours: recorded, then settled."""
        log.error("message.dead", service=self._service.name, reason=letter.reason)
        self._foreign.append((letter, self._settled.begin(step)))
        self._wake.set()

    async def room(self) -> None:
        """Wait until more can be taken: a pass reads faster than handlers work, and one may hold up the rest."""
        await self._room.wait()

    # ---- lanes to handlers ----------------------------------------------------------

    def _pump(self) -> None:
        if self._stopping:
            return
        while (taken := self._lanes.take()) is not None:
            _, item = taken
            self._busy += 1
            if item.event.position in self._troubles.condemned:
                self._fail(item, self._troubles.condemned[item.event.position])
            elif item.handler.transactional:
                self._transactional.append(item)
                self._wake.set()
            elif item.bucket in self._uncommitted:
                self._deferred.append(item)
            else:
                self._free.put_nowait(item)

    async def run(self) -> None:
        """Until cancelled, or until the database, the store or another process ends it with an error."""
        self.stager.add(await self._inbox.staged_events(), fresh=False)
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._service.concurrency):
                    tasks.create_task(self._work())
                tasks.create_task(self._commit())
                tasks.create_task(self.stager.run())
        finally:
            self._stopping = True
            self._threads.shutdown(wait=False)
            for timer in self._timers:
                timer.cancel()

    async def drain(self, seconds: float) -> None:
        """Begin nothing new, let what runs finish and be committed, store the floor; at most so long."""
        self._stopping = True
        self._busy -= len(self._transactional) + self._free.qsize() + len(self._deferred)
        self._deferred.clear()
        self._transactional.clear()
        while not self._free.empty():
            self._free.get_nowait()
        self._wake.set()
        try:
            async with asyncio.timeout(seconds):
                while self._busy or len(self.stager) or self._appended or self._floor > self._stored_floor:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.warning("service.drain_incomplete", service=self._service.name, handlers=self._names())

    def _names(self) -> list[str]:
        return sorted({name for name, _ in self.working.values()})

    async def _work(self) -> None:
        while True:
            item = await self._free.get()
            context = self._context(item)
            failure = await self._attempt(item, context, _no_session)
            if failure is None:
                self._succeed(item, context)
            else:
                self._fail(item, failure)

    def _context(self, item: _Item) -> Context:
        tried = self._troubles.attempts.get(item.event.position, 0)
        metadata = read_metadata(item.event)
        return Context(self._service.name, item.handler.name, self._log_id, item.event, metadata, tried + 1)

    async def _attempt(self, item: _Item, context: Context, provide: Callable[[Inject], Any]) -> Failure | None:
        view = self._service.view(item.event.type)
        assert view is not None
        self.working[item.event.position] = item.handler.name, self._clock()
        try:
            return await attempt(item.handler, view, context, self._resources, provide, self._threads)
        finally:
            del self.working[item.event.position]

    def _succeed(self, item: _Item, context: Context) -> None:
        self._troubles.attempts.pop(item.event.position, None)
        item.emissions = [
            StagedEvent(item.bucket, item.event.position, stream, event) for stream, event in context.emissions
        ]
        self._finish(item)

    def _fail(self, item: _Item, failure: Failure) -> None:
        position, retry = item.event.position, item.handler.retry
        attempts = self._troubles.attempts[position] = self._troubles.attempts.get(position, 0) + 1
        facts = {
            "service": self._service.name,
            "handler": item.handler.name,
            "event_id": str(item.event.id),
            "stream": item.event.stream,
            "position": position,
            "attempt": attempts,
            "reason": failure.reason,
        }
        if not failure.permanent and attempts < retry.attempts:
            pause = retry.wait(attempts)
            log.warning("event.retrying", pause=round(pause, 3), **facts)
            self._busy -= 1
            self._wake.set()
            self._later(pause, lambda: self._again(item))
            return
        # Holding will take over here: exhausted retries become a held row instead of a dead one.
        log.error("event.dead", **facts)
        self._troubles.attempts.pop(position, None)
        item.letter = Letter.of_event(
            item.event,
            item.bucket,
            handler=item.handler.name,
            attempts=attempts,
            reason=failure.reason,
            detail=failure.detail,
        )
        self._finish(item)

    def _finish(self, item: _Item) -> None:
        """Its lane goes on; the item waits for the commit."""
        self._finished.append(item)
        if item.handler.transactional:
            self._uncommitted.add(item.bucket)
        self._lanes.finish(item.bucket)
        self._wake.set()
        self._pump()

    def _again(self, item: _Item) -> None:
        self._lanes.again(item.bucket)
        self._pump()

    def _later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        def ring() -> None:
            self._timers.discard(timer)
            call()

        timer = asyncio.get_running_loop().call_later(seconds, ring)
        self._timers.add(timer)
        return timer

    # ---- the commit -----------------------------------------------------------------

    async def _commit(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if 0 < len(self._finished) + len(self._transactional) + len(self._appended) < GROUP and not self._stopping:
                await asyncio.sleep(LINGER_SECONDS)
            self._settle_prefix()
            while self._work_to_commit():
                await self._group()
                self._settle_prefix()
            self._idle.set()

    def _work_to_commit(self) -> bool:
        return bool(
            self._transactional
            or self._finished
            or self._foreign
            or self._appended
            or self._never
            or (self._floor > self._stored_floor and self._floor_is_due())
        )

    def _floor_is_due(self) -> bool:
        return self._stopping or self._clock() - self._floor_at >= FLOOR_SECONDS

    async def _group(self) -> None:
        """One transaction. Whatever goes wrong in it ends the dispatcher: its outcome may be unknown."""
        async with self._database.transaction() as connection:
            began = self._clock()
            for nth in range(GROUP):
                if not self._transactional or self._clock() - began > GROUP_SECONDS:
                    break
                alone = self._transactional[0].handler.name in self._slow
                if alone and nth:
                    break
                await self._within(connection, self._transactional.popleft())
                if alone:
                    break
            finished, self._finished = self._finished, []
            foreign, self._foreign = self._foreign, []
            appended, self._appended = self._appended, []
            never, self._never = self._never, []
            floor = self._floor
            # A bucket's last item carries its watermark: items of one bucket finish in order.
            moves = {item.bucket: (self._watermarks[item.bucket], item.event.position) for item in finished}
            rows = [row for item in finished for row in item.emissions]
            letters = [item.letter for item in finished if item.letter is not None]
            await self._inbox.stage(connection, rows)
            await self._inbox.bury(connection, [*letters, *never, *(letter for letter, _ in foreign)])
            await self._inbox.unstage(connection, appended)
            await self._inbox.move(connection, moves)
            if floor > self._stored_floor and self._floor_is_due():
                await self._inbox.raise_floor(connection, floor)
                self._stored_floor, self._floor_at = floor, self._clock()
        for bucket, (_, position) in moves.items():
            self._watermarks[bucket] = position
        for item in finished:
            self._settled.end(item.ticket)
            if self._troubles.condemned:
                self._troubles.condemned.pop(item.event.position, None)
        for _, ticket in foreign:
            self._settled.end(ticket)
        self._busy -= len(finished)
        self.stager.add(rows, fresh=True)
        self._uncommitted.clear()
        for item in self._deferred:
            self._free.put_nowait(item)
        self._deferred.clear()

    async def _within(self, connection: AsyncConnection, item: _Item) -> None:
        """A handler with a session: its effects in a savepoint of the group's transaction."""
        context = self._context(item)
        began = self._clock()
        failure: Failure | None = None
        try:
            with outages(self._database.shown):
                scope = _Scope(connection, await connection.begin_nested())
                with guarded(connection):
                    failure = await self._attempt(item, context, scope.provide)
                    if failure is None:
                        failure = await scope.flush(item.handler)
                if failure is None:
                    await scope.keep()
                else:
                    await scope.undo()
        except (DBAPIError, InvalidRequestError, TransactionMisuse) as error:
            # Without its savepoint its effects cannot be told from the group's: the whole group is undone. SQLAlchemy
            # may believe that the transaction is over, and would hand the connection back as it is.
            with suppress(InvalidRequestError):
                await connection.run_sync(_roll_back)
            raise self._condemn(item, failure, error) from error
        took = self._clock() - began
        if took > SLOW_SECONDS and item.handler.name not in self._slow:
            self._slow.add(item.handler.name)
            log.warning(
                "handler.holds_writer",
                service=self._service.name,
                handler=item.handler.name,
                seconds=round(took, 3),
                advice="do slow work outside the session, or in a handler without one",
            )
        if failure is None:
            self._succeed(item, context)
        else:
            self._fail(item, failure)

    def _condemn(self, item: _Item, failure: Failure | None, error: Exception) -> Fenced:
        reason = failure.reason if failure else f"TransactionMisuse: it ended the transaction it was part of: {error}"
        detail = failure.detail if failure else "".join(traceback.format_exception(error))
        self._troubles.condemned[item.event.position] = Failure(reason, detail, permanent=True)
        return Fenced(
            f"service {self._service.name!r}: handler {item.handler.name!r} ended the transaction that its group "
            f"shares ({reason}); the group is undone, and the event at position {item.event.position} dead"
        )

    def _settle_prefix(self) -> None:
        consumer: Consumer | None = None
        tag = 0
        for step in self._settled.pop():
            if step is None:
                continue
            self._floor = max(self._floor, step.floor)
            if step.consumer is not None:
                if consumer is not None and step.consumer is not consumer:
                    consumer.settle_through(tag)
                consumer, tag = step.consumer, step.tag
        if consumer is not None:
            consumer.settle_through(tag)
        if len(self._settled) < self._service.prefetch:
            self._room.set()
        if self._floor > self._stored_floor and self._floor_timer not in self._timers:
            self._floor_timer = self._later(FLOOR_SECONDS, self._wake.set)

    def _was_appended(self, id: UUID) -> None:
        self._appended.append(id)
        self._wake.set()

    def _was_buried(self, id: UUID, letter: Letter) -> None:
        self._never.append(letter)
        self._was_appended(id)


class _Scope:
    """What one handler is given of the group's transaction."""

    def __init__(self, connection: AsyncConnection, savepoint: AsyncTransaction) -> None:
        self._connection = connection
        self._savepoint = savepoint
        self._whole = connection.get_transaction()
        self._session: GuardedSession | None = None

    def provide(self, wanted: Inject) -> Any:
        if wanted is Inject.CONNECTION:
            return GuardedConnection(self._connection)
        self._session = self._session or GuardedSession(self._connection)
        return self._session

    async def flush(self, handler: Handler) -> Failure | None:
        """Write what the handler left pending; what that raises is the handler's failure."""
        try:
            if self._session is not None:
                await self._session.keep()
        except Exception as error:
            if is_infrastructure(error):
                raise
            return Failure.of(error, handler)
        return None

    async def keep(self) -> None:
        self._check_whole()
        if not self._savepoint.is_active:
            raise TransactionMisuse("rollback")
        await self._savepoint.commit()

    async def undo(self) -> None:
        self._check_whole()
        if self._session is not None:
            await self._session.drop()
        if self._savepoint.is_active:
            await self._savepoint.rollback()
        else:
            # A failed flush has rolled back to it already; what the handler did afterwards goes too.
            await self._connection.run_sync(_rollback_to, self._savepoint.sync_transaction)

    def _check_whole(self) -> None:
        if self._whole is None or not self._whole.is_active or self._connection.get_transaction() is not self._whole:
            raise TransactionMisuse("commit or rollback")


def _rollback_to(connection: Connection, savepoint: Any) -> None:
    connection.dialect.do_rollback_to_savepoint(connection, savepoint._savepoint)


def _roll_back(connection: Connection) -> None:
    connection.dialect.do_rollback(connection.connection)


def _no_session(wanted: Inject) -> Any:
    raise AssertionError(f"a handler without a session asked for {wanted}")
