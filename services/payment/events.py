"""The events of the Payment service, and its views of other services' events.

Amounts are pounds as `Decimal`, a text in JSON. No amount ever passes through a float.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, Field

from tidings import Event

__all__ = [
    "OrderCancelled",
    "OrderConfirmed",
    "OrderCreated",
    "OrderLine",
    "PaymentAuthorised",
    "PaymentCaptured",
    "PaymentDeclined",
    "PaymentRefunded",
    "PaymentVoided",
]

Amount = Annotated[Decimal, Field(gt=0)]

# ---- events of this service ----------------------------------------------------------


class PaymentAuthorised(Event, key="order_id"):
    """The amount is held on the customer's card."""

    order_id: str
    amount: Amount
    authorisation: str
    """The gateway's id of the authorisation."""


class PaymentDeclined(Event, key="order_id"):
    """The gateway declined, and would decline again."""

    order_id: str
    amount: Amount
    reason: str


class PaymentCaptured(Event, key="order_id"):
    """The held amount was taken: revenue."""

    order_id: str
    amount: Amount


class PaymentVoided(Event, key="order_id"):
    """The held amount was released; nothing was taken."""

    order_id: str
    amount: Amount


class PaymentRefunded(Event, key="order_id"):
    """The captured amount was given back."""

    order_id: str
    amount: Amount


# ---- views of other services' events: other fields are ignored -------------------------


class OrderLine(BaseModel):
    """One line of an order, without its article."""

    quantity: Annotated[int, Field(gt=0)]
    unit_price: Amount


class OrderCreated(Event, key="order_id"):
    """Order: a customer ordered."""

    order_id: str
    lines: tuple[OrderLine, ...]


class OrderConfirmed(Event, key="order_id"):
    """Order: goods are reserved and the payment is authorised."""

    order_id: str


class OrderCancelled(Event, key="order_id"):
    """Order: the order is cancelled."""

    order_id: str
