"""The scene of the demo: the broker, the processes, the log and the databases. It starts them and can say what is not
settled; it breaks nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from services.demo.customers import Customers
from services.demo.fleet.broker import Broker, broker
from services.demo.fleet.processes import READY_WITHIN, Child, Fleet, environment, fleet, free_ports
from services.demo.fleet.shop import OverHttp, over_http
from services.demo.listener import Listener, listening, silence
from services.demo.stage import LEDGER, PATIENCE
from services.demo.warehouse import Warehouse
from services.inventory import inventory
from services.order import orders
from services.payment import payment
from services.sales import sales
from services.shipping import shipping
from tidings import EventStore, Report, Service, ServiceReport, Settings, open_bus, open_store, verify
from tidings.buses import EventBus, Subscription

__all__ = ["FOUR", "SALES", "STORE", "TARGETS", "Scene", "scene", "until"]

FOUR: Final = (orders, inventory, payment, shipping)
SALES: Final = sales
TARGETS: Final = {service.name: f"services.{service.name}:{service.name}" for service in (*FOUR, sales)} | {
    orders.name: "services.order:orders"
}
"""Service to its name on the command line."""
STORE: Final = "store"
"""Name of the process that serves the log, as EventStoreDB would."""
API: Final = "services.order.api:api"
"""Order runs inside its HTTP API."""


@dataclass(slots=True)
class Scene:
    """The broker, the processes and the databases of a demo. Get one from `scene`."""

    folder: Path
    broker: Broker
    fleet: Fleet
    store: EventStore
    bus: EventBus
    settings: Settings
    shop: OverHttp
    warehouse: Warehouse
    listener: Listener
    stack: AsyncExitStack
    options: Sequence[str] = ()
    """Options of the commands that run services."""
    received: int = 0
    """Number of articles that were delivered at the beginning."""
    children: dict[str, Child] = field(default_factory=dict)
    """Processes by name: store, relay, order, inventory, ..."""
    engines: dict[str, AsyncEngine] = field(default_factory=dict)
    """Engines of the services' databases, by name of the service."""

    def engine(self, service: Service) -> AsyncEngine:
        """Return an engine for reading a service's database while it runs."""
        return self.engines[service.name]

    async def start(self, name: str, *command: str, port: int, option: str = "--health") -> Child:
        """Start a command. Returns before it is ready."""
        child = await self.fleet.start(name, [*command, option, str(port)], port)
        self.children[name] = child
        return child

    async def start_service(self, service: Service, port: int) -> Child:
        """Start a service that has no HTTP API of its own."""
        return await self.start(service.name, "run", TARGETS[service.name], *self.options, port=port)

    async def ready(self) -> None:
        """Wait until all processes are ready."""
        await asyncio.gather(*(child.ready() for child in self.children.values()))

    async def all_listen(self) -> bool:
        """Return whether each of the four queues has a consumer."""
        found = await self.bus.inspect([Subscription(service.name) for service in FOUR])
        return sum(bool(thing.consumers) for thing in found) == len(FOUR)

    async def look_into(self, service: Service) -> None:
        """Open the database of a service that is ready."""
        engine = create_async_engine(f"sqlite+aiosqlite:///{self.folder}/{service.name}.db")
        self.stack.push_async_callback(engine.dispose)
        self.engines[service.name] = engine

    async def verify(self, *services: Service) -> Report:
        """Verify the current state of these services, or of all."""
        chosen = services or tuple(service for service in (*FOUR, SALES) if service.name in self.engines)
        return await verify(*chosen, settings=self.settings)

    async def unsettled(self, service: Service) -> ServiceReport:
        """Describe what is not settled in one service."""
        return (await self.verify(service)).services[0]

    async def silence(self) -> None:
        """Wait until every event is settled in every service, and no customer reacts any more."""
        await silence(self.store, self.listener, self._settled)

    async def _settled(self) -> None:
        report = await self.verify()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        while not report.ok:
            if loop.time() > deadline:
                raise TimeoutError(f"not settled after {PATIENCE:g} s:\n{report}")
            await asyncio.sleep(0.2)
            report = await self.verify()


@asynccontextmanager
async def scene(folder: Path, stock: dict[str, int], options: Sequence[str] = ()) -> AsyncIterator[Scene]:
    """Run a broker, an event store, the relay and four services for the duration of the block. When it begins, all are
    ready and the stock is in the log. `options` are added to the commands that run services.

    Raises `BrokerRefused`, `NotReady`, and `Died` if a process ends by itself.
    """
    async with AsyncExitStack() as stack:
        rabbitmq = await stack.enter_async_context(broker(folder / "rabbitmq"))
        log, relay, order, *others = free_ports(3 + len(FOUR[1:]))
        env = environment(folder, f"esdb://127.0.0.1:{log}?tls=false", rabbitmq.url, list(TARGETS.values()))
        processes = await stack.enter_async_context(fleet(folder, env))
        serving = ("server", "--db", str(folder / "events.db"), "--port", str(log))
        eventstore = await processes.start(STORE, serving, log, probed=False)
        await eventstore.ready()
        settings = Settings(
            store=env["TIDINGS_STORE"], bus=env["TIDINGS_BUS"], database=env["TIDINGS_DATABASE"], services=None
        )
        store = await stack.enter_async_context(open_store(settings.store))
        bus = await stack.enter_async_context(open_bus(settings.bus))
        shop = await stack.enter_async_context(over_http(order))
        listener = await stack.enter_async_context(listening(store, Customers(shop)))
        found = Scene(
            folder, rabbitmq, processes, store, bus, settings, shop, Warehouse(store), listener, stack, options
        )
        found.children[STORE] = eventstore
        await found.start(orders.name, "run", API, *options, port=order, option="--port")
        for service, port in zip(FOUR[1:], others, strict=True):
            await found.start_service(service, port)
        found.received = await found.warehouse.receive(stock)  # meanwhile: the log needs none of them
        # The relay last: its first marker then finds every queue, and no service waits for the next one.
        await until(found.all_listen, "each service consumes its queue", READY_WITHIN)
        await found.start("relay", "relay", port=relay)
        await found.ready()
        for service in FOUR:
            await found.look_into(service)
        yield found


async def until(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition that other processes bring about. Raises `TimeoutError`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not await condition():
        if loop.time() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        await asyncio.sleep(0.05)


def ledger(folder: Path) -> Path:
    """Return the path of the gateway's ledger."""
    return folder / LEDGER
