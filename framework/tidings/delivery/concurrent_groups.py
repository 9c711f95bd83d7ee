"""Handlers with a session in several transactions at once, where a database has more than one writer.

Handlers begin side by side, without a connection. With its first statement, one takes its seat in a group: a
transaction with a connection and buckets of its own. Handlers of a group have it one after the other, each until it
ends. Nobody else works on one of its buckets before it is committed, so order per bucket is what it was.

A group runs without savepoints. When something fails in it, it is undone, and its events go back to their lanes; then
each of them has a savepoint, as have those that failed before. What is not plain (held events, suspects, what is noted
first) goes into the one transaction of `commits`.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable
from typing import Any, Final, NamedTuple, NoReturn

import structlog
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings._support.workers import Workers
from tidings.database.outages import is_contention, is_outage, is_unusable
from tidings.delivery import groups
from tidings.delivery.attempt import Attempt
from tidings.delivery.batch import Batch
from tidings.delivery.contention import Contention
from tidings.delivery.failure import Failure
from tidings.delivery.failure_memory import FailureMemory
from tidings.delivery.fitness import Fitness
from tidings.delivery.inflight import InFlight, State
from tidings.delivery.lanes import EventLanes
from tidings.delivery.ledger import Ledger
from tidings.delivery.runner import Runner
from tidings.delivery.savepoint import ConnectionLost, FlushFailed, GroupBroken, in_group, in_savepoint, roll_back
from tidings.delivery.seating import Group, Seating
from tidings.delivery.seats import Seat
from tidings.delivery.site import Joined
from tidings.delivery.slow_handlers import SlowHandlers
from tidings.delivery.verdicts import Verdicts
from tidings.errors import DatabaseUnavailable, Fenced, TransactionMisuse

__all__ = ["ConcurrentGroups"]

log = structlog.get_logger("tidings.delivery")

GROUP_SECONDS: Final = 0.25
"""Seconds after which a group takes no further seat. Groups share the event loop, so each of them gets only a part of
this time. In a shorter one, groups of handlers that await are smaller, and more of the work is commits; in a longer
one, rows that a handler has locked stay locked for longer."""


class _Undone(Exception):
    """Something failed in the group; `contended` when another transaction was in its way. `culprit` is the handler's
    failure, where it is known to be its own."""

    def __init__(self, contended: bool = False, culprit: _Culprit | None = None) -> None:
        self.contended = contended
        self.culprit = culprit


class _Culprit(NamedTuple):
    seat: Seat
    failure: Failure


class ConcurrentGroups:
    """The groups of one bucket range that are under way."""

    def __init__(
        self, joined: Joined, fitness: Fitness, lanes: EventLanes, runner: Runner, verdicts: Verdicts, ledger: Ledger
    ) -> None:
        self._site = joined.site
        self._fitness = fitness
        self._lanes = lanes
        self._runner = runner
        self._verdicts = verdicts
        self._ledger = ledger
        self._workers: Workers[Seat] = Workers(joined.site.service.concurrency, self._begin)
        self._contention = Contention(joined.site.clock)
        self._slow = SlowHandlers(joined.site.service.name)
        self._undone: dict[int, list[InFlight]] = {}
        """By bucket: what goes back to its lane as soon as the attempt at the event behind it has ended."""
        self._seating = Seating(fitness.pending)
        fitness.pending.then = self._seating.committed

    def take(self, item: InFlight) -> bool:
        """Take an event out of its lane, or let it wait there for a commit. False when it goes the other way."""
        bucket, pending = item.bucket, self._fitness.pending
        group = self._seating.owner(bucket)
        fits = self._fitness.of(item)
        if group is None and not fits:
            return False
        if group is not None and not (fits and group.open):
            group.parked.add(bucket)
            self._lanes.park(item)
        elif group is None and pending.claims(bucket):
            pending.parked.add(bucket)
            self._lanes.park(item)
        else:
            self._workers.give(self._seating.sit(item))
        return True

    def ask_late(self, seat: Seat) -> bool:
        """Give a handler that declared no session a group. False when it goes the other way."""
        if not self._fitness.is_plain(seat.item):
            return False
        self._seating.ask_late(seat)
        return True

    def take_back(self) -> int:
        """Forget what nobody has begun, and say how many that were."""
        self._workers.take_back()
        return self._seating.unbegun()

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong in a transaction, but for handlers, is raised."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._workers.run())
            for _ in range(self._site.database.width):
                tasks.create_task(self._work())

    # ---- attempts

    def _begin(self, seat: Seat) -> Awaitable[None] | None:
        """Begin the attempt, and return what is left to be awaited of it."""
        item = seat.item
        if seat.recalled:
            return None
        if not self._fitness.of(item):  # what was given out before it has changed the answer
            self._seating.leave(seat)
            self._lanes.undo((), [item], ())
            return None
        context = self._runner.context(item)
        given = seat.begin(context, self._site.database.engine)
        begun = self._runner.begin(item, context, given.provide)
        if isinstance(begun, Attempt):
            seat.attempt = begun
            return self._wait(seat, begun)
        self._end(seat, begun)
        return None

    async def _wait(self, seat: Seat, begun: Attempt) -> None:
        try:
            outcome = await self._runner.outcome(seat.item, begun)
        except Exception as error:  # an object of the service's own is away
            if not seat.asked or seat.recalled:
                raise
            seat.end(error)
        except BaseException as error:
            seat.end(error)
            raise
        else:
            self._end(seat, outcome)

    def _end(self, seat: Seat, outcome: Failure | None) -> None:
        if seat.recalled:
            self._put_back(seat, self._undone.pop(seat.item.bucket, []))
        else:
            seat.end(outcome)
            seat.ask()  # also without a statement, its end is part of a transaction

    def _put_back(self, seat: Seat, finished: list[InFlight]) -> None:
        self._seating.leave(seat)
        self._lanes.undo(finished, [seat.item], ())

    # ---- transactions

    async def _work(self) -> None:
        while True:
            group, seat = await self._seating.first()
            async with self._site.database.room, self._contention.room():
                await self._transact(group, seat)
            self._fitness.pending.wake.set()  # who waits until nothing is under way, looks after each commit

    async def _transact(self, group: Group, seat: Seat) -> None:
        database, began, complete = self._site.database, self._ledger.begins(), False
        try:
            async with database.turn, database.transaction() as connection:
                try:
                    await self._run(connection, group, seat)
                    group.open = False
                    if group.batch:
                        await self._write(connection, group.batch)
                except _Undone:
                    await roll_back(connection)
                    raise
                complete = True
        except _Undone as undone:
            self._undo(group, undone)
            return
        except (DBAPIError, DatabaseUnavailable) as error:
            if complete and is_contention(error, database.engine.dialect):  # the commit itself: it was rolled back
                contended = _Undone(contended=True)
                contended.__cause__ = error
                self._undo(group, contended)
                return
            if complete and isinstance(error, DBAPIError) and group.batch:
                raise self._site.memory.suspect(group.batch.finished, error) from error
            raise
        self._seating.release(group)
        self._verdicts.committed(group.batch)
        self._ledger.committed(group.batch, began)
        self._seating.go_on(group.waiting)
        self._lanes.unpark(group.parked)

    async def _write(self, connection: AsyncConnection, batch: Batch) -> None:
        try:
            await self._ledger.write(connection, batch, floor_now=None)
        except DBAPIError as error:
            undone = self._site.memory.undone
            if all(item.turn in undone for item in batch.finished) and not is_contention(error, connection.dialect):
                raise  # no handler has left this behind: each had a savepoint
            _raise_undone(error, connection)

    async def _run(self, connection: AsyncConnection, group: Group, seat: Seat) -> None:
        """As many as share the transaction, one after the other."""
        began = self._site.clock()
        # Drivers begin a transaction with its first statement; from here on, one that is over was ended by a handler.
        await connection.exec_driver_sql("SELECT 1")
        following: Seat | None = seat
        for nth in range(groups.GROUP):
            if following is None:
                return
            alone = following.item.handler.name in self._slow
            if nth and (alone or self._site.clock() - began > GROUP_SECONDS):
                group.waiting.appendleft(following)
                return
            final = await self._within(connection, group, following)
            if alone or final:
                return
            following = await self._seating.following(group) if nth + 1 < groups.GROUP else None

    async def _within(self, connection: AsyncConnection, group: Group, seat: Seat) -> bool:
        """One handler's part. True when the group must not take another one."""
        item, memory, began = seat.item, self._site.memory, self._site.clock()
        given, untouched = seat.opened, seat.has_failed
        careful = item.turn in memory.undone or item.turn in memory.attempts
        in_transaction = in_savepoint if careful else in_group
        try:
            failure = await in_transaction(connection, given, item.handler, lambda: seat.hold(connection))
        except ConnectionLost as lost:
            raise memory.lose(item, self._site.database.shown, lost.failure, lost.__cause__) from lost
        except FlushFailed as failed:
            raise _Undone from failed
        except (GroupBroken, TransactionMisuse) as broken:
            raise _broken(memory, seat, broken) from broken
        except (DBAPIError, InvalidRequestError) as error:
            _raise_undone(error, connection)
        except Exception as error:  # an object of the service's own is away; of the database, perhaps only contended
            if is_contention(error, connection.dialect):
                raise _Undone(contended=True) from error
            raise
        if failure is not None and not careful and not untouched:
            # What a handler before it has caught would fail here, too.
            own = "InFailedSQLTransaction" not in failure.reason
            raise _Undone(culprit=_Culprit(seat, failure) if own else None)
        self._slow.took(item.handler.name, self._site.clock() - began)
        self._seating.leave(seat)
        self._verdicts.judge(item, given.context, failure, group.batch)
        return item.state in (State.HELD, State.DEAD)

    # ---- what is undone

    def _undo(self, group: Group, undone: _Undone) -> None:
        """Everything of it goes back to its lane. Only the one that failed has had an attempt; where others of its
        bucket go before it, it has that once more."""
        finished, culprit, contended = group.batch.finished, undone.culprit, undone.contended
        if any(item.state is not State.DONE for item in finished):  # held or dead: that is known elsewhere already
            raise Fenced(
                f"service {self._site.service.name!r}: a transaction was undone in which an event was given up; "
                "joining again"
            ) from undone
        _tell(self._site.service.name, len(finished) + (culprit is not None), undone)
        self._seating.release(group)
        if contended:
            self._contention.notice()
        back: dict[int, list[InFlight]] = {}
        for item in finished:
            item.leaves = ()
            back.setdefault(item.bucket, []).append(item)
        # Who has a place and was not in it yet, behind nothing that is undone, asks for the next one.
        staying = [seat for seat in group.waiting if seat.item.bucket not in back]
        seats = [seat for seat in self._seating.seats_of(group) if seat not in staying]
        if not contended:
            again = [*finished, *(seat.item for seat in seats if seat.is_over)]
            self._site.memory.undone.update(item.turn for item in again)
        if culprit is not None and culprit.seat.item.bucket in back:
            culprit = None
        for seat in seats:
            bucket = seat.item.bucket
            if culprit is not None and seat is culprit.seat:
                continue
            before = back.pop(bucket, [])
            seat.recall()
            if seat.attempt is None or seat.is_over:
                self._put_back(seat, before)
            else:
                self._undone[bucket] = before
        self._seating.go_on(staying)
        self._lanes.undo([item for items in back.values() for item in items], (), group.parked)
        if culprit is not None:
            self._seating.leave(culprit.seat)
            self._verdicts.judge(culprit.seat.item, culprit.seat.context, culprit.failure)


