"""Where the demo's people order and cancel: the port, and the shop that is in this very process. It decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final, NamedTuple, Protocol

from services.order import Order, OrderRefused, repository
from services.order.events import OrderLine
from tidings.errors import WrongExpectedVersion

__all__ = ["REASON", "InProcess", "Purchase", "Shop"]

REASON: Final = "changed my mind"
"""Why people cancel."""


class Purchase(NamedTuple):
    """What somebody wants to have."""

    number: str
    """Of the invoice. Whatever the shop makes the order's id from, the same number is the same order."""
    lines: Sequence[OrderLine]
    customer: str | None
    country: str
    at: datetime
    reason: str
    """Where the demo has it from."""


class Shop(Protocol):
    """Customers know the number of their invoice; the log knows the order's id."""

    async def place(self, purchase: Purchase) -> bool:
        """Whether it is a new order. Placing it again changes nothing."""
        ...

    async def cancel(self, number: str) -> None:
        """Ask for an order to be cancelled; one that has left already is kept."""
        ...

    def number_of(self, order_id: str) -> str:
        """The invoice of an order that was placed here."""
        ...


class InProcess:
    """Order's own repository, which the service in this process has open. The invoice's number is the order's id."""

    async def place(self, purchase: Purchase) -> bool:
        """False when it is there, because an earlier run placed it."""
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

    def number_of(self, order_id: str) -> str:
        """They are the same."""
        return order_id
