"""The people behind the orders: most wait for their parcel, a few change their mind, always the same ones.

The real file does not say when a customer called, so the demo decides it by a checksum of the order's number.
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
"""How the numbers of the orders begin that are not in the file, but placed while somebody watches."""


class Mood(Enum):
    """When a customer changes their mind."""

    NEVER = None
    AT_ONCE = "OrderCreated"
    """Before anybody could have confirmed it."""
    WHEN_CONFIRMED = "OrderConfirmed"
    """A race with Shipping, which is about to pick."""
    WHEN_PICKED = "ShipmentPicked"
    """Too late: in the log, the request stands behind the event on which the parcel leaves."""


_MOODS: Final = {0: Mood.AT_ONCE, 1: Mood.WHEN_CONFIRMED, 2: Mood.WHEN_PICKED}
_WAITED_FOR: Final = (Mood.WHEN_CONFIRMED.value, Mood.WHEN_PICKED.value)


def mood_of(number: str) -> Mood:
    """One order in `ONE_IN` for each of the three moods; none of those that the demo invents."""
    if number.startswith(LIVE):
        return Mood.NEVER
    return _MOODS.get(crc32(number.encode()) % ONE_IN, Mood.NEVER)


class Customers:
    """They read the log like everybody else, and call the shop when it says what they were waiting for."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop

    async def hear(self, event: RecordedEvent) -> None:
        """Every event of the log, in every run. Calling again about an order that is cancelled or dispatched changes
        nothing, and whoever was about to call when the last run was interrupted calls now.
        """
        if event.type in _WAITED_FOR:
            number = self._shop.number_of(event.stream.partition("-")[2])
            if mood_of(number).value == event.type:
                await self._shop.cancel(number)