def _tell(service: str, events: int, undone: _Undone) -> None:
    told: dict[str, Any] = {"service": service, "events": events, "contended": undone.contended}
    if undone.contended:  # seldom, and worth knowing: somebody takes locks in another order
        why = getattr(undone.__cause__, "orig", None) or undone.__cause__
        log.warning("group.undone", **told, reason=f"another transaction was in its way, so it is done again: {why}")
    else:
        reason = "a handler failed in it: each of its events is run again, with a savepoint of its own"
        log.info("group.undone", **told, reason=reason)


def _raise_undone(error: Exception, connection: AsyncConnection) -> NoReturn:
    """Raise for an error that no handler raised, but that one may have caused: after an error that a handler has
    caught, PostgreSQL does nothing more in the transaction."""
    contended = is_contention(error, connection.dialect)
    if not contended and (connection.invalidated or is_outage(error, connection.dialect)):
        raise error
    raise _Undone(contended) from error


def _broken(memory: FailureMemory, seat: Seat, broken: GroupBroken | TransactionMisuse) -> _Undone:
    """What to raise for a handler that made its group's transaction unusable. It is not run again."""
    cause = broken if isinstance(broken, TransactionMisuse) else broken.__cause__
    assert isinstance(cause, Exception)
    if not isinstance(cause, DBAPIError) or not is_unusable(cause):  # else a handler before it has caught an error
        failure = broken.failure if isinstance(broken, GroupBroken) else None
        detail = "".join(traceback.format_exception(cause))
        failure = failure or Failure(f"{groups.ENDED_TRANSACTION}: {cause}", detail, permanent=True)
        memory.condemn(seat.item, failure, "ended the transaction that its group shares")
    return _Undone()
