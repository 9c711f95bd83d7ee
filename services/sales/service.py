"""The Sales service, the shortest of all: three events update one table.

The other services know nothing of it. A new service first reads the log from its beginning, and then goes on with new
events.
"""

from __future__ import annotations

from decimal import Decimal

from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings import Event, Service

__all__ = ["countries", "metadata", "sales"]


class OrderCreated(Event, key="order_id"):
    """Order: a customer ordered."""

    order_id: str
    country: str


class PaymentCaptured(Event, key="order_id"):
    """Payment: the money was taken."""

    order_id: str
    amount: Decimal


class PaymentRefunded(Event, key="order_id"):
    """Payment: the money was given back."""

    order_id: str
    amount: Decimal


metadata = MetaData()

orders = Table(
    "orders",
    metadata,
    Column("order_id", String(64), primary_key=True),
    Column("country", String(64), nullable=False),
)

countries = Table(
    "countries",
    metadata,
    Column("country", String(64), primary_key=True),
    Column("sales", Integer, nullable=False, default=0, comment="orders charged and not refunded"),
    Column("pence", BigInteger, nullable=False, default=0, comment="captured less refunded"),
)

sales = Service("sales", tables=metadata)


@sales.on(OrderCreated)
async def remember_country(event: OrderCreated, connection: AsyncConnection) -> None:
    """Note the country of an order: events of payments do not have it."""
    await connection.execute(insert(orders).values(order_id=event.order_id, country=event.country))


@sales.on(PaymentCaptured)
async def add(event: PaymentCaptured, connection: AsyncConnection) -> None:
    """Add a payment to its country."""
    await _count(connection, event.order_id, 1, event.amount)


@sales.on(PaymentRefunded)
async def subtract(event: PaymentRefunded, connection: AsyncConnection) -> None:
    """Subtract a refund from its country."""
    await _count(connection, event.order_id, -1, -event.amount)


async def _count(connection: AsyncConnection, order_id: str, number: int, amount: Decimal) -> None:
    country = (await connection.execute(select(orders.c.country).where(orders.c.order_id == order_id))).scalar_one()
    more = {"sales": countries.c.sales + number, "pence": countries.c.pence + int(amount * 100)}
    found = await connection.execute(update(countries).where(countries.c.country == country).values(more))
    if not found.rowcount:
        await connection.execute(insert(countries).values(country=country, sales=number, pence=int(amount * 100)))
