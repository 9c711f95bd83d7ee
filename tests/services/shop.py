"""The services on the embedded runtime, in a folder of the test's own; and a few words for what tests do with them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from services.order import Order, repository
from services.order.events import OrderLine
from services.payment.gateway import Entry, open_sandbox
from tidings import Event, Runtime, Service, Settings
from tidings.errors import StreamNotFound
from tidings.protocol.position import CARRIED
from tidings.testing import World

PLACED_AT = datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
CUP = OrderLine(sku="CUP", description="RED CUP", quantity=2, unit_price=Decimal("2.55"))


OpenShop = Callable[..., AbstractAsyncContextManager["Shop"]]
"""See the fixture `open_shop`."""
OpenWorld = Callable[..., World]
"""See the fixture `open_world`."""


class Shop:
    """Running services. Get them from the fixture `open_shop`."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self.folder = folder
        self.runtime = runtime
        self.expects_dead = False
        """Whether dead letters are expected. Otherwise, one makes the test fail."""

    async def place(self, order_id: str, *lines: OrderLine, country: str = "France") -> None:
        """Place an order for these goods."""
        await repository.create(order_id, Order.place, lines or (CUP,), None, country, PLACED_AT)

    async def tell(self, service: Service, *events: Event) -> None:
        """Append events of other services, as this service declares them, and wait until everything is settled."""
        for event in events:
            await service.append("told", event)
        await self.runtime.settled()

    async def stream(self, stream: str) -> list[str]:
        """Return the types of a stream's events."""
        try:
            return [event.type async for event in self.runtime.store.read_stream(stream)]
        except StreamNotFound:
            return []

    async def log(self) -> list[str]:
        """Return the types of all events of services."""
        return [event.type async for event in self.runtime.store.read_all(filter=CARRIED)]

    async def rows(self, service: Service, table: Any) -> list[Any]:
        """Return the rows of a table in a service's database."""
        async with self.runtime.engine(service).connect() as connection:
            return list(await connection.execute(table.select()))

    async def ledger(self) -> list[Entry]:
        """Return the gateway's ledger."""
        async with open_sandbox(self.folder / "gateway.db") as gateway:
            return await gateway.ledger()

    async def reasons(self) -> list[str]:
        """Return the reasons of dead letters."""
        return [letter.reason for part in (await self.runtime.verify()).services for letter in part.dead]


@asynccontextmanager
async def shop(folder: Path, *services: Service, bus: str | None = None) -> AsyncIterator[Shop]:
    """Run these services and a relay on the files in `folder`."""
    settings = Settings(
        store=f"sqlite:///{folder}/events.db",
        bus=bus or f"memory://{folder.name}",
        database=f"sqlite:///{folder}/{{service}}.db",
    )
    async with Runtime(*services, settings=settings, relay=True) as runtime:
        opened = Shop(folder, runtime)
        yield opened
        assert opened.expects_dead or await opened.reasons() == []
