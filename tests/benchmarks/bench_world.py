"""A world of the four services: how fast it opens, and the order cascade beside the same handlers called directly.

    python -m tests.benchmarks.bench_world

The peer plays the cascade by hand (`tests/services/world.py`): a list for a log, and for each event a transaction in
memory around the handler, with no relay, no bus, no inbox and no rows of emitted events. Both make the same orders,
and the gateway's ledger is in memory.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from datetime import UTC, datetime
from decimal import Decimal
from statistics import median

from services.inventory import inventory
from services.inventory.events import GoodsReceived
from services.order import Order, orders
from services.order import service as order_service
from services.order.events import OrderDispatched, OrderLine
from services.payment import payment
from services.shipping import shipping
from tests.benchmarks.path import quiet, verdict
from tests.services.world import world as played
from tidings.testing import World

ORDERS, ROUNDS, FLOOR, OPEN = 20, 9, 1 / 3, 0.150
"""Orders of a round, rounds, the least ratio of speeds, and CPU seconds in which a world is to open."""

PLACED_AT = datetime(2010, 12, 1, tzinfo=UTC)
LINES = [OrderLine(sku="CUP", quantity=1, unit_price=Decimal("1.25"))]


async def place() -> None:
    for number in range(ORDERS):
        await order_service.repository.create(str(number), Order.place, LINES, None, "France", PLACED_AT)


async def directly() -> float:
    async with played() as shop:
        await shop.say("goods-CUP", GoodsReceived(sku="CUP", quantity=ORDERS))
        await shop.run_dry()
        began = time.perf_counter()
        await place()
        await shop.run_dry()
        took = time.perf_counter() - began
        assert [event.type for event in shop.store.log].count("OrderDispatched") == ORDERS
        return took


async def in_a_world() -> tuple[float, float]:
    """Measure opening, and the cascade."""
    began = time.process_time()
    async with World(orders, inventory, payment, shipping) as world:
        opened = time.process_time() - began
        await world.append("goods-CUP", GoodsReceived(sku="CUP", quantity=ORDERS))
        await world.settled()
        began = time.perf_counter()
        await place()
        await world.settled()
        took = time.perf_counter() - began
        assert len(world.events(of=OrderDispatched)) == ORDERS
        return opened, took


async def measure() -> int:
    opened, ours, peer = list[float](), list[float](), list[float]()
    for _ in range(ROUNDS + 1):
        peer.append(await directly())
        seconds, took = await in_a_world()
        opened.append(seconds)
        ours.append(took)
    missed = verdict("order cascade in a world / the same handlers called directly", ours[1:], peer[1:], FLOOR, ORDERS)
    middle = median(opened[1:])  # the first warms up
    late = middle > OPEN
    print(
        f"a world with four services opens in {1000 * middle:.0f} ms of CPU (at most 150) {'MISSED' if late else 'ok'}"
    )
    return int(missed or late)


def main() -> int:
    """Run the benchmark. Return exit status 1 when a floor is missed."""
    quiet()
    os.environ["PAYMENT_LEDGER"] = ":memory:"
    return asyncio.run(measure())


if __name__ == "__main__":
    sys.exit(main())
