"""The stock on the shelves before the five days began. The file does not say, so the demo decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from services.importer import Invoice, Kind

__all__ = ["SCARCE", "SHARE", "SPARE", "opening_stock"]

SCARCE: Final = 10
"""Number of best sellers that are short."""
SHARE: Final = 70
"""Percentage of the demand that there is of each of them. Late customers get nothing, about 10 orders in 100."""
SPARE: Final = 5
"""Pieces of every other article beyond the demand."""


def opening_stock(found: Iterable[object]) -> dict[str, int]:
    """Return pieces per sku, computed from the importer's findings. The same file always gives the same stock."""
    demand: Counter[str] = Counter()
    for invoice in found:
        if isinstance(invoice, Invoice) and invoice.kind is Kind.ORDER:
            for goods in invoice.goods:
                demand[goods.sku] += goods.quantity
    best_sellers = sorted(demand, key=lambda sku: (-demand[sku], sku))[:SCARCE]
    stock = {sku: quantity + SPARE for sku, quantity in demand.items()}
    return stock | {sku: demand[sku] * SHARE // 100 for sku in best_sellers}
