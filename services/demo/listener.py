"""The demo's listener: a catch-up subscription from the first event on, for the tally and the customers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from services.demo.beside import beside
from services.demo.customers import Customers
from services.demo.tally import Tally
from tidings import EventStore, RecordedEvent
from tidings.errors import StoreUnavailable

__all__ = ["Listener", "listening", "silence"]

AGAIN: Final = 0.2
"""Seconds to wait before it asks again after the store was down."""


class Listener:
    """A subscription for the demo. Get one from `listening`."""

    def __init__(self, store: EventStore, customers: Customers) -> None:
        self.tally = Tally()
        self.position = -1
        """Position up to which every event was heard."""
        self._store = store
        self._customers = customers
        self._heard = asyncio.Condition()

    async def run(self) -> None:
        """Listen until cancelled. After an outage of the store it goes on where it stopped. A position counts as
        reached when the customers have reacted to its event."""
        while True:
            try:
                async for item in self._store.subscribe_all(after=self.position):
                    if isinstance(item, RecordedEvent):
                        self.tally.hear(item)
                        await self._customers.hear(item)
                    async with self._heard:
                        self.position = item.position
                        self._heard.notify_all()
                return
            except StoreUnavailable:
                await asyncio.sleep(AGAIN)

    async def reached(self, position: int) -> None:
        """Wait until every event up to a position was heard."""
        async with self._heard:
            await self._heard.wait_for(lambda: self.position >= position)


@asynccontextmanager
async def listening(store: EventStore, customers: Customers) -> AsyncIterator[Listener]:
    """Return a listener that has heard the whole history and listens while the block runs."""
    listener = Listener(store, customers)
    async with beside(listener.run()):
        await listener.reached(await store.head())
        yield listener


async def silence(store: EventStore, listener: Listener, settled: Callable[[], Awaitable[object]]) -> None:
    """Wait until every event is settled in every service, as `settled` says, and no customer reacts any more."""
    while True:
        head = await store.head()
        await settled()
        await listener.reached(head)
        if await store.head() == head:
            return
