"""Sorts rows into orders, returns, and rows that are set aside with a reason. Pure: rows in, findings out, one by one.

Real data is dirty. Nothing is repaired and nothing is skipped silently: every row becomes part of an invoice or a
`SetAside`, and an invoice that loses all of its rows becomes a `Dropped`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum
from itertools import groupby
from operator import attrgetter
from typing import Final

from services.importer.rows import BrokenFile, Row

__all__ = ["NOT_GOODS", "Dropped", "Finding", "Goods", "Invoice", "Kind", "Reason", "SetAside", "invoices"]

NOT_GOODS: Final = frozenset({"POST", "DOT", "M", "D", "C2", "BANK CHARGES"})
"""Codes for postage, carriage, corrections, discounts and fees, which are not goods."""


class Kind(Enum):
    """The kind of an invoice."""

    ORDER = "order"
    RETURN = "return"
    """Its number begins with C. The file does not say to which order the goods belonged."""


class Reason(Enum):
    """Why a row is set aside: the first reason that applies."""

    NOT_GOODS = "not goods: postage, discount, fee or correction"
    ORDER_QUANTITY = "a quantity of zero or less in an order"
    RETURN_QUANTITY = "a quantity of zero or more in a return"
    PRICE = "a price of zero or less"


@dataclass(frozen=True, slots=True)
class Goods:
    """One line of an order or a return."""

    sku: str
    description: str
    quantity: int
    """Pieces, always positive: sold in an order, or returned."""
    price: Decimal
    """Pounds, for one piece."""


@dataclass(frozen=True, slots=True)
class Invoice:
    """An order or a return with all of its valid lines."""

    kind: Kind
    number: str
    """The number in the file. It becomes the order's id, so importing twice creates nothing twice."""
    date: datetime
    """Time of the first row: in the file, the rows of an invoice can differ by a minute."""
    customer: str | None
    country: str
    goods: tuple[Goods, ...]
    line: int
    """Line of the file on which it begins."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """A row that belongs to no invoice."""

    line: int
    invoice: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Dropped:
    """An invoice without a valid row."""

    kind: Kind
    number: str
    line: int


Finding = Invoice | SetAside | Dropped


def invoices(rows: Iterable[Row]) -> Iterator[Finding]:
    """Return the findings in the order of the rows; rows that are set aside come before their invoice.

    Holds one invoice at a time. Raises `BrokenFile` if the rows of an invoice are not together: its number is its
    identity, so the second part would be taken for an order that exists already, and be lost.
    """
    seen: set[str] = set()
    for number, group in groupby(rows, key=attrgetter("invoice")):
        together = list(group)
        if number in seen:
            raise BrokenFile(together[0].line, f"invoice {number} continues after others; sort the file by InvoiceNo")
        seen.add(number)
        yield from _sort_out(number, together)


def _sort_out(number: str, rows: list[Row]) -> Iterator[Finding]:
    kind = Kind.RETURN if number.startswith("C") else Kind.ORDER
    first, goods = rows[0], []
    for row in rows:
        reason = _objection(kind, row)
        if reason is None:
            goods.append(Goods(row.sku, row.description, abs(row.quantity), row.price))
        else:
            yield SetAside(row.line, number, reason)
    if goods:
        yield Invoice(kind, number, first.date, first.customer, first.country, tuple(goods), first.line)
    else:
        yield Dropped(kind, number, first.line)


def _objection(kind: Kind, row: Row) -> Reason | None:
    if row.sku in NOT_GOODS:
        return Reason.NOT_GOODS
    if kind is Kind.ORDER and row.quantity <= 0:
        return Reason.ORDER_QUANTITY
    if kind is Kind.RETURN and row.quantity >= 0:
        return Reason.RETURN_QUANTITY
    if row.price <= 0:
        return Reason.PRICE
    return None
