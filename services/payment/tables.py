"""Payment's own table: the state of each order's money. The gateway keeps its own ledger."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from sqlalchemy import BigInteger, CheckConstraint, Column, MetaData, String, Table

__all__ = ["AFTER", "State", "metadata", "payments"]


class State(StrEnum):
    """The state of one order's payment."""

    AUTHORISED = "authorised"
    """Held, and neither captured nor voided yet."""
    DECLINED = "declined"
    CAPTURED = "captured"
    VOIDED = "voided"
    REFUNDED = "refunded"


AFTER: Final = {
    State.CAPTURED: State.AUTHORISED,
    State.VOIDED: State.AUTHORISED,
    State.REFUNDED: State.CAPTURED,
}
"""State to the one before it: only held money can be released, only captured money refunded."""

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
