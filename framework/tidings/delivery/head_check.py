"""The head check: what the bus says of a position that the log has not reached is never believed.

A relay publishes only what its log holds. A message that claims more is forged, or comes from the relay of a copied
log: accepted, it would make the service pass over the events that the log gives those positions later. Messages wait
here, in the order in which they came, until the store has said how far the log goes. It reads no message and runs
nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Generic, TypeVar

import structlog

from tidings._support.backoff import Backoff
from tidings._support.telling import Telling
from tidings.errors import StoreUnavailable
from tidings.stores import EventStore

__all__ = ["HeadCheck"]

T = TypeVar("T")

log = structlog.get_logger("tidings.intake")

ASK_SECONDS: Final = (0.2, 1.5)
"""First and longest pause, in seconds, before the store is asked again after it could not be reached."""


class HeadCheck(Generic[T]):
    """What waits to be told that the log goes as far as it claims."""

    def __init__(self, store: EventStore, head: int, service: str) -> None:
        self.head = head
        """The log was seen to go at least this far."""
        self._store = store
        self._service = service
        self._waiting: deque[tuple[int, T]] = deque()
        self._came = asyncio.Event()
        self._telling = Telling(log)

    def knows(self, position: int) -> bool:
        """The log goes that far, and nothing that came before it waits."""
        return position <= self.head and not self._waiting

    def keep(self, position: int, item: T) -> None:
        """Let it wait for `rule`, because it claims `position`."""
        self._waiting.append((position, item))
        self._came.set()

    def forget(self) -> None:
        """Drop what waits: the connection that brought it is lost, and the bus brings it again."""
        self._waiting.clear()
        self._came.clear()

    async def rule(self) -> list[tuple[T, bool]]:
        """Wait until something can be ruled on. Return it in order, each with whether the log goes that far.

        Whoever calls it goes through the list before anything else can come.
        """
        await self._came.wait()
        asked = len(self._waiting)  # the answer condemns only what had come before the question
        await self._ask()
        ruled: list[tuple[T, bool]] = []
        while self._waiting and (len(ruled) < asked or self._waiting[0][0] <= self.head):
            position, item = self._waiting.popleft()
            ruled.append((item, position <= self.head))
        if not self._waiting:
            self._came.clear()
        return ruled

    async def _ask(self) -> None:
        backoff = Backoff(*ASK_SECONDS)
        while True:
            try:
                self.head = max(self.head, await self._store.head())
                self._telling.over("service.goes_on", service=self._service)
                return
            except StoreUnavailable as error:
                self._telling.failed(
                    "service.waiting_for_store",
                    error,
                    service=self._service,
                    messages=len(self._waiting),
                    advice="events from the bus are taken when the store says that its log holds them: wait",
                )
            await backoff.wait()
