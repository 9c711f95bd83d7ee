"""What the services' databases and the gateway's ledger say, read beside the running services. It never writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from sqlalchemy import Select, func, select

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
from tidings import Runtime, Service
from tidings.verify import Report

__all__ = ["best_countries", "places", "read_books", "sales_of"]


async def places(runtime: Runtime) -> tuple[int, int, int]:
    """Pieces on hand, reserved and shipped."""
    sums = (func.coalesce(func.sum(stock.c[place]), 0) for place in ("on_hand", "reserved", "shipped"))
    on_hand, reserved, shipped = (await _rows(runtime, inventory, select(*sums)))[0]
    return on_hand, reserved, shipped


async def read_books(runtime: Runtime, ledger: Path, report: Report) -> Numbers:
    """Everything that the invariants need; call it when everything has settled."""
    on_hand, reserved, shipped = await places(runtime)
    is_open = payments.c.state == State.AUTHORISED
    held = await _rows(runtime, payment, select(func.coalesce(func.sum(payments.c.pence), 0)).where(is_open))
    parcels = await _rows(
        runtime, shipping, select(shipments.c.state, func.count().label("number")).group_by(shipments.c.state)
    )
    sold = await _rows(runtime, sales, select(func.coalesce(func.sum(countries.c.pence), 0)))
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


async def best_countries(runtime: Runtime, limit: int) -> list[tuple[str, int, Decimal]]:
    """Country, sales and pounds, the best first."""
    rows = await _rows(runtime, sales, select(countries).order_by(countries.c.pence.desc()).limit(limit))
    return [(row.country, row.sales, pounds(row.pence)) for row in rows]


async def sales_of(runtime: Runtime, country: str) -> tuple[int, Decimal]:
    """Sales and pounds of one country."""
    for row in await _rows(runtime, sales, select(countries).where(countries.c.country == country)):
        return row.sales, pounds(row.pence)
    return 0, Decimal()


async def _rows(runtime: Runtime, service: Service, query: Select[Any]) -> Sequence[Any]:
    async with runtime.engine(service).connect() as connection:
        rows: Sequence[Any] = (await connection.execute(query)).all()
        return rows
