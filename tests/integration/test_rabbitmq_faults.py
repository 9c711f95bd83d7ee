"""The RabbitMQ adapter over a broker that is restarted, killed, paused, starved, or run by a strict operator."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from tests.clients import adding, not_on_aio_pika
from tidings.adapters import open_bus
from tidings.buses import EventBus, Subscription
from tidings.errors import BusUnavailable, PublishRejected
from tidings.protocol.message import Message
from tidings.testing.brokers import RabbitMQNode
from tidings.testing.bus_conformance import PATIENCE, event, events, send_all, take

SERVICE = Subscription("inventory")
LIMIT = 1_048_576
"""Bytes of the largest message on this module's node, see `rabbitmq_node`."""

Logs = Sequence[MutableMapping[str, Any]]


async def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def vhost(url: str) -> str:
    return urlsplit(url).path[1:]


async def queued(bus: EventBus) -> list[str]:
    """Return the ids of all messages in the queue, in order, up to one that is sent behind them."""
    end = event(2**60)
    async with bus.publisher() as publisher:
        await publisher.send(end)
    found: list[str] = []
    async with bus.consume(SERVICE, prefetch=10_000) as consumer:
        while not found or found[-1] != end.message_id:
            found.append((await take(consumer, 1))[0].message.message_id)
    return found[:-1]


