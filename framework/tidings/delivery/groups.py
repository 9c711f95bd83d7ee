"""Handlers with a session: within the transaction of a group, one after the other, each in its savepoint.

It never begins or commits a transaction.
"""

from __future__ import annotations

import traceback
from collections import deque
from typing import Final

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.delivery.batch import Pending
from tidings.delivery.failure import Failure
from tidings.delivery.hindrances import Hindrances
from tidings.delivery.inflight import InFlight
from tidings.delivery.runner import Runner
from tidings.delivery.savepoint import ConnectionLost, GroupBroken, in_savepoint
from tidings.delivery.site import Joined
from tidings.delivery.verdicts import Verdicts

__all__ = ["Groups"]

log = structlog.get_logger("tidings.delivery")

GROUP: Final = 64
"""Events with a session that share one transaction at most."""
GROUP_SECONDS: Final = 0.025
"""A transaction takes no further event with a session after this long."""
SLOW_SECONDS: Final = 0.25
"""A handler that holds the writer longer than this is named in the log and gets transactions of its own."""

ENDED_TRANSACTION: Final = "TransactionMisuse: it ended the transaction it was part of"
"""The reason of a failure, before what was noticed."""


class Groups:
    """The groups of one bucket range, one at a time."""

    def __init__(
        self, joined: Joined, runner: Runner, hindrances: Hindrances, verdicts: Verdicts, pending: Pending
    ) -> None:
        self._service = joined.site.service.name
        self._database = joined.site.database.shown
        self._memory = joined.site.memory
        self._clock = joined.site.clock
        self._runner = runner
        self._hindrances = hindrances
        self._verdicts = verdicts
        self._pending = pending
        self._given: deque[InFlight] = deque()
        self._slow: set[str] = set()
        """Handlers that hold the writer for long."""

    def __len__(self) -> int:
        """Events that nobody has begun."""
        return len(self._given)

    def give(self, item: InFlight) -> None:
        """Run it in the next transaction that has room."""
        self._given.append(item)
        self._pending.wake.set()

    def take_back(self) -> int:
        """Forget what nobody has begun, and say how many that were."""
        number = len(self._given)
        self._given.clear()
        return number

    async def run(self, connection: AsyncConnection, ran: list[InFlight]) -> None:
        """As many as share this transaction; `ran` gets those whose effects are in it."""
        await self._hindrances.refresh(connection, self._pending.batch.notable)
        began = self._clock()
        for nth in range(GROUP):
            if not self._given or self._clock() - began > GROUP_SECONDS:
                return
            first = self._given[0]
            alone = first.handler.name in self._slow or first.turn in self._memory.suspected
            if alone and nth:
                return
            item = self._given.popleft()
            why = self._hindrances.of(item)
            if why is not None:
                self._verdicts.hindered(item, why)
            elif await self._within(connection, item):
                ran.append(item)
            if alone:
                return

    async def _within(self, connection: AsyncConnection, item: InFlight) -> bool:
        """Its effects in a savepoint of the group's transaction. True when they are kept."""
        context = self._runner.context(item)
        began = self._clock()
        try:
            failure = await in_savepoint(
                connection, context, item.handler, lambda provide: self._runner.run(item, context, provide)
            )
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
        took = self._clock() - began
        if took > SLOW_SECONDS and item.handler.name not in self._slow:
            self._slow.add(item.handler.name)
            log.warning(
                "handler.holds_writer",
                service=self._service,
                handler=item.handler.name,
                seconds=round(took, 3),
                advice="do slow work outside the session, or in a handler without one",
            )
        self._verdicts.judge(item, context, failure)
        return failure is None
