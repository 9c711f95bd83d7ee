"""The file's orders and returns, a few at a time, up to a limit. It never waits for their results."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from services.importer import Invoice

__all__ = ["Traffic"]

AT_ONCE: Final = 8
"""Invoices that are taken in concurrently."""


class Traffic:
    """A stream of orders. Run `run` concurrently, and raise its limit with `go_on`, so that each fault meets orders."""

    def __init__(self, coming: Sequence[Invoice], take_in: Callable[[Invoice], Awaitable[object]]) -> None:
        self.total = len(coming)
        self.done = 0
        """Number of invoices that were taken in."""
        self._coming = iter(coming)
        self._take_in = take_in
        self.limit = 0
        """Number of invoices that it may take in for now."""
        self._begun = 0
        self._changed = asyncio.Condition()

    async def run(self) -> None:
        """Take in all invoices. Raises what `take_in` raises."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(self._carry())

    async def go_on(self, limit: int) -> None:
        """Raise the limit to this number of invoices in all."""
        async with self._changed:
            self.limit = min(limit, self.total)
            self._changed.notify_all()

    async def reached(self, number: int) -> None:
        """Wait until this number of invoices is taken in."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.done >= min(number, self.total))

    async def _carry(self) -> None:
        for invoice in self._coming:
            async with self._changed:
                await self._changed.wait_for(lambda: self._begun < self.limit)
                self._begun += 1
            await self._take_in(invoice)
            async with self._changed:
                self.done += 1
                self._changed.notify_all()
