"""The people behind the orders: most wait for their parcel, a few change their mind, always the same ones.

The real file does not say when a customer called, so the demo decides it by a checksum of the order's number.
"""

from __future__ import annotations

from binascii import crc32
from contextlib import suppress
from enum import Enum
from typing import Final

from services.order import Order, OrderRefused, repository
from tidings.stores import RecordedEvent

__all__ = ["LIVE", "Mood", "call", "hear", "mood_of"]

ONE_IN: Final = 25
REASON: Final = "changed my mind"
LIVE: Final = "live-"
"""How the ids of the orders begin that are not in the file, but placed while somebody watches."""


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


def mood_of(order_id: str) -> Mood:
    """One order in `ONE_IN` for each of the three moods; none of those that the demo invents."""
    if order_id.startswith(LIVE):
        return Mood.NEVER
    return _MOODS.get(crc32(order_id.encode()) % ONE_IN, Mood.NEVER)


async def hear(event: RecordedEvent) -> None:
    """Customers read the log like everybody else, and call when it says what they were waiting for.

    They read all of it in every run. Calling again about an order that is cancelled or dispatched changes nothing, and
    whoever was about to call when the last run was interrupted calls now.
    """
    order_id = event.stream.partition("-")[2]
    if event.type in _WAITED_FOR and mood_of(order_id).value == event.type:
        await call(order_id)


async def call(order_id: str) -> None:
    """Ask for an order to be cancelled; one that has left already is kept."""
    with suppress(OrderRefused):
        await repository.change(order_id, Order.cancel, REASON, metadata={"actor": "customer", "reason": REASON})
