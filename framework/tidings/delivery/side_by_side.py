"""Handlers without a session: side by side, one event of a bucket at a time. Their watermark joins the next commit."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from tidings._support.workers import Workers
from tidings.delivery.attempt import Attempt
from tidings.delivery.batch import Pending
from tidings.delivery.hindrances import Hindrances
from tidings.delivery.inflight import InFlight, Turn
from tidings.delivery.runner import Runner
from tidings.delivery.seats import Seat
from tidings.delivery.site import Joined
from tidings.delivery.verdicts import Verdicts
from tidings.modelling.context import Context
from tidings.modelling.handlers import Inject

__all__ = ["SideBySide"]


class SideBySide:
    """As many at once as the service allows."""

    def __init__(
        self, joined: Joined, runner: Runner, hindrances: Hindrances, verdicts: Verdicts, pending: Pending
    ) -> None:
        self._engine = joined.site.database.engine
        self._runner = runner
        self._hindrances = hindrances
        self._verdicts = verdicts
        self._pending = pending
        self.workers: Workers[InFlight] = Workers(joined.site.service.concurrency, self._begin)
        self._deferred: list[InFlight] = []
        """Their bucket has effects in a transaction under way, which they would not see."""
        self._seats: dict[Turn, Seat] = {}
        """Of handlers at work that have asked for a session."""
        self.ask: Callable[[Seat], None] = _no_seats
        """Who has transactions for them."""

    def give(self, item: InFlight) -> None:
        if item.bucket in self._pending.unseen:
            self._deferred.append(item)
        else:
            self.workers.give(item)

    def give_all(self, items: Sequence[InFlight]) -> None:
        """As `give` of each."""
        if self._pending.unseen:
            for item in items:
                self.give(item)
        else:
            self.workers.give_all(items)

    def committed(self) -> None:
        """What handlers with a session have written can be seen now."""
        deferred, self._deferred = self._deferred, []
        for item in deferred:
            self.workers.give(item)

    def take_back(self) -> int:
        """Forget what nobody has begun, and say how many that were."""
        number = len(self._deferred) + self.workers.take_back()
        self._deferred.clear()
        return number

    async def run(self) -> None:
        """Until cancelled, or until an object of the service's own is away."""
        await self.workers.run()

    def _begin(self, item: InFlight) -> Awaitable[None] | None:
        """Do what can be done at once; what is left to be awaited of it."""
        why = self._hindrances.of(item)
        if why is not None:
            self._verdicts.hindered(item, why)
            return None
        context = self._runner.context(item)
        context.opens(self._open)
        begun = self._runner.begin(item, context, _no_session)
        if isinstance(begun, Attempt):
            return self._end(item, context, begun)
        self._verdicts.judge(item, context, begun)
        return None

    async def _end(self, item: InFlight, context: Context, begun: Attempt) -> None:
        try:
            outcome = await self._runner.outcome(item, begun)
        except BaseException as error:  # an object of the service's own is away, or it is cut off
            seat = self._seats.pop(item.turn, None)
            if seat is not None:
                seat.end(error)
                if isinstance(error, Exception):
                    return
            raise
        seat = self._seats.pop(item.turn, None) if self._seats else None
        if seat is None:
            self._verdicts.judge(item, context, outcome)
        else:
            seat.end(outcome)  # it is judged in its transaction

    @asynccontextmanager
    async def _open(self, context: Context) -> AsyncIterator[AsyncSession]:
        """What the handler is given when it asks for a session at work."""
        context.check_alive("context.session()")
        item = self._runner.working[context.event.position]
        seat = self._seats.get(item.turn)
        if seat is None:
            seat = self._seats[item.turn] = Seat(item, self.ask)
            seat.begin(context, self._engine)
        async with seat.opened.enter(context) as session:
            yield session


def _no_seats(seat: Seat) -> None:
    raise AssertionError("nobody has transactions")


def _no_session(wanted: Inject) -> Any:
    raise AssertionError(f"a handler without a session asked for {wanted}")
