"""The shop in which the demo's customers order and cancel: a port, and a shop in this process. It decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final, NamedTuple, Protocol

from services.order import Order, OrderRefused, repository
from services.order.events import OrderLine
from tidings import RecordedEvent
from tidings.errors import WrongExpectedVersion

__all__ = ["REASON", "InProcess", "Purchase", "Shop"]

REASON: Final = "changed my mind"
"""The reason that customers give for cancelling."""


class Purchase(NamedTuple):
    """An order that a customer wants to place."""

    number: str
    """Number of the invoice. The same number is the same order, however the shop makes the order's id."""
    lines: Sequence[OrderLine]
    customer: str | None
    country: str
    at: datetime
    reason: str
    """Where the demo has the purchase from."""


class Shop(Protocol):
    """The port of a shop. Customers know the number of their invoice, the log knows the order's id."""

    async def place(self, purchase: Purchase) -> bool:
        """Place an order. Return whether it is new; placing it again changes nothing."""
        ...

    async def cancel(self, number: str) -> None:
        """Ask for an order to be cancelled. Nothing happens if it has left already."""
        ...

    def hear(self, event: RecordedEvent) -> None:
        """Take note of an event of the log: an order may be in it before the shop has answered."""
        ...

    def number_of(self, order_id: str) -> str:
        """Return the invoice number of an order that was placed here."""
        ...


class InProcess:
    """A shop that uses Order's repository in this process. The invoice number is the order's id."""

    async def place(self, purchase: Purchase) -> bool:
        """See `Shop.place`: False if an earlier run placed it."""
        number, lines, customer, country, at, reason = purchase
        why = {"actor": f"customer {customer}" if customer else "guest", "reason": reason}
        try:
            await repository.create(number, Order.place, lines, customer, country, at, metadata=why)
        except WrongExpectedVersion:
            return False
        return True

    async def cancel(self, number: str) -> None:
        """See `Shop.cancel`."""
        with suppress(OrderRefused):
            await repository.change(number, Order.cancel, REASON, metadata={"actor": "customer", "reason": REASON})

    def hear(self, event: RecordedEvent) -> None:
        """See `Shop.hear`: it needs nothing from the log."""

    def number_of(self, order_id: str) -> str:
        """See `Shop.number_of`: the id is the number."""
        return order_id
