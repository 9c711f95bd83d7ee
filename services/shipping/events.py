"""The events of the Shipping service, and its views of other services' events."""

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

# ---- events of this service ----------------------------------------------------------


class ShipmentPicked(Event, key="order_id"):
    """The parcel is packed and waits for the carrier. It can still be stopped."""

    order_id: str


class ShipmentDispatched(Event, key="order_id"):
    """The carrier has the parcel; it can no longer be stopped."""

    order_id: str
    carrier: str
    tracking: str


class ShipmentStopped(Event, key="order_id"):
    """The parcel was stopped and will never leave."""

    order_id: str


# ---- views of other services' events: other fields are ignored -------------------------


class OrderCreated(Event, key="order_id"):
    """Order: a customer ordered."""

    order_id: str
    country: str


class OrderConfirmed(Event, key="order_id"):
    """Order: goods are reserved and the payment is authorised."""

    order_id: str


class OrderCancellationRequested(Event, key="order_id"):
    """Order: somebody wants to cancel a confirmed order."""

    order_id: str


class OrderCancelled(Event, key="order_id"):
    """Order: the order is cancelled."""

    order_id: str
