"""The stage that all acts of the demo share: the running services, the listener and the shop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from services.demo.customers import Customers
from services.demo.listener import Listener, listening, silence
from services.demo.screen import Screen
from services.demo.shop import InProcess, Shop
from services.demo.tally import Tally
from services.demo.warehouse import Warehouse
from services.inventory import inventory
from services.order import orders
from services.payment import payment
from services.shipping import shipping
from tidings import Runtime, Settings

__all__ = ["LEDGER", "Stage", "stage"]

LEDGER: Final = "gateway.db"
"""Name of the sandbox gateway's file in the demo's folder."""

PATIENCE: Final = 120.0
"""Seconds until the demo stops waiting and names what is not settled."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The running services, the listener and the shop. Get one from `stage`."""

    runtime: Runtime
    listener: Listener
    shop: Shop
    warehouse: Warehouse
    screen: Screen
    folder: Path
    data: Path

    @property
    def tally(self) -> Tally:
        """Return the tally of the log so far."""
        return self.listener.tally

    async def silence(self) -> None:
        """Wait until every event is settled in every service, and no customer reacts any more."""
        await silence(self.runtime.store, self.listener, partial(self.runtime.settled, timeout=PATIENCE))


@asynccontextmanager
async def stage(folder: Path, data: Path, screen: Screen) -> AsyncIterator[Stage]:
    """Run four services, the relay and a listener on the files in `folder`, which an earlier run may have left."""
    settings = Settings(
        store=f"sqlite:///{folder}/events.db", bus="memory://demo", database=f"sqlite:///{folder}/{{service}}.db"
    )
    shop = InProcess()
    async with (
        Runtime(orders, inventory, payment, shipping, settings=settings) as runtime,
        listening(runtime.store, Customers(shop)) as listener,
    ):
        yield Stage(runtime, listener, shop, Warehouse(runtime.store), screen, folder, data)
