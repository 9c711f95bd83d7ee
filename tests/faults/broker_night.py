"""What befalls a broker in a bad night: with an operator's means it is starved, robbed, closed. It proves nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal
from urllib.parse import urlsplit
from uuid import uuid4

from pamqp import commands

from tests.faults.auditing import query
from tests.faults.stage import PATIENCE, Stage, now, until
from tidings import open_bus
from tidings.buses import Subscription
from tidings.buses.rabbitmq.address import address_of
from tidings.buses.rabbitmq.channel import Channel
from tidings.buses.rabbitmq.connection import Connection
from tidings.buses.rabbitmq.topology import EXCHANGE
from tidings.testing.brokers import RabbitMQNode

__all__ = [
    "User",
    "AUDIT",
    "answers_again",
    "configured",
    "consumers",
    "delete_exchange",
    "delete_queue",
    "first_effect",
    "has_leader",
    "messages",
    "starved",
    "unbind",
    "user",
    "vhost",
]

AUDIT: Final = Subscription("audit")
_ALARMS: Final = {
    "memory": ("vm_memory_monitor:set_vm_memory_high_watermark({})", "0.0000001", "0.8"),
    "disk": ("rabbit_disk_monitor:set_disk_free_limit({})", "900000000000000", "50000000"),
}


def vhost(url: str) -> str:
    return urlsplit(url).path[1:]


# ---- how the broker is ---------------------------------------------------------------------------------------------


async def answers_again(node: RabbitMQNode) -> float:
    """Start the broker. Return the moment at which its port accepted a client."""
    starting = asyncio.create_task(asyncio.to_thread(node.start))
    place = urlsplit(node.url)
    try:
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection(place.hostname, place.port)
                moment = now()
                writer.close()
                await writer.wait_closed()
                return moment
            await asyncio.sleep(0.01)
    finally:
        await starting


async def has_leader(node: RabbitMQNode, url: str, queue: str = AUDIT.queue) -> None:
    """Wait until a quorum queue in the vhost of `url` has a leader. Before that, a kill loses the queue, which is no
    concern of these tests (see `RabbitMQNode.kill`)."""
    name = f'rabbit_misc:r(<<"{vhost(url)}">>, queue, <<"{queue}">>)'
    code = f"element(1, ra:members(amqqueue:get_pid(element(2, rabbit_amqqueue:lookup({name})))))"
    deadline = now() + PATIENCE
    while not re.fullmatch(r"\{ok, ?ok\}", (await asyncio.to_thread(node.eval, code)).strip()):
        assert now() < deadline, f"queue {queue} has no leader"
        await asyncio.sleep(0.1)


async def messages(url: str) -> int:
    """Return the number of messages that wait in the service's queue and are not delivered."""
    return await _found(url, "messages")


async def consumers(url: str, count: int) -> None:
    """Wait until this many connections consume from the service's queue."""
    deadline = now() + PATIENCE
    while (found := await _found(url, "consumers")) != count:
        assert now() < deadline, f"{found} consumers, not {count}"
        await asyncio.sleep(0.1)


async def _found(url: str, what: Literal["messages", "consumers"]) -> int:
    async with open_bus(url) as bus:
        _, queue = await bus.inspect([AUDIT])
    return int(getattr(queue, what) or 0)


async def first_effect(stage: Stage, since: float, seconds: float = PATIENCE) -> float:
    """Return the seconds from a moment at which nothing could get through to the first effect after it."""

    def first() -> float | None:
        found = query(stage.database(), "SELECT min(handled) FROM audit WHERE handled > ?", since)
        return found[0][0] if found else None

    await until(lambda: first() is not None, "a first event is handled", seconds)
    handled = first()
    assert handled is not None
    return handled - since


# ---- what is done to it --------------------------------------------------------------------------------------------


@asynccontextmanager
async def _operator(url: str) -> AsyncIterator[Channel]:
    connection = await Connection.open(address_of(url), "tidings tests")
    try:
        yield await connection.channel()
    finally:
        await connection.close()


async def delete_queue(url: str) -> int:
    """Delete the service's queue with at least this many messages in it."""
    async with _operator(url) as channel:
        deleted = await channel.call(commands.Queue.Delete(queue=AUDIT.queue), commands.Queue.DeleteOk)
        return deleted.message_count or 0


async def delete_exchange(url: str) -> None:
    """Delete the exchange with all its bindings."""
    async with _operator(url) as channel:
        await channel.call(commands.Exchange.Delete(exchange=EXCHANGE), commands.Exchange.DeleteOk)


async def unbind(url: str) -> None:
    """Delete the binding: the service's queue stays and gets no more messages."""
    async with _operator(url) as channel:
        await channel.call(commands.Queue.Unbind(queue=AUDIT.queue, exchange=EXCHANGE), commands.Queue.UnbindOk)


@asynccontextmanager
async def starved(node: RabbitMQNode, of: Literal["memory", "disk"]) -> AsyncIterator[None]:
    """Raise an alarm: the broker blocks publishers, because it believes that memory or disk is short."""
    command, short, enough = _ALARMS[of]
    await asyncio.to_thread(node.eval, command.format(short))
    try:
        yield
    finally:
        await asyncio.to_thread(node.eval, command.format(enough))


@asynccontextmanager
async def configured(node: RabbitMQNode, **settings: int) -> AsyncIterator[None]:
    """Change settings of the broker for channels that are opened within the block."""

    async def put(name: str, value: int | None) -> None:
        change = f"unset_env(rabbit, {name})" if value is None else f"set_env(rabbit, {name}, {value})"
        # RabbitMQ 4 copies some of them at its start.
        copy = f"persistent_term:get({name}, none) =/= none andalso persistent_term:put({name}, {value})"
        await asyncio.to_thread(
            node.eval, f"application:{change}" if value is None else f"application:{change}, {copy}"
        )

    before = {name: await asyncio.to_thread(node.eval, f"application:get_env(rabbit, {name})") for name in settings}
    try:
        for name, value in settings.items():
            await put(name, value)
        yield
    finally:
        for name, said in before.items():
            was = re.search(r"\d+", said)
            await put(name, int(was[0]) if was else None)


class User:
    """A user of RabbitMQ. Get one from `user`."""

    def __init__(self, node: RabbitMQNode, url: str) -> None:
        self.name = f"user{uuid4().hex[:8]}"
        self._node = node
        self._vhost = vhost(url)

    async def _ask(self, function: str, *values: str) -> None:
        texts = ", ".join(f'<<"{value}">>' for value in (self.name, *values, "tests"))
        await asyncio.to_thread(self._node.eval, f"rabbit_auth_backend_internal:{function}({texts})")

    async def add(self, password: str) -> None:
        await self._ask("add_user", password)

    async def delete(self) -> None:
        await self._ask("delete_user")

    async def change_password(self, password: str) -> None:
        await self._ask("change_password", password)

    async def permit(self, pattern: str) -> None:
        """Grant the right to configure, write and read names that match."""
        await self._ask("set_permissions", self._vhost, *[pattern] * 3)

    async def cut_off(self, reason: str) -> None:
        """Close the user's connections. RabbitMQ checks password and rights only for new operations, so open
        connections would go on for a while."""
        await asyncio.to_thread(self._node.rabbitmqctl, "close_all_user_connections", self.name, reason)


@asynccontextmanager
async def user(node: RabbitMQNode, url: str, password: str) -> AsyncIterator[User]:
    """Create a user who may do everything in the vhost of `url`."""
    found = User(node, url)
    await found.add(password)
    try:
        await found.permit(".*")
        yield found
    finally:
        await found.delete()
