"""What the Shipping service says, and the little that it needs to hear from others."""

from __future__ import annotations

from tidings import Event

__all__ = [
    "OrderCancellationRequested",
    "OrderCancelled",
    "OrderConfirmed",
    "OrderCreated",
    "ShipmentDispatched",
    "ShipmentPicked",
    "ShipmentStopped",
]

# ---- what this service says ----------------------------------------------------------


class ShipmentPicked(Event, key="order_id"):
    """The parcel is packed and waits for the carrier. Until it is handed over it can be stopped."""

    order_id: str


class ShipmentDispatched(Event, key="order_id"):
    """The parcel is with the carrier; nobody here can stop it any more."""

    order_id: str
    carrier: str
    tracking: str


class ShipmentStopped(Event, key="order_id"):
    """The parcel stays here and will never leave."""

    order_id: str


# ---- what it hears: only the fields that it needs; others are ignored ------------------


class OrderCreated(Event, key="order_id"):
    """Order: a customer ordered."""

    order_id: str
    country: str


class OrderConfirmed(Event, key="order_id"):
    """Order: stock and payment are both there."""

    order_id: str


class OrderCancellationRequested(Event, key="order_id"):
    """Order: somebody wants a confirmed order stopped."""

    order_id: str


class OrderCancelled(Event, key="order_id"):
    """Order: the order is off."""

    order_id: str
