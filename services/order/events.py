"""The events of the Order service, and its views of other services' events.

Every event has the id of its order as its partition key. So all events of one order, whichever service wrote them to
whichever stream, reach every service one after the other, in the order of the log.
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
    "OrderNumbered",
    "OrderReserved",
    "PaymentAuthorised",
    "PaymentDeclined",
    "ShipmentDispatched",
    "ShipmentStopped",
    "StockRejected",
    "StockReserved",
]

# ---- events of this service ----------------------------------------------------------


class OrderLine(BaseModel):
    """One article of an order."""

    model_config = ConfigDict(frozen=True)

    sku: Annotated[str, Field(min_length=1)]
    description: str = ""
    quantity: Annotated[int, Field(gt=0)]
    unit_price: Annotated[Decimal, Field(gt=0)]
    """Pounds for one piece. A text in JSON, because a float cannot hold 2.55."""

    @property
    def amount(self) -> Decimal:
        """The price of the line, in pounds."""
        return self.quantity * self.unit_price


class OrderCreated(Event, key="order_id"):
    """A customer ordered. Inventory and Payment start on it at the same time."""

    order_id: str
    customer_id: str | None
    """None for a guest."""
    country: str
    placed_at: datetime
    """When the customer ordered. The log knows when that was recorded."""
    lines: Annotated[tuple[OrderLine, ...], Field(min_length=1)]


class OrderNumbered(Event, key="order_id"):
    """A key of a caller stands for this order, which may not have been placed yet."""

    order_id: str
    fingerprint: str
    """Of the body of the request; another body with the same key is refused."""


class OrderReserved(Event, key="order_id"):
    """The order knows that its goods are reserved."""

    order_id: str


class OrderAuthorised(Event, key="order_id"):
    """The order knows that its payment is authorised."""

    order_id: str


class OrderConfirmed(Event, key="order_id"):
    """Goods are reserved and the payment is authorised: charge and ship."""

    order_id: str


class OrderCancellationRequested(Event, key="order_id"):
    """Somebody wants to cancel an order whose parcel may be on its way. Shipping decides whether it is too late."""

    order_id: str
    reason: str
    by: str


class OrderCancellationRefused(Event, key="order_id"):
    """The parcel was handed over before it could be stopped."""

    order_id: str
    reason: str


class OrderCancelled(Event, key="order_id"):
    """The order is cancelled for good: give the goods and the money back."""

    order_id: str
    reason: str
    by: str
    """`customer`, `inventory`, `payment`, ..."""


class OrderDispatched(Event, key="order_id"):
    """The carrier has the parcel: the order is complete and can no longer be cancelled."""

    order_id: str


# ---- views of other services' events: other fields are ignored -------------------------


class StockReserved(Event, key="order_id"):
    """Inventory: every line is reserved."""

    order_id: str


class StockRejected(Event, key="order_id"):
    """Inventory: nothing is reserved, because an article is missing."""

    order_id: str
    reason: str


class PaymentAuthorised(Event, key="order_id"):
    """Payment: the money is held."""

    order_id: str


class PaymentDeclined(Event, key="order_id"):
    """Payment: the gateway declined."""

    order_id: str
    reason: str


class ShipmentStopped(Event, key="order_id"):
    """Shipping: the parcel will not leave."""

    order_id: str


class ShipmentDispatched(Event, key="order_id"):
    """Shipping: the carrier has the parcel."""

    order_id: str
