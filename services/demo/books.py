"""Reads the services' databases and the gateway's ledger while the services run. It never writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from services.demo.invariants import Numbers
from services.inventory import inventory
from services.inventory.tables import stock
from services.payment import payment
from services.payment.gateway import open_sandbox
from services.payment.money import pounds
from services.payment.tables import State, payments
from services.sales import countries, sales
from services.shipping import shipping
from services.shipping.tables import shipments
from tidings import Report, Service

__all__ = ["Engines", "best_countries", "places", "read_books", "rows_of", "sales_of"]

Engines = Callable[[Service], AsyncEngine]
"""Something that has the services' databases open for reading."""


async def places(engines: Engines) -> tuple[int, int, int]:
    """Return the pieces on hand, reserved and shipped."""
    sums = (func.coalesce(func.sum(stock.c[place]), 0) for place in ("on_hand", "reserved", "shipped"))
    on_hand, reserved, shipped = (await rows_of(engines, inventory, select(*sums)))[0]
    return on_hand, reserved, shipped


async def read_books(engines: Engines, ledger: Path, report: Report) -> Numbers:
    """Read the numbers that the invariants need. Call it when everything is settled."""
    on_hand, reserved, shipped = await places(engines)
    is_open = payments.c.state == State.AUTHORISED
    held = await rows_of(engines, payment, select(func.coalesce(func.sum(payments.c.pence), 0)).where(is_open))
    parcels = await rows_of(
        engines, shipping, select(shipments.c.state, func.count().label("number")).group_by(shipments.c.state)
    )
    sold = await rows_of(engines, sales, select(func.coalesce(func.sum(countries.c.pence), 0)))
    async with open_sandbox(ledger) as gateway:
        entries = await gateway.ledger()
    moved: dict[str, Decimal] = defaultdict(Decimal)
    for entry in entries:
        moved[entry.operation] += entry.amount
    return Numbers(
        on_hand=on_hand,
        reserved=reserved,
        shipped=shipped,
        open=pounds(held[0][0]),
        ledger=moved,
        operations=len(entries),
        calls=sum(entry.calls for entry in entries),
        shipments={row.state: row.number for row in parcels},
        sales=pounds(sold[0][0]),
        dead=sum(service.dead_count for service in report.services),
        settled=report.ok,
    )


async def best_countries(engines: Engines, limit: int) -> list[tuple[str, int, Decimal]]:
    """Return country, sales and pounds, the best countries first."""
    rows = await rows_of(engines, sales, select(countries).order_by(countries.c.pence.desc()).limit(limit))
    return [(row.country, row.sales, pounds(row.pence)) for row in rows]


async def sales_of(engines: Engines, country: str) -> tuple[int, Decimal]:
    """Return the sales and pounds of one country."""
    for row in await rows_of(engines, sales, select(countries).where(countries.c.country == country)):
        return row.sales, pounds(row.pence)
    return 0, Decimal()


async def rows_of(engines: Engines, service: Service, query: Select[Any]) -> Sequence[Any]:
    """Return the rows of a query to one service's database."""
    async with engines(service).connect() as connection:
        rows: Sequence[Any] = (await connection.execute(query)).all()
        return rows
