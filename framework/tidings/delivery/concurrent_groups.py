"""Handlers with a session in several transactions at once, where a database has more than one writer.

Each group has a connection of its own and the buckets that it took: nobody else works on one of them before the group
is committed, so order per bucket is what it was. It runs without savepoints. When something fails in it, the group is
undone, and its events go back to their lanes; then each runs in a savepoint, in the one transaction of `commits`, where
everything goes that is not plain: events that failed before, held ones, suspects, what is noted first.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from typing import NamedTuple, NoReturn

import structlog
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.outages import is_contention, is_outage
from tidings.delivery import groups
from tidings.delivery.batch import Batch
from tidings.delivery.failure import Failure
from tidings.delivery.fitness import Fitness
from tidings.delivery.inflight import InFlight
from tidings.delivery.lanes import EventLanes
from tidings.delivery.ledger import Ledger
from tidings.delivery.runner import Runner
from tidings.delivery.savepoint import ConnectionLost, in_group, roll_back
from tidings.delivery.site import Joined
from tidings.delivery.verdicts import Verdicts
from tidings.errors import TransactionMisuse
from tidings.modelling.context import Context

__all__ = ["ConcurrentGroups"]

log = structlog.get_logger("tidings.delivery")


class _Undone(Exception):
    """Something failed in the group; `contended` when another transaction was in its way. `culprit` is the handler's
    failure, where it is known to be its own."""

    def __init__(self, contended: bool = False, culprit: _Culprit | None = None) -> None:
        self.contended = contended
        self.culprit = culprit


class _Culprit(NamedTuple):
    item: InFlight
    context: Context
    failure: Failure


class _Group:
    """One transaction."""

    def __init__(self) -> None:
        self.given: deque[InFlight] = deque()
        """Not begun."""
        self.running: list[InFlight] = []
        """At work, or failed."""
        self.batch = Batch()
        """What it has done."""
        self.buckets: set[int] = set()
        self.parked: set[int] = set()
        """Buckets of which the next event waits in its lane until the group is committed."""
        self.open = True
        """It takes further events."""


class ConcurrentGroups:
    """The groups of one bucket range that are under way."""

    def __init__(
        self, joined: Joined, fitness: Fitness, lanes: EventLanes, runner: Runner, verdicts: Verdicts, ledger: Ledger
    ) -> None:
        self._site = joined.site
        self._fitness = fitness
        self._pending = fitness.pending
        self._lanes = lanes
        self._runner = runner
        self._verdicts = verdicts
        self._ledger = ledger
        self._queue: asyncio.Queue[InFlight] = asyncio.Queue()
        """Events whose buckets no group has."""
        self._owners: dict[int, _Group] = {}
        """By bucket, until its group is committed or undone."""
        self._slow: set[str] = set()
        """Handlers that keep their transaction for long: each has one of its own."""

    def take(self, item: InFlight) -> bool:
        """Take an event out of its lane, or let it wait there for a commit. False when it goes the other way."""
        bucket = item.bucket
        group = self._owners.get(bucket)
        fits = self._fitness.of(item)
        if group is not None:
            if fits and group.open:
                group.given.append(item)
            else:
                group.parked.add(bucket)
                self._lanes.park(item)
        elif not fits:
            return False
        elif self._pending.claims(bucket):
            self._pending.parked.add(bucket)
            self._lanes.park(item)
        else:
            self._queue.put_nowait(item)
        return True

    def take_back(self) -> int:
        """Forget what nobody has begun, and say how many that were."""
        number = self._queue.qsize()
        while not self._queue.empty():
            self._queue.get_nowait()
        for group in {id(group): group for group in self._owners.values()}.values():
            number += len(group.given)
            group.given.clear()
        return number

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong in a transaction, but for handlers, is raised."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._site.database.width):
                tasks.create_task(self._work())

    async def _work(self) -> None:
        while True:
            item = await self._queue.get()
            group = _Group()
            self._own(group, item)
            await self._transact(group)

    async def _transact(self, group: _Group) -> None:
        database, began, complete = self._site.database, self._site.clock(), False
        try:
            async with database.turn, database.transaction() as connection:
                try:
                    await self._run(connection, group)
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
        except DBAPIError as error:
            if complete and group.batch:
                raise self._site.memory.suspect(group.batch.finished, error) from error
            raise
        self._release(group)
        self._ledger.committed(group.batch, began)
        again = {item.bucket for item in group.given}
        for item in group.given:
            self._lanes.park(item)
        self._lanes.unpark(again | group.parked)

    async def _write(self, connection: AsyncConnection, batch: Batch) -> None:
        try:
            await self._ledger.write(connection, batch, floor_now=None)
        except DBAPIError as error:
            self._raise_undone(error, connection)

    async def _run(self, connection: AsyncConnection, group: _Group) -> None:
        """As many as share the transaction, one after the other."""
        began = self._site.clock()
        # Drivers begin a transaction with its first statement; from here on, one that is over was ended by a handler.
        await connection.exec_driver_sql("SELECT 1")
        for nth in range(groups.GROUP):
            if nth and not group.given and not self._queue.empty():
                self._own(group, self._queue.get_nowait())
            if not group.given or (nth and self._site.clock() - began > groups.GROUP_SECONDS):
                return
            item = group.given[0]
            alone = item.handler.name in self._slow
            if (alone and nth) or not self._fitness.of(item):
                return
            group.running.append(group.given.popleft())
            await self._within(connection, group, item)
            if alone:
                return

    async def _within(self, connection: AsyncConnection, group: _Group, item: InFlight) -> None:
        context, began = self._runner.context(item), self._site.clock()
        try:
            failure = await in_group(
                connection, context, item.handler, lambda provide: self._runner.run(item, context, provide)
            )
        except ConnectionLost as lost:
            raise self._site.memory.lose(item, self._site.database.shown, lost.failure, lost.__cause__) from lost
        except TransactionMisuse as misuse:
            detail = "".join(traceback.format_exception(misuse))
            failure = Failure(f"{groups.ENDED_TRANSACTION}: {misuse}", detail, permanent=True)
            raise _Undone(culprit=_Culprit(item, context, failure)) from misuse
        except (DBAPIError, InvalidRequestError) as error:
            self._raise_undone(error, connection)
        except Exception as error:  # an object of the service's own is away; of the database, perhaps only contended
            if is_contention(error, connection.dialect):
                raise _Undone(contended=True) from error
            raise
        if failure is not None:
            # What a handler before it has caught would fail here, too.
            own = "InFailedSQLTransaction" not in failure.reason
            raise _Undone(culprit=_Culprit(item, context, failure) if own else None)
        took = self._site.clock() - began
        if took > groups.SLOW_SECONDS and item.handler.name not in self._slow:
            self._slow.add(item.handler.name)
            log.warning(
                "handler.holds_writer",
                service=self._site.service.name,
                handler=item.handler.name,
                seconds=round(took, 3),
                advice="do slow work outside the session, or in a handler without one",
            )
        group.running.remove(item)
        self._verdicts.keep(item, context, group.batch)

    def _raise_undone(self, error: Exception, connection: AsyncConnection) -> NoReturn:
        """Raise for an error that no handler raised, but that one may have caused: after an error that a handler has
        caught, PostgreSQL does nothing more in the transaction."""
        contended = is_contention(error, connection.dialect)
        if not contended and (connection.invalidated or is_outage(error, connection.dialect)):
            raise error
        raise _Undone(contended) from error

    def _own(self, group: _Group, item: InFlight) -> None:
        group.given.append(item)
        group.buckets.add(item.bucket)
        self._owners[item.bucket] = group

    def _release(self, group: _Group) -> None:
        for bucket in group.buckets:
            del self._owners[bucket]

    def _undo(self, group: _Group, undone: _Undone) -> None:
        """Everything of it goes back to its lane, and runs with a savepoint each. Only the one that failed has had an
        attempt; where others of its bucket go before it, it has that once more."""
        self._release(group)
        finished, begun, culprit = group.batch.finished, [*group.running, *group.given], undone.culprit
        if culprit is not None and any(item.bucket == culprit.item.bucket for item in finished):
            culprit = None
        if culprit is not None:
            begun.remove(culprit.item)
        contended = undone.contended
        self._site.memory.undone.update(item.turn for item in (*finished, *group.running))
        if contended:
            self._fitness.contended()
        for item in finished:
            item.leaves = ()
        log.info(
            "group.undone",
            service=self._site.service.name,
            events=len(finished) + len(group.running),
            contended=contended,
            reason="a handler failed in it: each of its events is run again, with a savepoint of its own",
        )
        self._lanes.undo(finished, begun, group.parked)
        if culprit is not None:
            self._verdicts.judge(*culprit)
