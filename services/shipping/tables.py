"""Shipping's own table, and the moves that a shipment can make."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from sqlalchemy import CheckConstraint, Column, MetaData, String, Table

__all__ = ["BEFORE", "State", "metadata", "shipments"]


class State(StrEnum):
    """The state of a parcel."""

    PREPARED = "prepared"
    """The label is printed. The order may still be cancelled."""
    PICKED = "picked"
    """Packed, waiting for the carrier."""
    DISPATCHED = "dispatched"
    STOPPED = "stopped"


BEFORE: Final = {
    State.PICKED: (State.PREPARED,),
    State.DISPATCHED: (State.PICKED,),
    State.STOPPED: (State.PREPARED, State.PICKED),
}
"""State to those from which it can be reached. No parcel is ever both dispatched and stopped."""

metadata = MetaData()

_STATES = ", ".join(f"'{state}'" for state in State)

shipments = Table(
    "shipments",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("country", String(64), nullable=False),
    CheckConstraint(f"state IN ({_STATES})", name="known_state"),
)
