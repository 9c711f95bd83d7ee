"""Shipping's own table, and the only moves that a shipment can make."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from sqlalchemy import CheckConstraint, Column, MetaData, String, Table

__all__ = ["BEFORE", "State", "metadata", "shipments"]


class State(StrEnum):
    """Where a parcel is."""

    PREPARED = "prepared"
    """Its label is printed; the order may still fail."""
    PICKED = "picked"
    """Packed, waiting for the carrier."""
    DISPATCHED = "dispatched"
    STOPPED = "stopped"


BEFORE: Final = {
    State.PICKED: (State.PREPARED,),
    State.DISPATCHED: (State.PICKED,),
    State.STOPPED: (State.PREPARED, State.PICKED),
}
"""From where each state can be reached. Two are ends: no parcel is ever both dispatched and stopped."""

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
