"""The JSON documents that the API reads and writes. They have no behaviour.

They are not the events: events are kept forever, these documents may change with the API. A new order is checked so
that every other service can store it: lengths and numbers fit their tables, and texts have no control characters.
"""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from hashlib import sha256
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from services.order.events import OrderLine
from services.order.order import Order, Status
from tidings import HistoryEntry, wire_name

__all__ = [
    "LINES",
    "Cancellation",
    "History",
    "HistoryEvent",
    "ListedStatus",
    "Moment",
    "Name",
    "NewOrder",
    "OrderDocument",
    "OrderPage",
    "OrderSummary",
    "Position",
    "Quoted",
]

LINES: Final = 800
"""Lines in one order. With all texts at their longest, the order still fits into one event."""
QUANTITY: Final = 100_000
"""Pieces in one line. The sum over the longest order still fits into 32 bits."""

_NO_CONTROLS: Final = r"^[^\x00-\x1f\x7f]*$"
_MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_PRICE: Final = r"^(0\.0[1-9]|0\.[1-9][0-9]?|[1-9][0-9]{0,5}(\.[0-9]{1,2})?)$"


def _moment(value: Any) -> Any:
    if not isinstance(value, str) or not _MOMENT.fullmatch(value):
        raise ValueError(
            "give a date and time with a zone (RFC 3339), such as 2010-12-01T08:26:00Z; in a URL '+' is %2B"
        )
    return value


def _number(value: Any) -> Any:
    if isinstance(value, str | bool):
        raise ValueError("give a number, not text")
    return value


def _price(value: Any) -> Decimal:
    if not isinstance(value, str) or not re.fullmatch(_PRICE[1:-1], value):
        raise ValueError('give pounds as text from "0.01" to "999999.99", such as "2.55": a float cannot hold it')
    return Decimal(value).quantize(Decimal("0.01"))


Name = Annotated[str, Field(min_length=1, max_length=64, pattern=_NO_CONTROLS)]
Moment = Annotated[AwareDatetime, BeforeValidator(_moment), WithJsonSchema({"type": "string", "format": "date-time"})]
Price = Annotated[
    Decimal, BeforeValidator(_price), WithJsonSchema({"type": "string", "pattern": _PRICE}, mode="validation")
]
ListedStatus = Literal["placed", "confirmed", "cancelling", "cancelled", "dispatched"]
Position = Annotated[int, Field(ge=0, le=2**53 - 1)]
"""A position in the log, limited to the integers that JavaScript can hold. No log reaches that."""
Quoted = Annotated[str, Field(pattern=r'^(\*|(W/)?"[!#-~]*"( *, *(W/)?"[!#-~]*")*)$')]
"""Pattern of the entity tags in If-Match (RFC 9110)."""

# ---- requests: a misspelt field is an error ---------------------------------------------


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NewLine(_Asked):
    """One article. Several lines may name the same one."""

    sku: Name
    description: Annotated[str, Field(max_length=200, pattern=_NO_CONTROLS)] = ""
    quantity: Annotated[int, Field(ge=1, le=QUANTITY), BeforeValidator(_number)]
    unit_price: Price
    """Pounds for one piece, as text."""


class NewOrder(_Asked):
    """An order that a customer places."""

    customer_id: Name | None = None
    """None for a guest."""
    country: Name
    lines: Annotated[list[NewLine], Field(min_length=1, max_length=LINES)]
    placed_at: Moment | None = None
    """When the customer ordered; by default now."""

    def order_lines(self) -> list[OrderLine]:
        """Return the lines as the event holds them."""
        return [OrderLine(**line.model_dump()) for line in self.lines]

    def fingerprint(self) -> str:
        """Return a text that is equal for two bodies with the same meaning, however they are written."""
        return sha256(self.model_dump_json().encode()).hexdigest()


class Cancellation(_Asked):
    """The reason for cancelling an order."""

    reason: Annotated[str, Field(min_length=1, max_length=200, pattern=_NO_CONTROLS)]


# ---- answers -----------------------------------------------------------------------------


class LineDocument(BaseModel):
    """One article of an order."""

    sku: str
    description: str
    quantity: int
    unit_price: Decimal
    amount: Decimal


class OrderDocument(BaseModel):
    """An order at one version. Amounts are pounds, as text."""

    id: str
    version: int
    status: Status
    customer_id: str | None
    country: str
    placed_at: datetime | None
    lines: list[LineDocument]
    total: Decimal
    reserved: bool
    """Inventory has reserved the goods."""
    authorised: bool
    """Payment has the money."""
    cancelled_by: str | None
    """Who cancelled it, or asked for it."""
    reason: str | None
    """Why."""

    @classmethod
    def of(cls, order: Order) -> Self:
        """Describe an order."""
        return cls(
            id=order.id,
            version=order.version,
            status=order.status,
            customer_id=order.customer_id,
            country=order.country,
            placed_at=order.placed_at,
            lines=[LineDocument(**line.model_dump(), amount=line.amount) for line in order.lines],
            total=order.total,
            reserved=order.reserved,
            authorised=order.authorised,
            cancelled_by=order.by or None,
            reason=order.reason or None,
        )


class HistoryEvent(BaseModel):
    """One event of an order: what, when, who and why."""

    version: int
    position: int
    """Position in the log."""
    type: str
    recorded_at: datetime
    data: dict[str, Any]
    actor: str | None
    reason: str | None
    correlation_id: str | None
    causation_id: str | None

    @classmethod
    def of(cls, entry: HistoryEntry) -> Self:
        """Describe an event of an order."""

        def text(value: object) -> str | None:
            return value if isinstance(value, str) else None  # other writers may put anything there

        return cls(
            version=entry.version,
            position=entry.position,
            type=wire_name(entry.event),
            recorded_at=entry.recorded_at,
            data=entry.event.model_dump(mode="json"),
            actor=text(entry.metadata.get("actor")),
            reason=text(entry.metadata.get("reason")),
            correlation_id=text(entry.correlation_id),
            causation_id=text(entry.causation_id),
        )


class History(BaseModel):
    """All events of an order, oldest first."""

    order_id: str
    events: list[HistoryEvent]


class OrderSummary(BaseModel):
    """An order in the list."""

    id: str
    status: ListedStatus
    customer_id: str | None
    country: str
    placed_at: str
    lines: int
    """Number of lines."""
    total: str
    """Pounds."""

    @classmethod
    def of(cls, row: Any) -> Self:
        """Describe a row of the list."""
        return cls(id=row.order_id, **{name: getattr(row, name) for name in cls.model_fields if name != "id"})


class OrderPage(BaseModel):
    """A page of orders, newest first."""

    orders: list[OrderSummary]
    next: str | None
    """The `cursor` of the next page; null on the last one."""
