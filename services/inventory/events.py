"""The events of the Inventory service, and its views of other services' events.

Events about an order have the order's id as their partition key; events about a shelf have the sku.
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
"""A number of pieces."""

# ---- events of this service ----------------------------------------------------------


class GoodsReceived(Event, key="sku"):
    """A supplier delivered pieces of an article."""

    sku: str
    quantity: Quantity


class ReturnReceived(Event, key="sku"):
    """A customer returned pieces, which are on the shelf again."""

    return_id: str
    sku: str
    quantity: Quantity


class Shortage(BaseModel):
    """An article that is short."""

    model_config = ConfigDict(frozen=True)

    sku: str
    wanted: int

    def __str__(self) -> str:
        return f"{self.wanted} of {self.sku}"


class StockReserved(Event, key="order_id"):
    """The goods of every line are reserved for the order."""

    order_id: str


class StockRejected(Event, key="order_id"):
    """An article is missing, so nothing is reserved."""

    order_id: str
    reason: str
    missing: tuple[Shortage, ...]


class StockReleased(Event, key="order_id"):
    """The goods that were reserved for the order are free again."""

    order_id: str


# ---- views of other services' events: other fields are ignored -------------------------


class OrderLine(BaseModel):
    """One article of an order, without its price."""

    sku: str
    quantity: Quantity


class OrderCreated(Event, key="order_id"):
    """Order: a customer ordered."""

    order_id: str
    lines: tuple[OrderLine, ...]


class OrderCancelled(Event, key="order_id"):
    """Order: the order is cancelled."""

    order_id: str


class ShipmentDispatched(Event, key="order_id"):
    """Shipping: the carrier has the parcel."""

    order_id: str
