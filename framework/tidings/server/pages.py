"""Pages of the log that one call has in memory: there is room for each before it is read. It reads nothing itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from tidings.server.budgets import Charge
from tidings.server.wire import Resolved

__all__ = ["PAGE_BYTES", "Pages", "size_of"]

T = TypeVar("T")

PAGE_BYTES: Final = 512 * 1024
"""Bytes of a piece of the log: what a reader that has stopped keeps in memory."""
COPIES: Final = 2
"""How many times a page is in memory: as it was read, and as it is sent."""
EVENT: Final = 512
"""Bytes that an event takes beside what it holds."""


def size_of(events: Sequence[Resolved]) -> int:
    """Return the bytes that these events take."""
    size = EVENT * len(events)
    for event, link in events:
        if event is not None:
            size += len(event.data) + len(event.metadata)
        if link is not None:
            size += EVENT + len(link.data) + len(link.metadata)
    return size


class Pages:
    """The pages of one call, which counts them as long as they are here."""

    def __init__(self, charge: Charge | None) -> None:
        self._charge = charge
        self._held: deque[int] = deque()

    async def read(self, look: Callable[..., Awaitable[T]], events_of: Callable[[T], Sequence[Resolved]]) -> T:
        """Read a page of so many bytes (`most`) as there is room for. An event that is larger than that
        is a page of its own. A call whose reading fails ends, and with it what it holds."""
        charge = self._charge
        if charge is None:
            return await look(most=PAGE_BYTES)
        most = min(charge.page, PAGE_BYTES)
        room = COPIES * most
        await charge.wait_for(room)
        page = await look(most=most)
        size = COPIES * size_of(events_of(page))
        if size > room and charge.excess(size - room):
            del page
            charge.hold(-room)
            await charge.wait_for(size)
            page = await look(most=most)
            room, size = size, COPIES * size_of(events_of(page))
        charge.hold(size - room)
        self._held.append(size)
        return page

    def sent(self) -> None:
        """The page that was read first has left."""
        if self._charge is not None:
            self._charge.hold(-self._held.popleft())
