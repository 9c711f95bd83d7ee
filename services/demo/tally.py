"""The log, added up: a reading that shares no code and no table with the services.

That makes it a check. The services' databases say where goods and money are; the tally says where they must be.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from tidings import RecordedEvent

__all__ = ["Tally"]

Fold = Callable[["Tally", dict[str, Any]], None]


@dataclass(slots=True)
class Tally:
    """Counts over all events: call `hear` with each, in the order of the log."""

    events: int = 0
    """Number of events of services, without those that Tidings writes for itself."""
    orders: dict[str, str] = field(default_factory=dict)
    """Order id to the state that its last event left it in."""
    confirmed: int = 0
    cancelled_by: Counter[str] = field(default_factory=Counter)
    stopped: list[str] = field(default_factory=list)
    """Confirmed orders that were cancelled because the parcel could still be stopped."""
    refused: list[str] = field(default_factory=list)
    """Orders whose customer wanted to cancel after the parcel had left."""
    contradictory: set[str] = field(default_factory=set)
    """Orders that left a final state, or were shipped after they were cancelled. There must be none."""
    parcels: set[str] = field(default_factory=set)
    """Orders whose parcel the carrier has."""
    received: int = 0
    """Pieces from suppliers."""
    returned: int = 0
    """Pieces from customers."""
    payments: Counter[str] = field(default_factory=Counter)
    """Payment events by type."""
    money: dict[str, Decimal] = field(default_factory=dict)
    """Pounds by type of payment event."""

    def hear(self, event: RecordedEvent) -> None:
        """Count one event."""
        if event.stream.startswith(("$", "tidings_")):
            return
        self.events += 1
        fold = _FOLDS.get(event.type)
        if fold is not None:
            fold(self, json.loads(event.data))

    def count(self, state: str) -> int:
        """Return the number of orders in a state."""
        return sum(1 for found in self.orders.values() if found == state)

    def pounds(self, kind: str) -> Decimal:
        """Return the pounds in payment events of one type."""
        return self.money.get(kind, Decimal())

    def order_is(self, order_id: str, state: str) -> None:
        """Note that an order is in this state after its event."""
        if self.orders.get(order_id) in ("cancelled", "dispatched"):
            self.contradictory.add(order_id)
        self.orders[order_id] = state

    # ---- one method per event that matters ----------------------------------------------

    def _created(self, data: dict[str, Any]) -> None:
        self.order_is(data["order_id"], "placed")

    def _confirmed(self, data: dict[str, Any]) -> None:
        self.order_is(data["order_id"], "confirmed")
        self.confirmed += 1

    def _requested(self, data: dict[str, Any]) -> None:
        self.order_is(data["order_id"], "cancelling")

    def _refused(self, data: dict[str, Any]) -> None:
        self.refused.append(data["order_id"])

    def _cancelled(self, data: dict[str, Any]) -> None:
        if self.orders[data["order_id"]] == "cancelling":
            self.stopped.append(data["order_id"])
        self.order_is(data["order_id"], "cancelled")
        self.cancelled_by[data["by"]] += 1

    def _order_dispatched(self, data: dict[str, Any]) -> None:
        self.order_is(data["order_id"], "dispatched")

    def _parcel_dispatched(self, data: dict[str, Any]) -> None:
        if self.orders[data["order_id"]] == "cancelled":
            self.contradictory.add(data["order_id"])
        self.parcels.add(data["order_id"])

    def _goods_received(self, data: dict[str, Any]) -> None:
        self.received += data["quantity"]

    def _return_received(self, data: dict[str, Any]) -> None:
        self.returned += data["quantity"]


def _paid(kind: str) -> Fold:
    def fold(tally: Tally, data: dict[str, Any]) -> None:
        tally.payments[kind] += 1
        tally.money[kind] = tally.pounds(kind) + Decimal(data["amount"])

    return fold


_PAYMENTS: Final = ("PaymentAuthorised", "PaymentDeclined", "PaymentCaptured", "PaymentVoided", "PaymentRefunded")

_FOLDS: Final[dict[str, Fold]] = {
    "OrderCreated": Tally._created,
    "OrderConfirmed": Tally._confirmed,
    "OrderCancellationRequested": Tally._requested,
    "OrderCancellationRefused": Tally._refused,
    "OrderCancelled": Tally._cancelled,
    "OrderDispatched": Tally._order_dispatched,
    "ShipmentDispatched": Tally._parcel_dispatched,
    "GoodsReceived": Tally._goods_received,
    "ReturnReceived": Tally._return_received,
    **{kind: _paid(kind) for kind in _PAYMENTS},
}