@asynccontextmanager
async def sending_without_end(bus: EventBus) -> AsyncIterator[tuple[list[Message], Callable[[], Awaitable[None]]]]:
    """Keep 256 sends in flight until the bus fails. Yields the confirmed ids, and a function that waits until all
    others have failed."""
    confirmed: list[Message] = []
    numbers = iter(range(1, 10**9))

    async def send(publisher: Any) -> None:
        while True:
            message = event(next(numbers))
            await publisher.send(message)
            confirmed.append(message)

    async with bus.publisher() as publisher:
        senders = [asyncio.create_task(send(publisher)) for _ in range(256)]

        async def all_ended() -> None:
            async with asyncio.timeout(PATIENCE):
                outcomes = await asyncio.gather(*senders, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {BusUnavailable}

        await until(lambda: len(confirmed) > 1_000)
        try:
            yield confirmed, all_ended
        finally:
            for sender in senders:
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_every_send_ends_when_the_broker_does_and_what_was_confirmed_is_there_afterwards(
    rabbitmq_node: RabbitMQNode, harmed_bus: str, how: str
) -> None:
    async with open_bus(harmed_bus) as bus:
        await bus.provision(SERVICE)
        async with sending_without_end(bus) as (confirmed, all_ended), bus.consume(SERVICE) as consumer:
            await take(consumer, 10)
            await asyncio.to_thread(getattr(rabbitmq_node, how))
            await all_ended()
            with pytest.raises(BusUnavailable):
                await take(consumer, 10_000)
        with pytest.raises(BusUnavailable):
            await bus.provision(SERVICE)
        await asyncio.to_thread(rabbitmq_node.start)
        await bus.provision(SERVICE)
        found = await queued(bus)
    assert {message.message_id for message in confirmed} <= set(found)
    begun = sorted(confirmed, key=lambda message: int(message.headers["tidings-position"]))
    in_order = [message.message_id for message in begun]
    assert [identifier for identifier in found if identifier in set(in_order)] == in_order


async def test_a_paused_broker_is_noticed_within_some_heartbeats_and_closing_does_not_hang(
    rabbitmq_node: RabbitMQNode, harmed_bus: str, client: str
) -> None:
    """aiormq gives it three heartbeats of a second more each, and does not say what it missed."""
    told, seconds = ("nothing was heard for 2 s", 4) if client == "pamqp" else ("the connection broke", 9)
    async with open_bus(adding(harmed_bus, "heartbeat=1")) as bus:
        await bus.provision(SERVICE)
        async with bus.publisher() as publisher, bus.consume(SERVICE) as consumer:
            waiting = asyncio.create_task(take(consumer, 1))
            await publisher.send(event(1))
            await waiting
            await asyncio.to_thread(rabbitmq_node.pause)
            try:
                began = time.monotonic()
                with pytest.raises(BusUnavailable, match=told):
                    await publisher.send(event(2))
                with pytest.raises(BusUnavailable, match=told):
                    await take(consumer, 1)
                assert time.monotonic() - began < seconds
            finally:
                await asyncio.to_thread(rabbitmq_node.resume)
        async with bus.publisher() as publisher:
            await publisher.send(event(3))


async def test_closing_while_the_broker_is_paused_takes_a_bounded_time(
    rabbitmq_node: RabbitMQNode, harmed_bus: str
) -> None:
    async with open_bus(harmed_bus) as bus:
        await bus.provision()
        try:
            async with bus.publisher():
                await asyncio.to_thread(rabbitmq_node.pause)
                began = time.monotonic()
            assert time.monotonic() - began < 5
        finally:
            await asyncio.to_thread(rabbitmq_node.resume)


async def test_a_connection_that_the_operator_closes_says_his_reason(
    rabbitmq_node: RabbitMQNode, harmed_bus: str
) -> None:
    async with open_bus(harmed_bus) as bus:
        await bus.provision(SERVICE)
        async with bus.consume(SERVICE) as consumer:
            waiting = asyncio.create_task(take(consumer, 1))
            command = ("close_all_connections", "--vhost", vhost(harmed_bus), "moving house")
            await asyncio.to_thread(rabbitmq_node.rabbitmqctl, *command)
            with pytest.raises(BusUnavailable, match=r"320 .*moving house"):
                await waiting


@asynccontextmanager
async def without_memory(node: RabbitMQNode) -> AsyncIterator[None]:
    """The broker's memory alarm is on."""
    await asyncio.to_thread(node.eval, "vm_memory_monitor:set_vm_memory_high_watermark(0.0000001)")
    try:
        async with asyncio.timeout(PATIENCE):
            while "memory" not in await asyncio.to_thread(node.eval, "rabbit_alarm:get_alarms()"):
                await asyncio.sleep(0.05)
        yield
    finally:
        await asyncio.to_thread(node.eval, "vm_memory_monitor:set_vm_memory_high_watermark(0.8)")


async def test_a_memory_alarm_holds_sends_back_and_lets_consumers_go_on(
    rabbitmq_node: RabbitMQNode, harmed_bus: str
) -> None:
    before, held_back = events(100), event(1_000)
    async with open_bus(harmed_bus) as bus:
        await bus.provision(SERVICE)
        async with bus.publisher() as publisher, bus.consume(SERVICE, prefetch=10) as consumer:
            await send_all(publisher, before)
            async with without_memory(rabbitmq_node):
                sending = asyncio.create_task(publisher.send(held_back))
                for message in before:
                    delivery = (await take(consumer, 1))[0]
                    assert delivery.message == message
                    consumer.settle_through(delivery.tag)
                assert not sending.done()
            async with asyncio.timeout(PATIENCE):
                await sending
            assert (await take(consumer, 1))[0].message == held_back


@not_on_aio_pika("aiormq tells its own log alone that the broker blocks a connection")
async def test_that_the_broker_blocks_a_connection_is_logged_with_its_reason(
    rabbitmq_node: RabbitMQNode, harmed_bus: str
) -> None:
    async with open_bus(harmed_bus) as bus:
        await bus.provision(SERVICE)
        async with bus.publisher() as publisher:
            with capture_logs() as logs:
                async with without_memory(rabbitmq_node):
                    sending = asyncio.create_task(publisher.send(event(1)))
                    await until(lambda: any(line["event"] == "bus.blocked" for line in logs), 10)
                await until(lambda: any(line["event"] == "bus.unblocked" for line in logs))
            await sending
    levels: Logs = [line for line in logs if line["event"] in ("bus.blocked", "bus.unblocked")]
    assert {line["log_level"] for line in levels} == {"warning"}
    assert "memory" in levels[0]["reason"]


async def test_a_message_that_is_too_large_is_rejected_and_the_others_are_to_be_sent_again(harmed_bus: str) -> None:
    large = event(500, data=b"x" * (LIMIT + 1))
    async with open_bus(harmed_bus) as bus:
        await bus.provision(SERVICE)
        async with bus.publisher() as publisher:
            with pytest.raises(PublishRejected, match=r"larger than .*Raise max_message_size") as raised:
                await publisher.send(large)
            assert raised.value.message_id == large.message_id
            with pytest.raises(BusUnavailable):
                await publisher.send(event(1))
        async with bus.publisher() as publisher, asyncio.timeout(PATIENCE):
            messages = [*events(50), large, *events(50)]
            outcomes = await asyncio.gather(*map(publisher.send, messages), return_exceptions=True)
        assert isinstance(outcomes[50], PublishRejected)
        assert {type(outcome) for outcome in outcomes[:50]} <= {type(None), BusUnavailable}
        assert {type(outcome) for outcome in outcomes[51:]} == {BusUnavailable}
        async with bus.publisher() as publisher:
            await publisher.send(event(1, data=b"x" * LIMIT))


async def test_users_with_no_more_rights_than_they_need_can_work(
    rabbitmq_node: RabbitMQNode, harmed_bus: str, client: str
) -> None:
    """The rights that a deployment grants: configure, write, read."""
    place = vhost(harmed_bus)

    def rights(user: str, *patterns: str) -> str:
        texts = ", ".join('<<"' + pattern.replace("\\", "\\\\") + '">>' for pattern in patterns)
        return f'rabbit_auth_backend_internal:set_permissions(<<"{user}">>, <<"{place}">>, {texts}, <<"test">>)'

    def add(user: str, *patterns: str) -> str:
        made = f'rabbit_auth_backend_internal:add_user(<<"{user}">>, <<"pass">>, <<"test">>), '
        return rabbitmq_node.eval(made + rights(user, *patterns))

    name = r"^tidings\.inventory(\..*)?$"
    relays = r"^tidings\.relay\..*"
    relaying, serving = f"relay-{client}", f"inventory-{client}"
    await asyncio.to_thread(add, relaying, relays, r"^tidings\.(events|relay\..*)$", relays)
    await asyncio.to_thread(add, serving, name, name, r"^tidings\.(events|partitions|inventory(\..*)?)$")
    host = harmed_bus.rpartition("@")[2]
    async with (
        open_bus(harmed_bus) as operator,
        open_bus(f"amqp://{relaying}:pass@{host}") as relay,
        open_bus(f"amqp://{serving}:pass@{host}") as service,
    ):
        with pytest.raises(BusUnavailable, match=r"403 .*tidings\.events.*set_permissions"):
            await relay.provision()
        await operator.provision()
        await relay.provision()
        await service.provision(SERVICE)
        with pytest.raises(BusUnavailable, match=r"403 .*tidings\.billing.*set_permissions"):
            await service.provision(Subscription("billing"))
        async with relay.publisher(lock="main") as publisher, service.consume(SERVICE) as consumer:
            await publisher.send(message := event(1))
            assert (await take(consumer, 1))[0].message == message
        await asyncio.to_thread(rabbitmq_node.eval, rights(relaying, "^$", "^$", "^$"))
        async with relay.publisher() as publisher:  # a channel that is busy remembers its old rights
            with pytest.raises(BusUnavailable, match=r"403 .*tidings\.events.*set_permissions"):
                await publisher.send(event(2))
        async with service.publisher() as publisher:
            with pytest.raises(BusUnavailable, match=r"403 .*tidings\.events.*set_permissions"):
                await publisher.send(event(3))
