"""Conversion between pounds, as people write them, and pence, as tables store them. Exact: no floats."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from typing import Final

__all__ = ["pence", "pounds", "to_the_penny"]

_PENNY: Final = Decimal("0.01")


def to_the_penny(amount: Decimal) -> Decimal:
    """Round pounds to pence, half a penny up, as on a receipt."""
    return amount.quantize(_PENNY, ROUND_HALF_UP)


def pence(amount: Decimal) -> int:
    """Convert pounds to pence. Raises `ValueError` if the amount is not a whole number of pence."""
    whole = int(amount * 100)
    if whole != amount * 100:
        raise ValueError(f"{amount} is not a whole number of pence; round it with to_the_penny() first")
    return whole


def pounds(pence: int) -> Decimal:
    """Convert pence to pounds."""
    return Decimal(pence).scaleb(-2)
