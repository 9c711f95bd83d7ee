"""A few words for what tests do with the services in a world; and the services on files, for what a world cannot do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from services.order import Order, repository
from services.order.events import OrderLine
from services.payment.gateway import Entry, open_sandbox
from services.payment.service import PaymentSettings
from tidings import Event, Runtime, Service, Settings
from tidings.testing import World

PLACED_AT = datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
CUP = OrderLine(sku="CUP", description="RED CUP", quantity=2, unit_price=Decimal("2.55"))


OpenWorld = Callable[..., World]
"""See the fixture `open_world`."""


async def place(world: World, order_id: str, *lines: OrderLine, country: str = "France") -> None:
    """Place an order for these goods."""
    await world.change(repository, order_id, Order.place, lines or (CUP,), None, country, PLACED_AT)


async def tell(world: World, *events: Event) -> None:
    """Append events of other services, as the one that hears of them declares them, and wait until all is settled."""
    for event in events:
        await world.append("told", event)
    await world.settled()


async def types(world: World, stream: str | None = None) -> list[str]:
    """Return the types of all events, or of those of a stream, when all is settled."""
    await world.settled()
    return [event.type for event in world.events(stream=stream)]


async def rows(world: World, service: Service, table: Any) -> list[Any]:
    """Return the rows of a table in a service's database."""
    async with world.session(service) as session:
        return list(await session.execute(table.select()))


async def ledger() -> list[Entry]:
    """Return the gateway's ledger."""
    async with open_sandbox(PaymentSettings().ledger) as gateway:
        return await gateway.ledger()


@asynccontextmanager
async def on_files(folder: Path, *services: Service) -> AsyncIterator[Runtime]:
    """Run these services and a relay on the files in `folder`. Opened again, they continue where they were closed."""
    settings = Settings(
        store=f"sqlite:///{folder}/events.db",
        bus=f"memory://{folder.name}",
        database=f"sqlite:///{folder}/{{service}}.db",
    )
    async with Runtime(*services, settings=settings, relay=True) as runtime:
        yield runtime
