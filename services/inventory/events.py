"""What the Inventory service says, and the little that it needs to hear from others.

What happens to an order has the order as its partition key; what happens on a shelf has the sku.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tidings import Event

__all__ = [
    "GoodsReceived",
    "OrderCancelled",
    "OrderCreated",
    "OrderLine",
    "ReturnReceived",
    "ShipmentDispatched",
    "Shortage",
    "StockRejected",
    "StockReleased",
    "StockReserved",
]

Quantity = Annotated[int, Field(gt=0)]
"""Pieces."""

# ---- what this service says ----------------------------------------------------------


class GoodsReceived(Event, key="sku"):
    """A delivery from a supplier: so much more on the shelf."""

    sku: str
    quantity: Quantity


class ReturnReceived(Event, key="sku"):
    """A customer sent something back, and it lies on the shelf again."""

    return_id: str
    sku: str
    quantity: Quantity


class Shortage(BaseModel):
    """An article of which there is not enough."""

    model_config = ConfigDict(frozen=True)

    sku: str
    wanted: int

    def __str__(self) -> str:
        return f"{self.wanted} of {self.sku}"


class StockReserved(Event, key="order_id"):
    """Every line of the order is set aside for it."""

    order_id: str


class StockRejected(Event, key="order_id"):
    """Something is missing, so nothing is set aside."""

    order_id: str
    reason: str
    missing: tuple[Shortage, ...]


class StockReleased(Event, key="order_id"):
    """What was set aside for the order is free again."""

    order_id: str


# ---- what it hears: only the fields that it needs; others are ignored ------------------


class OrderLine(BaseModel):
    """One article of an order; its price is of no interest here."""

    sku: str
    quantity: Quantity


class OrderCreated(Event, key="order_id"):
    """Order: a customer ordered."""

    order_id: str
    lines: tuple[OrderLine, ...]


class OrderCancelled(Event, key="order_id"):
    """Order: the order is off."""

    order_id: str


class ShipmentDispatched(Event, key="order_id"):
    """Shipping: the parcel is with the carrier."""

    order_id: str
