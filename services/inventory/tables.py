"""Inventory's own tables. The rules that must always hold are constraints, so no code can break them.

Every piece that ever arrived is in exactly one place:  on hand + reserved + shipped = received + returned.
"""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, ForeignKey, Integer, MetaData, String, Table

__all__ = ["lines", "metadata", "reservations", "stock"]

metadata = MetaData()

_PLACES = ("on_hand", "reserved", "shipped", "received", "returned")

stock = Table(
    "stock",
    metadata,
    Column("sku", String(64), primary_key=True),
    Column("on_hand", Integer, nullable=False, default=0, comment="on the shelf, free to promise"),
    Column("reserved", Integer, nullable=False, default=0, comment="on the shelf, promised to an order"),
    Column("shipped", Integer, nullable=False, default=0, comment="gone, ever"),
    Column("received", Integer, nullable=False, default=0, comment="from suppliers, ever"),
    Column("returned", Integer, nullable=False, default=0, comment="from customers, ever"),
    *(CheckConstraint(f"{place} >= 0", name=f"{place}_not_negative") for place in _PLACES),
    CheckConstraint("on_hand + reserved + shipped = received + returned", name="every_piece_is_somewhere"),
)

reservations = Table(
    "reservations",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    CheckConstraint("state IN ('reserved', 'released', 'shipped')", name="known_state"),
)

lines = Table(
    "reservation_lines",
    metadata,
    Column("order_id", ForeignKey(reservations.c.order_id), primary_key=True),
    Column("sku", ForeignKey(stock.c.sku), primary_key=True),
    Column("quantity", Integer, CheckConstraint("quantity > 0"), nullable=False),
)
