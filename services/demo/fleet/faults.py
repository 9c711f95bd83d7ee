"""The faults during the trade, one after the other, and how long recovery took.

Each fault must have an effect: it waits until orders were accepted, events were left waiting, or requests were lost
because of it. A fault that nobody notices proves nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final, NamedTuple

from services.demo.beside import beside
from services.demo.fleet.processes import free_ports
from services.demo.fleet.scene import SALES, STORE, Scene, until
from services.demo.fleet.traffic import Traffic
from services.demo.screen import Screen
from services.inventory import inventory
from services.order import orders
from services.payment import payment
from services.shipping import shipping
from tidings.buses import Subscription

__all__ = ["ACTS", "ENOUGH", "Act", "disturb"]

FEW: Final = 3
"""Invoices, at least, that arrive right before each act, and again as many during it."""
WITHIN: Final = 120.0
"""Seconds from a fault until everything must be ready again. Then the demo gives up."""
TRICKLE: Final = 1.0
"""Seconds from one invoice to the next while something is broken: customers go on ordering."""


class Act(NamedTuple):
    """One fault. `happen` yields sentences about its progress. When it ends, everything runs again, but may not be
    ready."""

    title: str
    happen: Callable[[Scene, Traffic], AsyncIterator[str]]


async def _store_dies(scene: Scene, traffic: Traffic) -> AsyncIterator[str]:
    store, before = scene.children[STORE], scene.shop.asked_again
    pid = store.pid
    await store.kill()

    async def noticed() -> bool:
        return scene.shop.asked_again > before

    await until(noticed, "a request that could not be answered without the log")
    yield f"Process {pid} is dead, and nobody can order. Customers repeat their requests with the same key."
    await store.start()
    yield f"Started again as process {store.pid}."


async def _relay_dies(scene: Scene, traffic: Traffic) -> AsyncIterator[str]:
    relay = scene.children["relay"]
    pid, before = relay.pid, traffic.done
    await relay.kill()
    await traffic.reached(before + 1)
    yield f"Process {pid} is dead. Invoices taken in meanwhile, into the log: {traffic.done - before}."
    await relay.start()
    yield f"Started again as process {relay.pid}."


async def _services_die(scene: Scene, traffic: Traffic) -> AsyncIterator[str]:
    both = (inventory, payment)
    pids = [scene.children[service.name].pid for service in both]
    await asyncio.gather(*(scene.children[service.name].kill() for service in both))
    waiting: dict[str, int] = {}

    async def all_wait() -> bool:
        for service in both:
            waiting[service.name] = (await scene.unsettled(service)).pending_count
        return all(waiting.values())

    await until(all_wait, "events that wait for the dead services")
    events = " and ".join(f"{number} for {name}" for name, number in waiting.items())
    yield f"Processes {pids[0]} and {pids[1]} are dead. Events wait: {events}."
    for service in both:
        await scene.children[service.name].start()
    yield f"Started again as processes {' and '.join(str(scene.children[service.name].pid) for service in both)}."


async def _broker_restarts(scene: Scene, traffic: Traffic) -> AsyncIterator[str]:
    before = traffic.done
    await scene.broker.down()
    await traffic.reached(before + 1)
    yield f"It is down. Invoices taken in meanwhile, into the log: {traffic.done - before}."
    await scene.broker.up()
    yield "It is up again."


async def _queue_is_deleted(scene: Scene, traffic: Traffic) -> AsyncIterator[str]:
    queue = Subscription(shipping.name).queue
    await scene.children[shipping.name].kill()  # so that the queue fills

    async def fills() -> bool:
        found = await scene.bus.inspect([Subscription(shipping.name)])
        return any(thing.name == queue and thing.messages for thing in found)

    await until(fills, f"messages in queue {queue}")
    lost = await scene.broker.delete(queue)
    if not lost:
        raise TimeoutError(f"queue {queue} was deleted, but it was empty, so nothing was tested")
    yield f"Shipping was killed, so that its queue filled; then it was deleted with {lost} messages, which are lost."
    await scene.children[shipping.name].start()
    yield f"Started again as process {scene.children[shipping.name].pid}, it reads what was lost from the log."


async def _api_dies(scene: Scene, traffic: Traffic) -> AsyncIterator[str]:
    order, before = scene.children[orders.name], scene.shop.asked_again
    pid = order.pid
    await traffic.reached(traffic.done + 1)  # others are in the middle of it then
    await order.kill()

    async def noticed() -> bool:
        return scene.shop.asked_again > before

    await until(noticed, "a request that was lost with the API")
    yield f"Process {pid} is dead in the middle of requests. Customers repeat them, with the same key."
    await order.start()
    yield f"Started again as process {order.pid}."


async def _sales_joins(scene: Scene, traffic: Traffic) -> AsyncIterator[str]:
    sales = await scene.start_service(SALES, free_ports(1)[0])
    yield f"Process {sales.pid} is sales, new here: {scene.listener.tally.events:,} events wait for it."


ACTS: Final = (
    Act("The event store is killed (SIGKILL)", _store_dies),
    Act("The relay is killed (SIGKILL)", _relay_dies),
    Act("Inventory and Payment are killed (SIGKILL)", _services_die),
    Act("RabbitMQ is restarted", _broker_restarts),
    Act("Shipping's queue is deleted", _queue_is_deleted),
    Act("Order and its HTTP API are killed (SIGKILL)", _api_dies),
    Act("A fifth service joins", _sales_joins),
)
ENOUGH: Final = 3 * FEW * len(ACTS)
"""Invoices that a file must have, so that there are some during each act."""


async def disturb(scene: Scene, traffic: Traffic, screen: Screen, clock: Callable[[], float] = time.monotonic) -> None:
    """Run one act after the other while orders arrive. Raises `TimeoutError` if a fault had no effect, and `NotReady`.

    Some invoices arrive right before each act, so that their events are in flight, and as many during it; then they
    trickle in until everything is ready again, as long as enough are left for the acts to come.
    """
    some = traffic.total // (3 * len(ACTS))
    for number, act in enumerate(ACTS, 1):
        await traffic.go_on(traffic.done + some)
        await traffic.reached(traffic.limit)
        screen.line(f"\n{number}. {act.title}, with {traffic.done} of {traffic.total} invoices taken in.")
        await traffic.go_on(traffic.limit + some)
        began, kept = clock(), 3 * some * (len(ACTS) - number)
        try:
            async with asyncio.timeout(WITHIN), beside(_trickle(traffic, traffic.total - kept)):
                async for sentence in act.happen(scene, traffic):
                    screen.line(f"   {sentence}")
                await scene.ready()
        except TimeoutError as error:
            raise TimeoutError(f"{act.title}: {error or f'not over after {WITHIN:g} s'}") from None
        screen.line(f"   All processes were ready {clock() - began:.1f} s after it.")
        await traffic.reached(traffic.limit)


async def _trickle(traffic: Traffic, upto: int) -> None:
    while True:
        await asyncio.sleep(TRICKLE)
        if traffic.limit < upto:
            await traffic.go_on(traffic.limit + 1)
