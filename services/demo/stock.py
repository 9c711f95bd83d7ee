"""How much lay on the shelves before the five days began. The real file does not say, so the demo decides it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from services.importer import Invoice, Kind

__all__ = ["SCARCE", "SHARE", "SPARE", "opening_stock"]

SCARCE: Final = 10
"""So many best sellers come short ..."""
SHARE: Final = 70
"""... with this percentage of what will be asked for. Whoever orders late goes without, some 10 orders in 100."""
SPARE: Final = 5
"""Pieces of everything else beyond what will be asked for."""


def opening_stock(found: Iterable[object]) -> dict[str, int]:
    """Pieces per sku, from the importer's findings; the same for the same file."""
    demand: Counter[str] = Counter()
    for invoice in found:
        if isinstance(invoice, Invoice) and invoice.kind is Kind.ORDER:
            for goods in invoice.goods:
                demand[goods.sku] += goods.quantity
    best_sellers = sorted(demand, key=lambda sku: (-demand[sku], sku))[:SCARCE]
    stock = {sku: quantity + SPARE for sku, quantity in demand.items()}
    return stock | {sku: demand[sku] * SHARE // 100 for sku in best_sellers}
