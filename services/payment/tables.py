"""Payment's own table: what it believes about each order's money. The gateway's ledger is the gateway's."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from sqlalchemy import BigInteger, CheckConstraint, Column, MetaData, String, Table

__all__ = ["AFTER", "State", "metadata", "payments"]


class State(StrEnum):
    """Where the money of one order is."""

    AUTHORISED = "authorised"
    """Held, neither taken nor let go: open."""
    DECLINED = "declined"
    CAPTURED = "captured"
    VOIDED = "voided"
    REFUNDED = "refunded"


AFTER: Final = {
    State.CAPTURED: State.AUTHORISED,
    State.VOIDED: State.AUTHORISED,
    State.REFUNDED: State.CAPTURED,
}
"""What must have been before: money is let go only while held, given back only when taken."""

metadata = MetaData()

_STATES = ", ".join(f"'{state}'" for state in State)

payments = Table(
    "payments",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("pence", BigInteger, nullable=False, comment="whole pence: no database turns them into floats"),
    Column("authorisation", String(64), nullable=False, comment="the gateway's name for it; empty when declined"),
    CheckConstraint(f"state IN ({_STATES})", name="known_state"),
    CheckConstraint("pence > 0", name="amount_positive"),
)
