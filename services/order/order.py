"""The order: what it decides, and how its events change it. It does no I/O, so a test needs no database.

                    stock and payment                    parcel handed over
     ┌─────────┐      are both there     ┌───────────┐      first            ┌────────────┐
     │ PLACED  ├────────────────────────>│ CONFIRMED ├──────────────────────>│ DISPATCHED │
     └────┬────┘                         └─────┬─────┘                       └────────────┘
          │ either fails,                      │ customer asks                     ^
          │ or customer asks                   v                  handed over first│ (refused)
          │                              ┌────────────┐                            │
          │                              │ CANCELLING ├────────────────────────────┘
          v                              └─────┬──────┘
     ┌───────────┐          parcel stopped first│
     │ CANCELLED │<─────────────────────────────┘
     └───────────┘

News from other services may arrive at any time, even too late to matter (stock is reserved for an order that its
customer has just cancelled). Late news changes nothing here; the service that sent it receives `OrderCancelled` and
undoes its part. News that contradicts an earlier decision is an error in the protocol, and raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from services.order.events import (
    OrderAuthorised,
    OrderCancellationRefused,
    OrderCancellationRequested,
    OrderCancelled,
    OrderConfirmed,
    OrderCreated,
    OrderDispatched,
    OrderLine,
    OrderReserved,
)
from tidings import Aggregate, evolves

__all__ = ["CUSTOMER", "Order", "OrderRefused", "Status"]

CUSTOMER = "customer"
"""Who cancels if nobody is named."""


class OrderRefused(Exception):
    """The order's state does not allow what was asked for; nothing was changed."""


class Status(StrEnum):
    """The state of an order."""

    NEW = "new"
    """It has no events."""
    PLACED = "placed"
    CONFIRMED = "confirmed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    DISPATCHED = "dispatched"

    @property
    def final(self) -> bool:
        """Whether the order can no longer change."""
        return self in (Status.CANCELLED, Status.DISPATCHED)


class Order(Aggregate, category="order"):
    """One order, in stream `order-<id>`."""

    def __init__(self) -> None:
        self.status = Status.NEW
        self.reserved = False
        self.authorised = False
        self.customer_id: str | None = None
        self.country = ""
        self.placed_at: datetime | None = None
        self.lines: tuple[OrderLine, ...] = ()
        self.reason = ""
        """Why it was cancelled, or should be."""
        self.by = ""
        """Who cancelled it, or asked for that."""

    @property
    def total(self) -> Decimal:
        """The sum over all lines, in pounds."""
        return sum((line.amount for line in self.lines), Decimal())

    # ---- requests ----------------------------------------------------------------------

    def place(self, lines: Sequence[OrderLine], customer_id: str | None, country: str, placed_at: datetime) -> None:
        """Place the order. Raises `OrderRefused` without lines."""
        if self.status is not Status.NEW:
            raise OrderRefused(f"order {self.id} was placed before; a new order needs a new id")
        if not lines:
            raise OrderRefused(f"order {self.id} has no lines; order at least one article")
        self.record(
            OrderCreated(
                order_id=self.id, customer_id=customer_id, country=country, placed_at=placed_at, lines=tuple(lines)
            )
        )

    def cancel(self, reason: str, by: str = CUSTOMER) -> None:
        """Cancel the order: at once, or through Shipping if its parcel may be on its way. Repeating it is harmless.

        Raises `OrderRefused` for an order that was dispatched.
        """
        match self.status:
            case Status.PLACED:
                self.record(OrderCancelled(order_id=self.id, reason=reason, by=by))
            case Status.CONFIRMED:
                self.record(OrderCancellationRequested(order_id=self.id, reason=reason, by=by))
            case Status.CANCELLING | Status.CANCELLED:
                pass
            case Status.DISPATCHED:
                raise OrderRefused(f"order {self.id} is with the carrier and cannot be cancelled; ask for a return")
            case Status.NEW:
                raise OrderRefused(f"order {self.id} was never placed")

    # ---- news from other services --------------------------------------------------------

    def note_reserved(self) -> None:
        """Inventory has the goods."""
        if self.status is Status.PLACED and not self.reserved:
            self.record(OrderReserved(order_id=self.id))
            self._confirm_when_ready()

    def note_authorised(self) -> None:
        """Payment has the money."""
        if self.status is Status.PLACED and not self.authorised:
            self.record(OrderAuthorised(order_id=self.id))
            self._confirm_when_ready()

    def note_failed(self, reason: str, by: str) -> None:
        """Note that Inventory or Payment cannot do its part."""
        if self.status is Status.PLACED:
            self.record(OrderCancelled(order_id=self.id, reason=reason, by=by))
        elif self.status is not Status.CANCELLED:
            raise self._contradiction(f"{by} failed it ({reason})")

    def note_stopped(self) -> None:
        """Note that Shipping has stopped the parcel."""
        if self.status is Status.CANCELLING:
            self.record(OrderCancelled(order_id=self.id, reason=self.reason, by=self.by))
        elif self.status is not Status.CANCELLED:
            raise self._contradiction("its shipment was stopped")

    def note_dispatched(self) -> None:
        """Note that the carrier has the parcel."""
        if self.status is Status.CANCELLING:
            refusal = "the parcel was handed to the carrier before the request arrived"
            self.record(OrderCancellationRefused(order_id=self.id, reason=refusal))
        if self.status is Status.CONFIRMED:
            self.record(OrderDispatched(order_id=self.id))
        elif self.status is not Status.DISPATCHED:
            raise self._contradiction("its parcel was dispatched")

    def _confirm_when_ready(self) -> None:
        if self.reserved and self.authorised:
            self.record(OrderConfirmed(order_id=self.id))

    def _contradiction(self, told: str) -> OrderRefused:
        return OrderRefused(
            f"order {self.id} is {self.status}, and now {told}: two services disagree; look at its events"
        )

    # ---- how events change it ----------------------------------------------------------

    @evolves(OrderCreated)
    def _created(self, event: OrderCreated) -> None:
        self.status = Status.PLACED
        self.customer_id, self.country, self.placed_at = event.customer_id, event.country, event.placed_at
        self.lines = event.lines

    @evolves(OrderReserved)
    def _reserved(self, event: OrderReserved) -> None:
        self.reserved = True

    @evolves(OrderAuthorised)
    def _authorised(self, event: OrderAuthorised) -> None:
        self.authorised = True

    @evolves(OrderConfirmed)
    def _confirmed(self, event: OrderConfirmed) -> None:
        self.status = Status.CONFIRMED

    @evolves(OrderCancellationRequested)
    def _cancellation_requested(self, event: OrderCancellationRequested) -> None:
        self.status, self.reason, self.by = Status.CANCELLING, event.reason, event.by

    @evolves(OrderCancellationRefused)
    def _cancellation_refused(self, event: OrderCancellationRefused) -> None:
        self.status, self.reason, self.by = Status.CONFIRMED, "", ""

    @evolves(OrderCancelled)
    def _cancelled(self, event: OrderCancelled) -> None:
        self.status, self.reason, self.by = Status.CANCELLED, event.reason, event.by

    @evolves(OrderDispatched)
    def _dispatched(self, event: OrderDispatched) -> None:
        self.status = Status.DISPATCHED
