"""From lanes to handlers, and from what came of them to the next commit.

Handlers without a session run side by side, one per bucket at a time, and join the next commit. Handlers with one run
within it. What fails is given back to its lane, held, or dead. It writes nothing itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings._support.timers import Timers, counting_sleep
from tidings._support.workers import Workers
from tidings.database.dead_letters import Letter
from tidings.database.engine import Database
from tidings.database.enrolment import enrol
from tidings.database.held_rows import HeldRows
from tidings.database.inbox import Inbox, Remembered
from tidings.database.lineage import Lineage
from tidings.database.staged_events import StagedEvent
from tidings.delivery.attempt import Attempt, Attempts, Failure, Resources
from tidings.delivery.breaker import Breakers
from tidings.delivery.commits import Commits
from tidings.delivery.guard import Guard
from tidings.delivery.keys import Keys
from tidings.delivery.owned import Ours
from tidings.delivery.progress import Batch, Progress
from tidings.delivery.revival import HELD_SECONDS, Revival
from tidings.delivery.sessions import SessionHandlers
from tidings.delivery.staged import Stager
from tidings.delivery.work import Item, Step, Troubles
from tidings.errors import DatabaseUnavailable, Fenced
from tidings.modelling.codec import read_metadata
from tidings.modelling.context import Context
from tidings.modelling.declaration import Declaration
from tidings.modelling.handlers import Handler, Inject
from tidings.modelling.roster import Roster, Span
from tidings.protocol.position import Lanes
from tidings.stores import EventStore, RecordedEvent

__all__ = ["Dispatcher"]

log = structlog.get_logger("tidings.dispatch")

PARTING_SECONDS: Final = 0.2
"""So long a service that stops tries to say that it ended cleanly; who cannot is only taken for one that crashed."""


_NOTHING: Final = RecordedEvent(-1, "", -1, "", b"", b"", False, bytes(16), 0)
"""Stands for an event where a span ends."""


class Dispatcher:
    """Volatile: made anew at each join from what the inbox remembers; any error out of `run` ends it."""

    def __init__(
        self,
        service: Declaration,
        store: EventStore,
        database: Database,
        inbox: Inbox,
        held: HeldRows,
        log_id: UUID,
        remembered: Remembered,
        resources: Resources,
        troubles: Troubles,
        *,
        ours: Ours | None = None,
        lineage: Lineage | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._database = database
        self._inbox = inbox
        self._held = held
        self._log_id = log_id
        self._lineage = lineage or Lineage(log_id)
        self._troubles = troubles
        self._clock = clock
        self._lanes: Lanes[Item] = Lanes()
        self._workers: Workers[Item] = Workers(service.concurrency, self._handle)
        self._sessions = SessionHandlers(
            service.name,
            database.shown,
            troubles,
            clock,
            waits=self._waits,
            context=self._context,
            attempt=self._attempt,
            judge=self._judge,
        )
        self._timers = Timers()
        self._commits = Commits(
            database,
            Progress(inbox, held, remembered, clock),
            self._sessions,
            troubles,
            self._timers,
            service.prefetch,
            counting_sleep(clock),
            work=self._in_transaction,
            committed=self._committed,
        )
        self._replay = remembered.replay
        troubles.skip(remembered.skips)
        self.roster = Roster(service.handlers_of, remembered.partial)
        self._uncommitted: set[int] = set()
        """Buckets with effects in the group under way: who has no session would not see them, so it waits."""
        self._deferred: list[Item] = []
        self._keys = Keys()
        self._knows_keys = asyncio.Event()
        self.breakers = Breakers(clock)
        self._revival = Revival(
            service, database, held, self._keys, self.breakers, self._push, self._pump, inbox.watermarks.fence
        )
        self._guard = Guard(service, database, inbox, troubles, clock, self._give_out)
        self._caution = self._guard.caution
        self._beside: asyncio.TimerHandle | None = None
        self._stopping = False
        self._pumping = True
        """Nothing is given out before `run` knows which keys are blocked; from then on, while `_pump` is at it."""
        self._at_work = self._draining = False
        self._at_work_again = asyncio.Event()
        self._resumed = asyncio.Event()
        self._busy = 0
        """Events given out whose outcome is not committed."""
        self._attempts = Attempts(service, resources, ours or Ours(store, None, database))
        self.resting = 0
        """Events that rest between two quick attempts."""
        self.attempts = 0
        """Attempts that have ended."""
        self.working: dict[int, Item] = {}
        """Handlers at work, by position."""
        self.stager = Stager(store, self._commits.appended, self._commits.given_up, clock=counting_sleep(clock))

    # ---- what comes in -------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing was taken that is not settled, and nothing waits to be written."""
        commits = self._commits
        waits = self._busy or self._lanes or commits.unsettled or commits.batch or self.stager
        return not waits and commits.progress.floor_is_stored

    async def resume(self, remembered: Remembered) -> None:
        """Go on from what another process has left, instead of from what was known before; only while `idle`, and not
        before `run` has read which keys are blocked."""
        await self._knows_keys.wait()
        await self._read_keys()
        self._commits.progress = Progress(self._inbox, self._held, remembered, self._clock)
        self._replay = remembered.replay
        self._troubles.skip(remembered.skips)
        self.roster.renew(remembered.partial)
        self.stager.add(await self._inbox.read_staged(), since=None)

    @property
    def floor(self) -> int:
        """Everything up to here is settled (durably at most a second later)."""
        return self._commits.progress.floor

    @property
    def moves(self) -> int:
        """A number that changes whenever anything moves."""
        return self._commits.commits + self.attempts

    @property
    def oldest(self) -> Item | None:
        """The event that the floor waits for; None where something else does, or nothing."""
        return self._commits.oldest

    @property
    def unsettled(self) -> int:
        """Events, messages and markers that were taken and are not settled yet."""
        return self._commits.unsettled

    def submit(
        self,
        event: RecordedEvent,
        bucket: int,
        step: Step | None = None,
        *,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """An accepted event, and its metadata document where that was read. One that this service does not handle is
        settled without a trace."""
        position = event.position
        handlers = self.roster.handlers(event.type, bucket, position)
        if not handlers:
            if step is not None:
                self.settle(step)
            return
        replayed = self._replay.covers(bucket, position)
        for handler in handlers[:-1]:
            again = replayed or self.roster.again(handler.name, position)
            self._lanes.push(bucket, Item(event, bucket, handler, None, replayed=again, metadata=metadata, more=True))
        handler = handlers[-1]
        replayed = replayed or self.roster.again(handler.name, position)
        item = Item(event, bucket, handler, step, replayed=replayed, metadata=metadata)
        self._commits.take(item)
        self._lanes.push(bucket, item)
        if self._lanes.ready:
            self._pump()

    def submit_late(self, event: RecordedEvent, handler: Handler, span: Span, metadata: dict[str, Any] | None) -> None:
        """An event of the past, for a handler that is given it on its own."""
        item = Item(event, span.bucket, handler, None, metadata=metadata, late=span)
        self._commits.take(item)
        self._lanes.push(span.bucket, item)
        if self._lanes.ready:
            self._pump()

    def end_span(self, span: Span) -> None:
        """Nothing is left of it once everything before it in its lane is done."""
        handler = self._service.named[span.handler]
        self._lanes.push(span.bucket, Item(_NOTHING, span.bucket, handler, None, replayed=True, late=span, ends=True))
        if self._lanes.ready:
            self._pump()

    async def taken_over(self, generation: int) -> None:
        """Wait until the bus gives this process messages, and what it knows of handlers is of another generation."""
        while not (self._revival.active.is_set() and self.roster.known and self.roster.generation != generation):
            self._at_work_again.clear()
            await self._at_work_again.wait()

    async def resumed(self, seconds: float) -> None:
        """Wait until a handler that was paused succeeds, or until what is known of handlers is read anew; at most so
        many seconds."""
        self._resumed.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._resumed.wait()

    def settle(self, step: Step) -> None:
        """Nothing to handle, but to be settled in its turn: a marker, a duplicate, the progress of a pass."""
        self._commits.settle(step)

    def bury(self, letter: Letter, step: Step) -> None:
        """A message that is not ours: recorded, then settled."""
        log.error("message.dead", service=self._service.name, reason=letter.reason)
        self._commits.bury(letter, step)

    @property
    def full(self) -> bool:
        """More waits than should: a pass reads faster than handlers work, and one may hold up the rest."""
        return self._commits.full

    async def room(self) -> None:
        """Wait until less is unsettled."""
        await self._commits.room()

    # ---- lanes to handlers ----------------------------------------------------------

    async def take_over(self) -> None:
        """The bus has begun to give this process messages; before that, it runs nothing. After another process that
        ended uncleanly, events are noted before they are run. Raises `DatabaseUnavailable`."""
        # Where there is work of an earlier connection at hand, it is of the handlers that were known then.
        fresh = self.idle or not self.roster.known
        for position in await self._guard.take_over():
            self._commits.noted(position, self._caution.times(position))
        await self._enrol(fresh)
        self.stager.begin()
        await self._revival.renew()
        self._at_work = True
        self._revival.active.set()
        self._at_work_again.set()
        self._resumed.set()

    async def _enrol(self, fresh: bool) -> None:
        async with self._database.turn, self._database.transaction() as connection:
            await self._inbox.watermarks.fence(connection)
            enrolled = await enrol(connection, self._service, self._log_id, self._inbox.buckets)
        if enrolled.changed:
            self._inbox.watermarks.fenced_others()
            if self.roster.partial or self._replay.waiting:  # it was read with the handlers' names of before
                raise Fenced(f"service {self._service.name!r}: its handlers are others than before; joining again")
        if fresh:
            if enrolled.changed:  # what is held may wait in another line now
                await self._knows_keys.wait()
                await self._read_keys()
            self.roster.read(enrolled.after, enrolled.spans)
            self._commits.progress.spans = {span[:3]: span.done for span in enrolled.spans if span.open}
        elif enrolled.changed:
            raise Fenced(f"service {self._service.name!r}: another version of it was at work meanwhile")

    def collect(self, rows: Sequence[StagedEvent], *, all: bool) -> None:
        """Append what requests emitted, while this process is the one at work: as `Stager.collect`."""
        if self._revival.active.is_set() and not self._stopping:
            self.stager.collect([row for row in rows if row.bucket in self._inbox.buckets], all=all)

    def watch(self, row: StagedEvent, *, alone: bool) -> asyncio.Future[bool] | None:
        """As `Stager.watch`; None where another process may append the event. `alone`: only this process can be at
        work, so it will be, even when it has only just joined."""
        if self._stopping or row.bucket not in self._inbox.buckets or not (alone or self._revival.active.is_set()):
            return None
        return self.stager.watch(row.event.id)

    async def until_at_work(self) -> None:
        """Wait until the bus gives this process events."""
        await self._revival.active.wait()

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
        lanes, caution, troubles = self._lanes, self._caution, self._troubles
        while lanes.ready and not (caution.alert and caution.holds()):
            taken = lanes.take()
            assert taken is not None
            item = taken[1]
            self._busy += 1
            if item.replayed and self._is_passed_over(item):
                self._finish(item)
            elif troubles.condemned and item.turn in troubles.condemned:
                self._fail(item, troubles.condemned[item.turn])
            elif troubles.crashed and (crash := troubles.crash(item)) is not None:
                failure, times = crash
                troubles.attempts[item.turn] = times - 1
                self._fail(item, failure)
            elif caution.alert and caution.wants(*item.turn):
                self._guard.give(item)
            else:
                self._give_out(item)
        self._pumping = False
        if self._lanes.ready and self._beside not in self._timers and (pause := self._caution.holds()):
            self._beside = self._timers.later(pause, self._pump)

    def _is_passed_over(self, item: Item) -> bool:
        """A replay does not run it: its handler is not to be run again, or a held row will run it."""
        return item.held is None and (not item.handler.replay or item.ends or item.turn in self._replay.waiting)

    def _give_out(self, item: Item) -> None:
        """To the handlers of its kind."""
        if item.handler.transactional:
            self._sessions.give(item)
            self._commits.wake()
        elif item.bucket in self._uncommitted:
            self._deferred.append(item)
        else:
            self._workers.give(item)

    def _survived(self, item: Item, *, ran: bool = True) -> None:
        """Whatever came of the attempt, if there was one: it did not end the process."""
        position, name = item.turn
        handlers = () if item.plain else self._service.handlers_of(item.event.type)
        if self._caution.ended(position, name, [other.name for other in handlers], ran=ran):
            self._commits.noted(position, self._caution.times(position))

    async def run(self) -> None:
        """Until cancelled, or until the database, the store or another process ends it with an error."""
        self._attempts.open()
        try:
            self.stager.add(await self._inbox.read_staged(), since=None)
            await self._read_keys()
            self._knows_keys.set()
            self._pumping = False
            self._pump()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._workers.run())
                tasks.create_task(self._commits.run())
                tasks.create_task(self._guard.run(lambda: self._busy - len(self._guard)))
                tasks.create_task(self._revival.run())
                tasks.create_task(self.stager.run())
        finally:
            self._stopping = True
            self._attempts.close()
            self._timers.close()
            self._guard.notebook.close()
            if self._at_work and self._draining:
                await self._part()

    async def _read_keys(self) -> None:
        """Which keys are blocked, as committed; call it while nothing waits for a commit."""
        async with self._database.reading() as connection:
            self._keys.read(await self._held.blocked(connection), ())

    async def drain(self, seconds: float) -> None:
        """Begin nothing new, let what runs finish and be committed, store the floor; at most so long. Then cancel
        `run`, which ends what is left, and says that this was a clean end."""
        self._stopping = self._draining = True
        self.stand_by()
        self._busy -= len(self._deferred) + self._sessions.take_back() + self._workers.take_back()
        self._busy -= self._guard.take_back()
        self._deferred.clear()
        commits = self._commits
        commits.hurry()
        try:
            async with asyncio.timeout(seconds):
                while self._busy or self.stager or commits.batch or not commits.progress.floor_is_stored:
                    await commits.rest()
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
            log.info(
                "service.clean_end_unrecorded", service=self._service.name, reason=str(error) or "the database is busy"
            )

    def _handle(self, item: Item) -> Awaitable[None] | None:
        """A handler without a session; what is left to be awaited of it."""
        if self._waits(item):
            return None
        context = self._context(item)
        begun = self._begin_attempt(item, context, _no_session)
        if isinstance(begun, Attempt):
            return self._handle_rest(item, context, begun)
        self._judge(item, context, begun)
        return None

    async def _handle_rest(self, item: Item, context: Context, begun: Attempt) -> None:
        self._judge(item, context, await self._outcome(item, begun))

    def _context(self, item: Item) -> Context:
        event = item.event
        metadata, item.metadata = item.metadata, None  # the next attempt must not see what this one makes of it
        tried = self._troubles.attempts.get(item.turn, 0) + (item.held.attempts if item.held else 0)
        if metadata is None:
            metadata = read_metadata(event)
        handler, service = item.handler, self._service.name
        log_id = self._lineage.at(event.position)
        return Context(service, handler.name, log_id, event, metadata, tried + 1, item.replayed, handler.was)

    def _begin_attempt(
        self, item: Item, context: Context, provide: Callable[[Inject], Any]
    ) -> Attempt | Failure | None:
        """An attempt; whoever gets an `Attempt` awaits its `_outcome`."""
        item.since = self._clock()
        self.working[item.event.position] = item
        self._guard.notebook.begin(item.event.position, item.bucket)
        begun: Attempt | Failure | None = None
        try:
            begun = self._attempts.begin(item.handler, context, provide)
        finally:
            if not isinstance(begun, Attempt):
                self._end_attempt(item)
        return begun

    async def _attempt(self, item: Item, context: Context, provide: Callable[[Inject], Any]) -> Failure | None:
        begun = self._begin_attempt(item, context, provide)
        return await self._outcome(item, begun) if isinstance(begun, Attempt) else begun

    async def _outcome(self, item: Item, begun: Attempt) -> Failure | None:
        cut_off = False
        try:
            return await begun.outcome()
        except asyncio.CancelledError:
            cut_off = True
            raise
        finally:
            self._end_attempt(item, cut_off=cut_off)

    def _end_attempt(self, item: Item, *, cut_off: bool = False) -> None:
        self.attempts += 1
        position = item.event.position
        del self.working[position]
        self._guard.notebook.end(position)
        if self._caution.alert and not cut_off:  # an attempt that was cut off has not shown what it does
            self._survived(item)

    # ---- what came of it ---------------------------------------------------------------

    def _judge(self, item: Item, context: Context, failure: Failure | None) -> None:
        if failure is None:
            self._troubles.attempts.pop(item.turn, None)
            if context.emissions:
                item.succeed(context)
            if self.breakers.any and self.breakers.succeeded(item.handler.name):
                log.info("handler.resumed", service=self._service.name, handler=item.handler.name)
                self._revival.look_at_all()
                self._resumed.set()
            self._finish(item)
            return
        self._commits.doubt(item)
        if item.trial or not failure.deploy_needed:
            self._tell_breaker(item, failure)
        self._fail(item, failure)

    def _tell_breaker(self, item: Item, failure: Failure) -> None:
        """An attempt failed: it may open the handler's breaker, or be a trial that shows that it must stay open."""
        name, trial = item.handler.name, item.trial
        opened = self.breakers.failed(name, item.key, failure.reason, trial=trial)
        if not opened and not trial:
            return
        breaker = self.breakers.of(name)
        told: dict[str, Any] = {"service": self._service.name, "handler": name, "reason": failure.reason}
        told["next_trial_in"] = round(breaker.wait, 1)
        if opened:
            advice = (
                "every attempt of this handler fails, so its events are held, and one of them is tried from time to "
                "time; other handlers go on. Mend what the handler needs: it resumes by itself. Nothing is lost"
            )
            log.error("handler.paused", **told, advice=advice)
        else:
            event = item.event
            told |= {"event_id": str(event.id), "stream": event.stream, "position": event.position, "key": item.key}
            log.warning("handler.trial_failed", **told, trial=breaker.trials, next="an event of another key is tried")
        self._timers.later(breaker.wait, self._revival.look.set)

    def _fail(self, item: Item, failure: Failure) -> None:
        """Again in the lane, or held, or dead."""
        turn = item.turn
        tried = self._troubles.attempts[turn] = self._troubles.attempts.get(turn, 0) + 1
        pause = item.fail(failure, tried, self._service.name, self._troubles.tracebacks)
        if pause is not None:
            self._give_back(item, pause, self._lanes.again)
            return
        del self._troubles.attempts[turn]
        self._finish(item)
        if item.postponed is not None:
            self._timers.later(min(item.postponed.due - time.time(), HELD_SECONDS), self._revival.look.set)

    def _waits(self, item: Item) -> bool:
        """Whether the item is not run now, because of another one of its partition key, or because its handler's
        breaker is open; then it is done with."""
        breaker = None if item.trial else self.breakers.open.get(item.handler.name)
        if not (behind := self._keys.must_wait(item)) and breaker is None:
            return False
        if item.held is None:
            tried = self._troubles.attempts.pop(item.turn, 0)
            if behind or breaker is None:
                item.wait(tried=tried)
            else:
                item.wait(f"waits until handler {item.handler.name!r} succeeds again: {breaker.reason}", tried)
            self._finish(item, ran=False)
        else:
            self._keys.left(item.held)
            self._revival.landed(item.held)
            self._survived(item, ran=False)
            self._end_trial(item)
            self._lanes.finish(item.bucket)
            self._busy -= 1
            self._commits.wake()
            self._pump()
        return True

    def _finish(self, item: Item, *, ran: bool = True) -> None:
        """Its lane goes on; the item waits for the commit."""
        if self._caution.alert:
            self._survived(item, ran=ran)
        if self._commits.batch.finish(item):
            self._keys.ended(item)
        self._end_trial(item)
        if item.handler.transactional:
            self._uncommitted.add(item.bucket)
        self._lanes.finish(item.bucket)
        self._commits.wake()
        if self._lanes.ready:
            self._pump()

    def _end_trial(self, item: Item) -> None:
        if item.trial and (breaker := self.breakers.open.get(item.handler.name)) is not None:
            breaker.end_trial()

    def _give_back(self, item: Item, seconds: float, to: Callable[[int], None]) -> None:
        """The item was not done: after so many seconds it is given `to` its lane again."""

        def again() -> None:
            self.resting -= 1
            to(item.bucket)
            self._pump()

        self._busy -= 1
        self._commits.wake()
        self.resting += 1
        self._timers.later(seconds, again)

    # ---- the commit -----------------------------------------------------------------

    async def _in_transaction(self, connection: AsyncConnection, ran: list[Item]) -> None:
        if self._revival.stale:
            self._keys.read(await self._held.blocked(connection), self._commits.batch.notable)
            self._revival.stale = False
        await self._sessions.run(connection, ran)

    def _committed(self, batch: Batch, began: float) -> None:
        for item in batch.notable:
            if item.held is not None:
                self._revival.landed(item.held)
            if item.emissions:
                # A database that was set back while this process runs may have brought the row of a held event back.
                self.stager.add(item.emissions, since=None if item.held is not None else began)
        for position in batch.noted:
            self._caution.cleared(position)
        self._busy -= len(batch.finished)
        self._uncommitted.clear()
        deferred, self._deferred = self._deferred, []
        for item in deferred:
            self._workers.give(item)
        if batch.noted:
            self._pump()


def _no_session(wanted: Inject) -> Any:
    raise AssertionError(f"a handler without a session asked for {wanted}")
