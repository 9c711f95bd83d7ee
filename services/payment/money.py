"""Pounds as people write them, pence as tables store them. Exact in both directions: no floats."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Final

__all__ = ["pence", "pounds", "to_the_penny"]

_PENNY: Final = Decimal("0.01")


def to_the_penny(amount: Decimal) -> Decimal:
    """Rounded as on a receipt: half a penny goes up."""
    return amount.quantize(_PENNY, ROUND_HALF_UP)


def pence(amount: Decimal) -> int:
    """Raises `ValueError` for an amount that is no whole number of pence."""
    whole = int(amount * 100)
    if whole != amount * 100:
        raise ValueError(f"{amount} is no whole number of pence; round it with to_the_penny() first")
    return whole


def pounds(pence: int) -> Decimal:
    return Decimal(pence).scaleb(-2)
