"""Handlers with a session: within the transaction of a group, one after the other, each in its savepoint.

It never begins or commits a transaction.
"""

from __future__ import annotations

import traceback
from collections import deque
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.delivery.batch import Pending
from tidings.delivery.failure import Failure
from tidings.delivery.given import Given
from tidings.delivery.hindrances import Hindrances
from tidings.delivery.inflight import InFlight
from tidings.delivery.runner import Runner
from tidings.delivery.savepoint import ConnectionLost, GroupBroken, in_savepoint
from tidings.delivery.seats import Seat
from tidings.delivery.site import Joined
from tidings.delivery.slow_handlers import SlowHandlers
from tidings.delivery.verdicts import Verdicts

__all__ = ["Groups"]

GROUP: Final = 64
"""Events with a session that share one transaction at most."""
GROUP_SECONDS: Final = 0.025
"""A transaction takes no further event with a session after this long."""

ENDED_TRANSACTION: Final = "TransactionMisuse: it ended the transaction it was part of"
"""The reason of a failure, before what was noticed."""


class Groups:
    """The groups of one bucket range, one at a time."""

    def __init__(
        self, joined: Joined, runner: Runner, hindrances: Hindrances, verdicts: Verdicts, pending: Pending
    ) -> None:
        self._database = joined.site.database.shown
        self._memory = joined.site.memory
        self._clock = joined.site.clock
        self._runner = runner
        self._hindrances = hindrances
        self._verdicts = verdicts
        self._pending = pending
        self._given: deque[InFlight | Seat] = deque()
        self._slow = SlowHandlers(joined.site.service.name)

    def __len__(self) -> int:
        """Events that nobody has begun."""
        return len(self._given)

    def give(self, item: InFlight) -> None:
        """Run it in the next transaction that has room."""
        self._given.append(item)
        self._pending.wake.set()

    def ask(self, seat: Seat) -> None:
        """Let its handler, which is at work already, have the next transaction that has room."""
        self._given.append(seat)
        self._pending.wake.set()

    def take_back(self) -> int:
        """Forget what nobody has begun, and say how many that were."""
        begun = [given for given in self._given if isinstance(given, Seat)]
        number = len(self._given) - len(begun)
        self._given = deque(begun)
        return number

    async def run(self, connection: AsyncConnection, ran: list[InFlight]) -> None:
        """As many as share this transaction; `ran` gets those whose effects are in it."""
        await self._hindrances.refresh(connection, self._pending.batch.notable)
        began = self._clock()
        for nth in range(GROUP):
            if not self._given or self._clock() - began > GROUP_SECONDS:
                return
            first = self._given[0]
            seat, item = (first, first.item) if isinstance(first, Seat) else (None, first)
            alone = item.handler.name in self._slow or item.turn in self._memory.suspected
            if alone and nth:
                return
            self._given.popleft()
            why = self._hindrances.of(item) if seat is None else None
            if why is not None:
                self._verdicts.hindered(item, why)
            elif await self._within(connection, item, seat):
                ran.append(item)
            if alone:
                return

    async def _within(self, connection: AsyncConnection, item: InFlight, seat: Seat | None) -> bool:
        """Its effects in a savepoint of the group's transaction. True when they are kept."""
        began = self._clock()
        try:
            if seat is None:
                context = self._runner.context(item)
                given = Given(context, connection.engine)
                failure = await in_savepoint(
                    connection, given, item.handler, lambda: self._runner.run(item, context, given.provide)
                )
            else:
                context, given = seat.context, seat.opened
                failure = await in_savepoint(connection, given, item.handler, lambda: seat.hold(connection))
        except ConnectionLost as lost:
            raise self._memory.lose(item, self._database, lost.failure, lost.__cause__) from lost
        except GroupBroken as broken:
            cause = broken.__cause__
            assert isinstance(cause, Exception)
            failure = broken.failure or Failure(
                f"{ENDED_TRANSACTION}: {cause}",
                "".join(traceback.format_exception(cause)),
                permanent=True,
            )
            raise self._memory.condemn(item, failure, "ended the transaction that its group shares") from cause
        self._slow.took(item.handler.name, self._clock() - began)
        if failure is None:
            self._pending.unseen.add(item.bucket)  # before its lane goes on
        self._verdicts.judge(item, context, failure)
        return failure is None
