"""What the Order service says, and the little that it needs to hear from others.

Every event names the order that it belongs to and gives it as its partition key. So all events of one order, whichever
service wrote them to whichever stream, arrive in every service in the order of the log, one after the other.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tidings import Event

__all__ = [
    "OrderAuthorised",
    "OrderCancellationRefused",
    "OrderCancellationRequested",
    "OrderCancelled",
    "OrderConfirmed",
    "OrderCreated",
    "OrderDispatched",
    "OrderLine",
    "OrderReserved",
    "PaymentAuthorised",
    "PaymentDeclined",
    "ShipmentDispatched",
    "ShipmentStopped",
    "StockRejected",
    "StockReserved",
]

# ---- what this service says ----------------------------------------------------------


class OrderLine(BaseModel):
    """One article of an order."""

    model_config = ConfigDict(frozen=True)

    sku: Annotated[str, Field(min_length=1)]
    description: str = ""
    quantity: Annotated[int, Field(gt=0)]
    unit_price: Annotated[Decimal, Field(gt=0)]
    """Pounds. In JSON it is text, because a float cannot hold 2.55."""

    @property
    def amount(self) -> Decimal:
        return self.quantity * self.unit_price


class OrderCreated(Event, key="order_id"):
    """A customer ordered. Stock and payment are asked for at the same time."""

    order_id: str
    customer_id: str | None
    """None for a guest."""
    country: str
    placed_at: datetime
    """When the customer did it; the log knows when it was recorded."""
    lines: Annotated[tuple[OrderLine, ...], Field(min_length=1)]


class OrderReserved(Event, key="order_id"):
    """The order has taken note that its goods are reserved."""

    order_id: str


class OrderAuthorised(Event, key="order_id"):
    """The order has taken note that its payment is authorised."""

    order_id: str


class OrderConfirmed(Event, key="order_id"):
    """Stock and payment are both there: charge it and ship it."""

    order_id: str


class OrderCancellationRequested(Event, key="order_id"):
    """Somebody asks to cancel an order that may already be on its way. Shipping decides who was first."""

    order_id: str
    reason: str
    by: str


class OrderCancellationRefused(Event, key="order_id"):
    """The parcel was handed over before it could be stopped."""

    order_id: str
    reason: str


class OrderCancelled(Event, key="order_id"):
    """The order is off, for ever: give the goods and the money back."""

    order_id: str
    reason: str
    by: str
    """`customer`, `inventory`, `payment`, ..."""


class OrderDispatched(Event, key="order_id"):
    """The parcel is with the carrier: the order is done and can no longer be cancelled."""

    order_id: str


# ---- what it hears: only the fields that it needs; others are ignored ------------------


class StockReserved(Event, key="order_id"):
    """Inventory: every line is reserved."""

    order_id: str


class StockRejected(Event, key="order_id"):
    """Inventory: nothing is reserved, because something is missing."""

    order_id: str
    reason: str


class PaymentAuthorised(Event, key="order_id"):
    """Payment: the money is held."""

    order_id: str


class PaymentDeclined(Event, key="order_id"):
    """Payment: the gateway said no."""

    order_id: str
    reason: str


class ShipmentStopped(Event, key="order_id"):
    """Shipping: the parcel stays here."""

    order_id: str


class ShipmentDispatched(Event, key="order_id"):
    """Shipping: the parcel is with the carrier."""

    order_id: str
