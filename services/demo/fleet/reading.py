"""A second reading of the whole log at the end: what was ordered, and which goods and money must have moved. Pure
except for `read_log`; like the tally it shares no code and no table with the services.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, NamedTuple

from tidings import EventStore, RecordedEvent

__all__ = ["Basket", "Reading", "read_log"]


class Basket(NamedTuple):
    """The goods and the price of one order."""

    lines: int
    gross: Decimal
    """Pounds."""
    pieces: Counter[str]
    """Pieces by sku."""


@dataclass(slots=True)
class Reading:
    """Counts over all events: call `hear` with each, in the order of the log."""

    baskets: dict[str, Basket] = field(default_factory=dict)
    """Baskets by order id."""
    states: dict[str, str] = field(default_factory=dict)
    """Order id to the state that its last event left it in."""
    returns: dict[str, Counter[str]] = field(default_factory=dict)
    """Return id to pieces by sku."""
    declined: dict[str, Decimal] = field(default_factory=dict)
    """Order id to pounds."""
    received: Counter[str] = field(default_factory=Counter)
    """Pieces from suppliers, by sku."""
    dispatched: set[str] = field(default_factory=set)
    """Orders whose parcel was handed over."""
    said: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of events by order and type."""

    def hear(self, event: RecordedEvent) -> None:
        """Count one event."""
        if event.stream.startswith(("$", "tidings_")):
            return
        data = json.loads(event.data)
        order_id = data.get("order_id")
        if order_id is not None:
            self.said[order_id, event.type] += 1
            if event.type in _STATES:
                self.states[order_id] = _STATES[event.type]
        fold = _FOLDS.get(event.type)
        if fold is not None:
            fold(self, data)

    @property
    def moved(self) -> dict[str, tuple[int, int, int]]:
        """Return the pieces received, returned and shipped by sku that the events demand."""
        returned: Counter[str] = Counter()
        for pieces in self.returns.values():
            returned.update(pieces)
        shipped: Counter[str] = Counter()
        for order_id in self.dispatched:
            shipped.update(self.baskets[order_id].pieces)
        skus = {*self.received, *returned, *shipped}
        return {sku: (self.received[sku], returned[sku], shipped[sku]) for sku in skus}

    def _created(self, data: dict[str, Any]) -> None:
        pieces: Counter[str] = Counter()
        for line in data["lines"]:
            pieces[line["sku"]] += line["quantity"]
        gross = sum((line["quantity"] * Decimal(line["unit_price"]) for line in data["lines"]), Decimal())
        self.baskets[data["order_id"]] = Basket(len(data["lines"]), gross, pieces)

    def _declined(self, data: dict[str, Any]) -> None:
        self.declined[data["order_id"]] = Decimal(data["amount"])

    def _dispatched(self, data: dict[str, Any]) -> None:
        self.dispatched.add(data["order_id"])

    def _received(self, data: dict[str, Any]) -> None:
        self.received[data["sku"]] += data["quantity"]

    def _returned(self, data: dict[str, Any]) -> None:
        self.returns.setdefault(data["return_id"], Counter())[data["sku"]] += data["quantity"]


_FOLDS: Final[dict[str, Callable[[Reading, dict[str, Any]], None]]] = {
    "OrderCreated": Reading._created,
    "PaymentDeclined": Reading._declined,
    "ShipmentDispatched": Reading._dispatched,
    "GoodsReceived": Reading._received,
    "ReturnReceived": Reading._returned,
}
_STATES: Final = {
    "OrderCreated": "placed",
    "OrderConfirmed": "confirmed",
    "OrderCancellationRequested": "cancelling",
    "OrderCancellationRefused": "confirmed",
    "OrderCancelled": "cancelled",
    "OrderDispatched": "dispatched",
}


async def read_log(store: EventStore) -> Reading:
    """Read everything that is in the log now."""
    reading = Reading()
    async for event in store.read_all():
        reading.hear(event)
    return reading
