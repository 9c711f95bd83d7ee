"""Handlers with a session: within the transaction of a group, one after the other, each in its savepoint.

It never begins or commits a transaction.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.delivery.attempt import Failure
from tidings.delivery.savepoint import ConnectionLost, GroupBroken, in_savepoint
from tidings.delivery.work import Item, Troubles
from tidings.modelling.context import Context
from tidings.modelling.handlers import Inject

__all__ = ["SessionHandlers"]

log = structlog.get_logger("tidings.dispatch")

GROUP: Final = 64
"""Events with a session that share one transaction at most."""
GROUP_SECONDS: Final = 0.025
"""A transaction takes no further event with a session after this long."""
SLOW_SECONDS: Final = 0.25
"""A handler that holds the writer longer than this is named in the log and gets transactions of its own."""


class SessionHandlers:
    """`database` is what errors call it. `waits(item)` says whether it is not run now, and is done with then;
    `attempt(item, context, provide)` runs it, and `judge(item, context, failure)` is told what came of it."""

    def __init__(
        self,
        service: str,
        database: str,
        troubles: Troubles,
        clock: Callable[[], float],
        *,
        waits: Callable[[Item], bool],
        context: Callable[[Item], Context],
        attempt: Callable[[Item, Context, Callable[[Inject], Any]], Awaitable[Failure | None]],
        judge: Callable[[Item, Context, Failure | None], None],
    ) -> None:
        self._service = service
        self._database = database
        self._troubles = troubles
        self._clock = clock
        self._waits = waits
        self._context = context
        self._attempt = attempt
        self._judge = judge
        self._given: deque[Item] = deque()
        self._slow: set[str] = set()

    def __len__(self) -> int:
        """Events that nobody has begun."""
        return len(self._given)

    def give(self, item: Item) -> None:
        self._given.append(item)

    def take_back(self) -> int:
        """Forget what nobody has begun, and say how many that were."""
        number = len(self._given)
        self._given.clear()
        return number

    async def run(self, connection: AsyncConnection, ran: list[Item]) -> None:
        """As many as share this transaction; `ran` gets those whose effects are in it."""
        began = self._clock()
        for nth in range(GROUP):
            if not self._given or self._clock() - began > GROUP_SECONDS:
                return
            first = self._given[0]
            alone = first.handler.name in self._slow or first.turn in self._troubles.suspected
            if alone and nth:
                return
            item = self._given.popleft()
            if not self._waits(item) and await self._within(connection, item):
                ran.append(item)
            if alone:
                return

    async def _within(self, connection: AsyncConnection, item: Item) -> bool:
        """Its effects in a savepoint of the group's transaction. True when they are kept."""
        context = self._context(item)
        began = self._clock()
        try:
            failure = await in_savepoint(
                connection, context, item.handler, lambda provide: self._attempt(item, context, provide)
            )
        except ConnectionLost as lost:
            raise self._troubles.lose(item, self._database, lost.failure, lost.__cause__) from lost
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
                service=self._service,
                handler=item.handler.name,
                seconds=round(took, 3),
                advice="do slow work outside the session, or in a handler without one",
            )
        self._judge(item, context, failure)
        return failure is None
