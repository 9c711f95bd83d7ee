"""The customers: most wait for their parcel, a few change their mind, always the same ones.

The file does not say which customers changed their mind, so a checksum of the order's number decides.
"""

from __future__ import annotations

from binascii import crc32
from enum import Enum
from typing import Final

from services.demo.shop import Shop
from tidings import RecordedEvent

__all__ = ["LIVE", "Customers", "Mood", "mood_of"]

ONE_IN: Final = 25
LIVE: Final = "live-"
"""Prefix of the numbers of live orders, which are not in the file."""


class Mood(Enum):
    """When a customer changes their mind."""

    NEVER = None
    AT_ONCE = "OrderCreated"
    """Cancels before the order can be confirmed."""
    WHEN_CONFIRMED = "OrderConfirmed"
    """Cancels in a race with Shipping, which is about to pick the parcel."""
    WHEN_PICKED = "ShipmentPicked"
    """Cancels too late: the event that sends the parcel off comes earlier in the log."""


_MOODS: Final = {0: Mood.AT_ONCE, 1: Mood.WHEN_CONFIRMED, 2: Mood.WHEN_PICKED}
_WAITED_FOR: Final = (Mood.WHEN_CONFIRMED.value, Mood.WHEN_PICKED.value)


def mood_of(number: str) -> Mood:
    """Return the mood of an order: one in `ONE_IN` for each of the three, none for live orders."""
    if number.startswith(LIVE):
        return Mood.NEVER
    return _MOODS.get(crc32(number.encode()) % ONE_IN, Mood.NEVER)


class Customers:
    """The customers as readers of the log: an event can make them call the shop."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop

    async def hear(self, event: RecordedEvent) -> None:
        """React to an event. Call it with every event of the log, in every run: a second call about a cancelled or
        dispatched order changes nothing, and calls that an interrupted run did not make are made now.
        """
        self._shop.hear(event)
        if event.type in _WAITED_FOR:
            number = self._shop.number_of(event.stream.partition("-")[2])
            if mood_of(number).value == event.type:
                await self._shop.cancel(number)
