"""What goes wrong in a night of `make soak`: one function per fault, on the demo's processes. Nothing is proved here.

Each ends when its cause is gone: what was killed was started, what was paused resumed. How long it lasts, and whom it
meets, the night's own random numbers decide.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import Final, NamedTuple

from services.demo.fleet.processes import Child
from services.demo.fleet.scene import STORE, Scene
from services.inventory import inventory
from services.order import orders
from services.payment import payment
from services.shipping import shipping
from tidings.buses import Subscription

__all__ = ["FAULTS", "Fault", "Night"]

SHORT: Final = (1.0, 6.0)
LONG: Final = (6.0, 25.0)
"""Seconds that a fault lasts. The longer ones outlast heartbeats, deadlines and a takeover."""
RELAYS: Final = ("relay", "relay-2")
SERVICES: Final = (orders.name, inventory.name, payment.name, shipping.name)


@dataclass(slots=True)
class Night:
    """The processes that faults may hit, and the source of chance."""

    scene: Scene
    chance: random.Random

    def one_of(self, *names: str) -> Child:
        return self.scene.children[self.chance.choice(names)]

    def leader(self) -> Child:
        """Return the relay that led last. The other one is its standby, or about to be."""

        def led(name: str) -> str:
            lines = self.scene.children[name].log.read_text(encoding="utf-8", errors="replace").splitlines()
            times = [json.loads(line)["timestamp"] for line in lines if '"relay.leading"' in line]
            return max(times, default="")

        return self.scene.children[max(RELAYS, key=led)]

    async def lasts(self, seconds: tuple[float, float]) -> None:
        """Let a fault last about this many seconds."""
        await asyncio.sleep(self.chance.uniform(*seconds))


class Fault(NamedTuple):
    """A fault. `meets` names what it harms: two concurrent faults never harm the same thing."""

    name: str
    meets: str
    happen: Callable[[Night], Awaitable[None]]


async def _killed(night: Night, child: Child) -> None:
    await child.kill()
    await night.lasts(SHORT)
    await child.start()


@asynccontextmanager
async def _stopped(pid: int) -> AsyncIterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def _relay_killed(night: Night) -> None:
    await _killed(night, night.leader())


async def _both_relays_killed(night: Night) -> None:
    await asyncio.gather(*(_killed(night, night.scene.children[name]) for name in RELAYS))


async def _relay_paused(night: Night) -> None:
    async with _stopped(night.leader().pid):
        await night.lasts(LONG)


async def _service_killed(night: Night) -> None:
    await _killed(night, night.one_of(*SERVICES))


async def _active_and_standby_killed(night: Night) -> None:
    await asyncio.gather(*(_killed(night, night.scene.children[name]) for name in (payment.name, "payment-2")))


async def _service_paused(night: Night) -> None:
    async with _stopped(night.one_of(*SERVICES).pid):
        await night.lasts(LONG)


async def _database_locked(night: Night) -> None:
    file = night.scene.folder / f"{night.chance.choice(SERVICES)}.db"
    with closing(sqlite3.connect(file, isolation_level=None, timeout=10)) as tool:
        tool.execute("BEGIN IMMEDIATE")
        await night.lasts(LONG)
        tool.execute("ROLLBACK")


async def _store_killed(night: Night) -> None:
    await _killed(night, night.scene.children[STORE])


async def _store_paused(night: Night) -> None:
    async with _stopped(night.scene.children[STORE].pid):
        await night.lasts(LONG)


async def _broker_restarted(night: Night) -> None:
    await night.scene.broker.down()
    await night.scene.broker.up()


async def _broker_killed(night: Night) -> None:
    # RabbitMQ 3.10 writes its register of queues some time after one was made (see `RabbitMQNode.kill`).
    await night.scene.broker.run("eval", "[dets:sync(Table) || Table <- dets:all()]")
    await night.scene.broker.run("down", "--kill")
    await night.scene.broker.up()


async def _broker_paused(night: Night) -> None:
    await night.scene.broker.run("pause")
    try:
        await night.lasts(LONG)
    finally:
        await night.scene.broker.run("resume")


async def _connections_closed(night: Night) -> None:
    await night.scene.broker.run("ctl", "close_all_connections", "a fault of the night")


async def _queue_deleted(night: Night) -> None:
    await night.scene.broker.delete(Subscription(night.chance.choice(SERVICES)).queue)


async def _memory_alarm(night: Night) -> None:
    mark = "vm_memory_monitor:set_vm_memory_high_watermark({})"
    await night.scene.broker.run("eval", mark.format("0.0000001"))
    try:
        await night.lasts(LONG)
    finally:
        await night.scene.broker.run("eval", mark.format("0.8"))


FAULTS: Final = (
    Fault("relay killed", "relay", _relay_killed),
    Fault("relay and its standby killed", "relay", _both_relays_killed),
    Fault("relay paused", "relay", _relay_paused),
    Fault("service killed", "service", _service_killed),
    Fault("service and its standby killed", "service", _active_and_standby_killed),
    Fault("service paused", "service", _service_paused),
    Fault("service's database locked", "service", _database_locked),
    Fault("event store killed", "store", _store_killed),
    Fault("event store paused", "store", _store_paused),
    Fault("broker restarted", "broker", _broker_restarted),
    Fault("broker killed", "broker", _broker_killed),
    Fault("broker paused", "broker", _broker_paused),
    Fault("all connections closed by the broker", "broker", _connections_closed),
    Fault("queue deleted", "broker", _queue_deleted),
    Fault("broker out of memory", "broker", _memory_alarm),
)
