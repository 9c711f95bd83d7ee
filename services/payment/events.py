"""What the Payment service says, and the little that it needs to hear from others.

Amounts are pounds as `Decimal`, which JSON carries as text: no amount ever passes through a float.
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

# ---- what this service says ----------------------------------------------------------


class PaymentAuthorised(Event, key="order_id"):
    """The amount is held on the customer's card."""

    order_id: str
    amount: Amount
    authorisation: str
    """The gateway's name for it."""


class PaymentDeclined(Event, key="order_id"):
    """The gateway said no. It will say no again, so nobody need ask twice."""

    order_id: str
    amount: Amount
    reason: str


class PaymentCaptured(Event, key="order_id"):
    """The amount that was held is taken: revenue."""

    order_id: str
    amount: Amount


class PaymentVoided(Event, key="order_id"):
    """The amount that was held is free again; nothing was taken."""

    order_id: str
    amount: Amount


class PaymentRefunded(Event, key="order_id"):
    """The amount that was taken is given back."""

    order_id: str
    amount: Amount


# ---- what it hears: only the fields that it needs; others are ignored ------------------


class OrderLine(BaseModel):
    """One article of an order; which one is of no interest here."""

    quantity: Annotated[int, Field(gt=0)]
    unit_price: Amount


class OrderCreated(Event, key="order_id"):
    """Order: a customer ordered."""

    order_id: str
    lines: tuple[OrderLine, ...]


class OrderConfirmed(Event, key="order_id"):
    """Order: stock and payment are both there."""

    order_id: str


class OrderCancelled(Event, key="order_id"):
    """Order: the order is off."""

    order_id: str
