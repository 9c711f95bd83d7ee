"""From lanes to handlers to the commit, in groups: what handlers did, and that it was done, become durable together.

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
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.attempt import AtWork, Failure, Resources, attempt
from tidings.breaker import Breaker
from tidings.buses import Consumer
from tidings.codec import read_metadata
from tidings.context import Context
from tidings.database import Database
from tidings.errors import DatabaseUnavailable
from tidings.first_step import FirstStep
from tidings.guard import Guard
from tidings.handlers import Inject
from tidings.held import HeldRows
from tidings.inbox import Inbox, Letter, Remembered
from tidings.keys import Keys
from tidings.position import Lanes, Settled
from tidings.progress import FLOOR_SECONDS, Batch, Progress
from tidings.revival import HELD_SECONDS, Revival
from tidings.savepoint import GroupBroken, in_savepoint
from tidings.service import Service
from tidings.staged import Stager
from tidings.stores import EventStore, RecordedEvent
from tidings.work import Item, Step, Troubles

__all__ = ["Dispatcher"]

log = structlog.get_logger("tidings.dispatch")

GROUP: Final = 64
"""Events with a session that share one transaction at most."""
GROUP_SECONDS: Final = 0.025
"""A transaction takes no further event with a session after this long."""
LINGER_SECONDS: Final = 0.005
"""A commit waits this long for others to join it."""
TURN: Final = 16
"""After so many events, which may not have waited for anything, others have their turn."""
SLOW_SECONDS: Final = 0.25
"""A handler that holds the writer longer than this is named in the log and gets transactions of its own."""
PARTING_SECONDS: Final = 0.2
"""So long a service that stops tries to say that it ended cleanly; who cannot is only taken for one that crashed."""


class Dispatcher:
    """Volatile: made anew at each join from what the inbox remembers; any error out of `run` ends it."""

    def __init__(
        self,
        service: Service,
        store: EventStore,
        database: Database,
        inbox: Inbox,
        held: HeldRows,
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
        self._held = held
        self._log_id = log_id
        self._resources = resources
        self._troubles = troubles
        self._clock = clock
        self._know(remembered)
        self._lanes: Lanes[Item] = Lanes()
        self._settled: Settled[Step | None] = Settled()
        self._free: asyncio.Queue[Item] = asyncio.Queue()
        self._transactional: deque[Item] = deque()
        self._uncommitted: set[int] = set()
        """Buckets with effects in the group under way: who has no session would not see them, so it waits."""
        self._deferred: list[Item] = []
        self._batch = Batch()
        self._keys = Keys()
        self._revival = Revival(service, database, held, self._keys, troubles, self._push, self._pump, inbox.fence)
        self._guard = Guard(service, database, inbox, troubles, clock)
        self._caution = self._guard.caution
        self._to_note: asyncio.Queue[Item] = asyncio.Queue()
        self.breaker = Breaker(clock)
        self._slow: set[str] = set()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._idle = asyncio.Event()
        self._timers: set[asyncio.TimerHandle] = set()
        self._floor_timer: asyncio.TimerHandle | None = None
        self._beside: asyncio.TimerHandle | None = None
        self._stopping = False
        self._pumping = True
        """Nothing is given out before `run` knows which keys are blocked; from then on, while `_pump` is at it."""
        self._at_work = self._draining = False
        self._busy = 0
        self._first_step = FirstStep()
        self._threads = ThreadPoolExecutor(service.concurrency, thread_name_prefix=f"tidings-{service.name}")
        self.working: dict[int, AtWork] = {}
        """By position; `since` is by `clock`."""
        self.stager = Stager(store, self._was_appended, self._was_buried, clock=clock)

    def _know(self, remembered: Remembered) -> None:
        self._progress = Progress(self._inbox, self._held, remembered, self._clock)
        self._replay = remembered.replay

    # ---- what comes in -------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing was taken that is not settled, and nothing waits to be written."""
        waits = self._busy or self._lanes or self._settled or self._batch or self.stager
        return not waits and self._progress.floor_is_stored

    async def begin(self, remembered: Remembered) -> None:
        """Go on from what another process has left, instead of from what was known before; only while `idle`."""
        self._know(remembered)
        self._revival.stale = True
        self.stager.add(await self._inbox.staged_events(), since=None)

    @property
    def floor(self) -> int:
        """Everything up to here is settled (durably at most a second later)."""
        return self._progress.floor

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
        replayed = self._replay.covers(bucket, event.position)
        self._push(Item(event, bucket, handler, self._settled.begin(step), replayed=replayed))
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
        self._batch.foreign.append((letter, self._settled.begin(step)))
        self._wake.set()

    async def room(self) -> None:
        """Wait until more can be taken: a pass reads faster than handlers work, and one may hold up the rest."""
        await self._room.wait()

    # ---- lanes to handlers ----------------------------------------------------------

    async def take_over(self) -> None:
        """The bus has begun to give this process messages; before that, it runs nothing. After another process that
        ended uncleanly, events are noted before they are run. Raises `DatabaseUnavailable`."""
        await self._guard.take_over()
        self._at_work = True
        self._revival.active.set()

    def stand_by(self) -> None:
        """The bus gives this process nothing any more: held events are left to the one at work."""
        self._revival.active.clear()

    def _push(self, item: Item) -> None:
        self._lanes.push(item.bucket, item)

    def _pump(self) -> None:
        """Give out what the lanes have ready. What ends at once calls this again from within: once is enough."""
        if self._stopping or self._pumping:
            return
        self._pumping = True
        while self._lanes.ready and not self._caution.wait() and self.breaker.admits():
            taken = self._lanes.take()
            assert taken is not None
            item = taken[1]
            self._busy += 1
            if item.replayed and self._is_passed_over(item):
                self._finish(item)
            elif item.event.position in self._troubles.condemned:
                self._fail(item, self._troubles.condemned[item.event.position])
            elif self._caution.on:
                self._caution.taken(item)
                self._to_note.put_nowait(item)
            else:
                self._give_out(item)
        self._pumping = False
        if self._lanes.ready and self._beside not in self._timers and (pause := self._caution.wait()):
            self._beside = self._later(pause, self._pump)

    def _is_passed_over(self, item: Item) -> bool:
        """A replay does not run it: its handler is not to be run again, or a held row will run it."""
        return item.held is None and (not item.handler.replay or item.event.position in self._replay.waiting)

    def _give_out(self, item: Item) -> None:
        """To the handlers of its kind."""
        if item.handler.transactional:
            self._transactional.append(item)
            self._wake.set()
        elif item.bucket in self._uncommitted:
            self._deferred.append(item)
        elif not self._waits(item):
            self._free.put_nowait(item)

    async def _note(self) -> None:
        """What is run after an unclean end is written down before."""
        while True:
            item = await self._to_note.get()
            await self._guard.note(item)
            self._give_out(item)

    def _ended(self, position: int) -> None:
        """Whatever came of the attempt: it did not end the process."""
        if self._caution.ended(position):
            self._batch.noted.append(position)
            self._wake.set()

    async def run(self) -> None:
        """Until cancelled, or until the database, the store or another process ends it with an error."""
        self.stager.add(await self._inbox.staged_events(), since=None)
        async with self._database.reading() as connection:
            self._keys.read(await self._held.blocked(connection), ())
        self._pumping = False
        self._pump()
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._service.concurrency):
                    tasks.create_task(self._work())
                tasks.create_task(self._commit())
                tasks.create_task(self._note())
                tasks.create_task(self._revival.run())
                tasks.create_task(self.stager.run())
        finally:
            self._stopping = True
            self._threads.shutdown(wait=False)
            self._first_step.close()
            for timer in self._timers:
                timer.cancel()
            self._guard.close()
            if self._at_work and self._draining:
                await self._part()

    async def drain(self, seconds: float) -> None:
        """Begin nothing new, let what runs finish and be committed, store the floor; at most so long. Then cancel
        `run`, which ends what is left, and says that this was a clean end."""
        self._stopping = self._draining = True
        self.stand_by()
        self._busy -= len(self._transactional) + len(self._deferred)
        self._deferred.clear()
        self._transactional.clear()
        for queue in (self._free, self._to_note):
            while not queue.empty():
                queue.get_nowait()
                self._busy -= 1
        self._wake.set()
        try:
            async with asyncio.timeout(seconds):
                while self._busy or len(self.stager) or self._batch.appended or not self._progress.floor_is_stored:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            log.warning(
                "service.drain_incomplete",
                service=self._service.name,
                handlers=sorted({work.handler.name for work in self.working.values()}),
                unfinished=[work.facts(self._clock()) for work in self.working.values()],
                staged=len(self.stager),
                advice="nothing is lost: what is not settled comes again at the next start",
            )

    async def _part(self) -> None:
        """Say that this process ended cleanly, if the database can be told now."""
        try:
            async with asyncio.timeout(PARTING_SECONDS):
                await self._guard.leave()
        except (TimeoutError, DatabaseUnavailable) as error:
            log.info("service.left_unsaid", service=self._service.name, reason=str(error) or "the database is busy")

    async def _work(self) -> None:
        while True:
            for _ in range(TURN):
                item = await self._free.get()
                context = self._context(item)
                self._judge(item, context, await self._attempt(item, context, _no_session))
            await asyncio.sleep(0)

    def _context(self, item: Item) -> Context:
        tried = self._troubles.attempts.get(item.event.position, 0) + (item.held.attempts if item.held else 0)
        metadata = read_metadata(item.event)
        return Context(
            self._service.name, item.handler.name, self._log_id, item.event, metadata, tried + 1, item.replayed
        )

    async def _attempt(self, item: Item, context: Context, provide: Callable[[Inject], Any]) -> Failure | None:
        view = self._service.view(item.event.type)
        assert view is not None
        self.working[item.event.position] = AtWork(item.handler, item.event, self._clock())
        self._guard.begin(item)
        try:
            return await attempt(item.handler, view, context, self._resources, provide, self._threads, self._first_step)
        finally:
            del self.working[item.event.position]
            self._guard.end(item)
            self._ended(item.event.position)

    # ---- what came of it ---------------------------------------------------------------

    def _judge(self, item: Item, context: Context, failure: Failure | None) -> None:
        if failure is None:
            self._troubles.attempts.pop(item.event.position, None)
            item.succeed(context)
            if self.breaker.succeeded():
                log.info("service.resumed", service=self._service.name)
            self._finish(item)
        elif self._pauses(item, failure):
            self._give_back(item, self.breaker.wait, self._lanes.later)
        else:
            self._fail(item, failure)

    def _pauses(self, item: Item, failure: Failure) -> bool:
        """Whether the breaker is open: then a failure is not the event's, and no attempt is counted."""
        if self.breaker.failed(item.key, failure.reason):
            log.error(
                "service.paused",
                service=self._service.name,
                handler=item.handler.name,
                reason=failure.reason,
                advice="everything fails, so only one event is tried from time to time. Mend what the handlers need; "
                "it goes on by itself. Nothing is lost",
            )
        return self.breaker.opened_at is not None

    def _fail(self, item: Item, failure: Failure) -> None:
        """Again in the lane, or held, or dead."""
        position = item.event.position
        tried = self._troubles.attempts[position] = self._troubles.attempts.get(position, 0) + 1
        pause = item.fail(failure, tried, self._service.name)
        if pause is not None:
            self._give_back(item, pause, self._lanes.again)
            return
        del self._troubles.attempts[position]
        self._finish(item)
        if item.postponed is not None:
            self._later(min(item.postponed.due - time.time(), HELD_SECONDS), self._revival.look.set)

    def _waits(self, item: Item) -> bool:
        """Whether the item is not run now, because of another one of its partition key; then it is done with."""
        if not self._keys.must_wait(item):
            return False
        if item.held is None:
            item.wait()
            self._finish(item)
        else:
            self._revival.landed(item.held)
            self._ended(item.event.position)
            self.breaker.passed_by()
            self._lanes.finish(item.bucket)
            self._busy -= 1
            self._wake.set()
            self._pump()
        return True

    def _finish(self, item: Item) -> None:
        """Its lane goes on; the item waits for the commit."""
        self._ended(item.event.position)
        self._batch.finished.append(item)
        self._keys.ended(item)
        self.breaker.passed_by()
        if item.handler.transactional:
            self._uncommitted.add(item.bucket)
        self._lanes.finish(item.bucket)
        self._wake.set()
        self._pump()

    def _give_back(self, item: Item, seconds: float, to: Callable[[int], None]) -> None:
        """The item was not done: after so many seconds it is given `to` its lane again."""

        def again() -> None:
            to(item.bucket)
            self._pump()

        self._busy -= 1
        self._wake.set()
        self._later(seconds, again)

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
            if 0 < len(self._batch) + len(self._transactional) < GROUP and not self._stopping:
                await asyncio.sleep(LINGER_SECONDS)
            self._settle_prefix()
            while self._transactional or self._batch or self._progress.floor_is_due(self._stopping):
                await self._group()
                self._settle_prefix()
            self._idle.set()

    async def _group(self) -> None:
        """One transaction. Whatever goes wrong in it ends the dispatcher: its outcome may be unknown."""
        ran: list[Item] = []
        complete, began = False, self._clock()
        try:
            async with self._database.turn, self._database.transaction() as connection:
                if self._revival.stale:
                    self._keys.read(await self._held.blocked(connection), self._batch.finished)
                    self._revival.stale = False
                await self._run_transactional(connection, ran)
                batch, self._batch = self._batch, Batch()
                await self._progress.write(connection, batch, floor_now=self._stopping)
                complete = True
        except DBAPIError as error:
            if complete and ran:
                raise self._troubles.suspect(ran, error) from error
            raise
        self._progress.written(batch)
        for item in batch.finished:
            if item.ticket is not None:
                self._settled.end(item.ticket)
            if item.held is not None:
                self._revival.landed(item.held)
            if item.emissions:
                # Before a replay, the same may have been emitted and appended.
                before = self._replay.covers(item.bucket, item.event.position)
                self.stager.add(item.emissions, since=None if before else began)
            self._troubles.forget(item.event.position)
        for position in batch.noted:
            self._caution.cleared(position)
        for _, ticket in batch.foreign:
            self._settled.end(ticket)
        self._busy -= len(batch.finished)
        self._uncommitted.clear()
        deferred, self._deferred = self._deferred, []
        for item in deferred:
            if not self._waits(item):
                self._free.put_nowait(item)
        if batch.noted:
            self._pump()

    async def _run_transactional(self, connection: AsyncConnection, ran: list[Item]) -> None:
        """Handlers with a session, as many as share this transaction; `ran` gets those whose effects are in it."""
        began = self._clock()
        for nth in range(GROUP):
            if not self._transactional or self._clock() - began > GROUP_SECONDS:
                return
            first = self._transactional[0]
            alone = first.handler.name in self._slow or first.event.position in self._troubles.suspected
            if alone and nth:
                return
            item = self._transactional.popleft()
            if not self._waits(item) and await self._within(connection, item):
                ran.append(item)
            if alone:
                return

    async def _within(self, connection: AsyncConnection, item: Item) -> bool:
        """A handler with a session: its effects in a savepoint of the group's transaction. True when they are kept."""
        context = self._context(item)
        began = self._clock()
        try:
            failure = await in_savepoint(
                connection, item.handler, lambda provide: self._attempt(item, context, provide)
            )
        except GroupBroken as broken:
            cause = broken.__cause__
            assert isinstance(cause, Exception)
            failure = broken.failure or Failure(
                f"TransactionMisuse: it ended the transaction it was part of: {cause}",
                "".join(traceback.format_exception(cause)),
                permanent=True,
            )
            raise self._troubles.condemn(item, failure, "ended the transaction that its group shares") from cause
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
        self._judge(item, context, failure)
        return failure is None

    def _settle_prefix(self) -> None:
        consumer: Consumer | None = None
        tag = 0
        for step in self._settled.pop():
            if step is None:
                continue
            self._progress.floor = max(self._progress.floor, step.floor)
            if step.consumer is not None:
                if consumer is not None and step.consumer is not consumer:
                    consumer.settle_through(tag)
                consumer, tag = step.consumer, step.tag
        if consumer is not None:
            consumer.settle_through(tag)
        if len(self._settled) < self._service.prefetch:
            self._room.set()
        if not self._progress.floor_is_stored and self._floor_timer not in self._timers:
            self._floor_timer = self._later(FLOOR_SECONDS, self._wake.set)

    def _was_appended(self, id: UUID) -> None:
        self._batch.appended.append(id)
        self._wake.set()

    def _was_buried(self, id: UUID, letter: Letter) -> None:
        self._batch.never.append(letter)
        self._was_appended(id)


def _no_session(wanted: Inject) -> Any:
    raise AssertionError(f"a handler without a session asked for {wanted}")
