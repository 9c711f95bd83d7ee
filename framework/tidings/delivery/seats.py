"""A seat: one attempt's place in the transaction of a group, from its handler's first statement to the attempt's end.

A handler begins without one, and holds no connection while it waits for something else. It begins no transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tidings.delivery.attempt import Attempt
from tidings.delivery.failure import Failure
from tidings.delivery.given import Given
from tidings.delivery.inflight import InFlight
from tidings.modelling.context import Context

__all__ = ["Seat"]

PARTING_SECONDS: Final = 2.0
"""Seconds that a transaction which is cut off waits for the handler that is at work in it."""


class Seat:
    """One attempt's; `ask` is called when it first needs the transaction."""

    def __init__(self, item: InFlight, ask: Callable[[Seat], None]) -> None:
        self.item = item
        self.recalled = False
        """Something before it in its bucket was undone: whatever it does has no effect, and it is run again."""
        self.given: Given | None = None
        """None before its attempt has begun."""
        self.asked = False
        self.attempt: Attempt | None = None
        self._ask = ask
        self._waiting: list[asyncio.Future[AsyncConnection]] = []
        """Tasks of the handler that wait for the transaction."""
        self.is_over = False
        """The attempt has ended."""
        self._outcome: Failure | BaseException | None = None
        self._held: asyncio.Future[None] | None = None
        """Done when the attempt that has the transaction ends."""

    @property
    def context(self) -> Context:
        return self.opened.context

    @property
    def has_failed(self) -> bool:
        """The attempt has ended with a failure of its own."""
        return isinstance(self._outcome, Failure)

    @property
    def opened(self) -> Given:
        """What its attempt was given."""
        assert self.given is not None
        return self.given

    def begin(self, context: Context, engine: AsyncEngine) -> Given:
        """Return what the attempt that begins now is given."""
        self.given = Given(context, engine, self._wait)
        return self.given

    def ask(self) -> None:
        """Ask for a transaction, once."""
        if not self.asked:
            self.asked = True
            self._ask(self)

    def end(self, outcome: Failure | BaseException | None) -> None:
        """The attempt has ended with a failure or without one, or was cut off by an exception that is not its own."""
        self._outcome, self.is_over = outcome, True
        if self._held is not None and not self._held.done():
            self._held.set_result(None)

    def recall(self) -> None:
        """Cut the attempt off, if it is under way."""
        self.recalled = True
        if self.attempt is not None:
            self.attempt.cut_off("was cut off to run again, because an event before it was undone")

    async def hold(self, connection: AsyncConnection) -> Failure | None:
        """Let the handler have the transaction, and wait until the attempt is over: None when it succeeded."""
        loop = asyncio.get_running_loop()
        self.context.waits(loop.time(), False)
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.done():  # it was cancelled
                each.set_result(connection)
        if not self.is_over:
            self._held = loop.create_future()
            try:
                await self._held
            except asyncio.CancelledError:
                if not self.is_over:
                    self._held = loop.create_future()
                    await asyncio.wait((self._held,), timeout=PARTING_SECONDS)
                raise
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    async def _wait(self) -> AsyncConnection:
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[AsyncConnection] = loop.create_future()
        self._waiting.append(granted)
        self.context.waits(loop.time(), True)
        self.ask()
        return await granted
