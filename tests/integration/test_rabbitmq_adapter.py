"""The RabbitMQ adapter meets what a broker, its operator and foreign publishers can do to it (no broker is harmed)."""

from __future__ import annotations

import asyncio
import datetime
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import aiormq
import pytest
from aiormq import spec
from pamqp import frame
from structlog.testing import capture_logs

from tests.clients import not_on_aio_pika, through
from tests.faults.proxy import Proxy
from tidings import EventData, Relay, open_store
from tidings.adapters import open_bus
from tidings.buses import Subscription
from tidings.buses.rabbitmq.address import address_of
from tidings.buses.rabbitmq.connection import Connection
from tidings.buses.rabbitmq.topology import EXCHANGE, QUEUE_BYTES
from tidings.errors import BusUnavailable, MalformedMessage, PublishRejected, QueueRefused, TopologyMismatch
from tidings.protocol.message import MARKER, Message, decode
from tidings.relay.checkpoints import read_last
from tidings.testing.bus_conformance import PATIENCE, event, events, send_all, take

SERVICE = Subscription("inventory")
NEEDED: dict[str, Any] = {
    "x-queue-type": "quorum",
    "x-single-active-consumer": True,
    "x-overflow": "drop-head",
    "x-max-length-bytes": QUEUE_BYTES,
}


@asynccontextmanager
async def another_client(url: str) -> AsyncIterator[aiormq.abc.AbstractChannel]:
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel()
    finally:
        await connection.close()


@asynccontextmanager
async def running(relay: Relay) -> AsyncIterator[None]:
    task = asyncio.create_task(relay.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", f":{password}@")


# ---- connecting --------------------------------------------------------------------------


async def test_a_wrong_password_says_whom_was_refused_and_never_the_password(bus_url: str) -> None:
    async with open_bus(with_password(bus_url, "wr0ng")) as bus:
        with pytest.raises(BusUnavailable, match=r"403 ACCESS_REFUSED.*Check user and password") as raised:
            await bus.provision()
    assert "wr0ng" not in f"{raised.value} {raised.value.__cause__}"


async def test_an_unknown_vhost_says_how_to_make_it(amqp_url: str, client: str) -> None:
    async with open_bus(through(f"{amqp_url}-nope", client)) as bus:
        with pytest.raises(BusUnavailable, match=r"vhost .*-nope.*rabbitmqctl add_vhost \S+-nope"):
            await bus.provision()


async def test_a_refused_connection_says_where(client: str) -> None:
    async with open_bus(through("amqp://127.0.0.1:1/", client)) as bus:
        with pytest.raises(BusUnavailable, match=r"127\.0\.0\.1:1"):
            async with bus.publisher():
                pass


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x01\x00\x00", b"", b"\x01" * 64])
async def test_what_is_no_rabbitmq_is_unavailable(greeting: bytes, client: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(8)
        writer.write(greeting)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with open_bus(through(f"amqp://127.0.0.1:{port}/", client)) as bus, asyncio.timeout(PATIENCE):
            with pytest.raises(BusUnavailable):
                await bus.provision()


async def test_a_network_that_delivers_single_bytes_changes_nothing(amqp_url: str, client: str) -> None:
    async with Proxy(amqp_url) as network, open_bus(through(network.url, client)) as bus:
        network.piece = 1
        await bus.provision(SERVICE)
        messages = events(20)
        async with bus.publisher(lock="main") as publisher:
            await send_all(publisher, messages)
        async with bus.consume(SERVICE) as consumer:
            assert [delivery.message for delivery in await take(consumer, 20)] == messages


async def test_a_hundred_reconnects_leave_nothing_behind(bus_url: str) -> None:
    async with open_bus(bus_url) as bus:
        await bus.provision(SERVICE)
        tasks, files = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
        for number in range(1, 101):
            async with bus.publisher(lock="main") as publisher, bus.consume(SERVICE) as consumer:
                await publisher.send(message := event(number))
                delivery = (await take(consumer, 1))[0]
                assert delivery.message == message
                consumer.settle_through(delivery.tag)
        async with asyncio.timeout(20):  # aiormq's tasks end a moment after their connection
            while len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) <= files
        async with another_client(bus_url) as channel:
            declared = await channel.queue_declare(SERVICE.queue, passive=True)
        assert (declared.consumer_count, declared.message_count) == (0, 0)


# ---- topology ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"x-queue-type": "classic"}, r"x-queue-type is classic, but must be quorum"),
        ({"x-single-active-consumer": None}, r"x-single-active-consumer is none, but must be true"),
        ({"x-overflow": "reject-publish"}, r"x-overflow is reject-publish, but must be drop-head"),
    ],
)
async def test_a_queue_that_differs_is_named_with_what_to_do(bus_url: str, changed: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {name: value for name, value in (NEEDED | changed).items() if value is not None}
    async with another_client(bus_url) as channel:
        await channel.queue_declare(SERVICE.queue, durable=True, arguments=arguments)
    async with open_bus(bus_url) as bus:
        with pytest.raises(TopologyMismatch, match=named) as raised:
            await bus.provision(SERVICE)
    assert f"rabbitmqctl delete_queue {SERVICE.queue} --vhost" in str(raised.value)


async def test_an_exchange_that_differs_is_named(bus_url: str) -> None:
    async with another_client(bus_url) as channel:
        await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
    async with open_bus(bus_url) as bus:
        with pytest.raises(
            TopologyMismatch, match=r"exchange 'tidings\.events'.* its type is topic, but must be fanout"
        ):
            await bus.provision()


async def test_a_queue_that_somebody_holds_for_himself_is_named(bus_url: str) -> None:
    async with another_client(bus_url) as channel, open_bus(bus_url) as bus:
        await channel.queue_declare(SERVICE.queue, exclusive=True)
        with pytest.raises(TopologyMismatch, match="exclusive"):
            await bus.provision(SERVICE)


async def test_a_lock_whose_queue_is_none_is_named(bus_url: str) -> None:
    async with another_client(bus_url) as channel, open_bus(bus_url) as bus:
        await channel.queue_declare("tidings.relay.main", durable=True)
        with pytest.raises(TopologyMismatch, match="is no lock"):
            async with bus.publisher(lock="main"):
                pass


@pytest.mark.parametrize(("limit", "found"), [(2_000, "2000"), (None, "none")])
async def test_another_length_limit_is_accepted_with_a_warning(bus_url: str, limit: int | None, found: str) -> None:
    arguments: dict[str, Any] = {
        name: value for name, value in (NEEDED | {"x-max-length-bytes": limit}).items() if value is not None
    }
    async with another_client(bus_url) as channel:
        await channel.queue_declare(SERVICE.queue, durable=True, arguments=arguments)
    async with open_bus(bus_url) as bus:
        with capture_logs() as logs:
            await bus.provision(SERVICE)
        assert [line["found"] for line in logs if line["event"] == "bus.queue_limit_differs"] == [found]
        messages = [event(number, data=b"x" * 900) for number in range(1, 6)]
        async with bus.publisher() as publisher:
            await send_all(publisher, messages, window=1)
        kept = messages if limit is None else messages[-2:]
        async with bus.consume(SERVICE) as consumer:
            assert [delivery.message for delivery in await take(consumer, len(kept))] == kept


async def test_a_missing_exchange_says_what_makes_it(bus_url: str) -> None:
    async with open_bus(bus_url) as bus, bus.publisher() as publisher:
        with pytest.raises(BusUnavailable, match=r"404 .*tidings\.events.*anew by themselves"):
            await publisher.send(event(1))


# ---- messages ----------------------------------------------------------------------------


async def make_full_queue(channel: aiormq.abc.AbstractChannel) -> None:
    """A queue that takes one message and rejects every further one with a negative confirm."""
    await channel.queue_declare("full", durable=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    await channel.queue_bind("full", EXCHANGE)


async def test_a_negative_confirm_says_how_to_find_the_queue(bus_url: str) -> None:
    async with open_bus(bus_url) as bus, another_client(bus_url) as channel:
        await bus.provision()
        await make_full_queue(channel)
        async with bus.publisher() as publisher:
            await publisher.send(event(1))
            with pytest.raises(QueueRefused, match=r"a queue refuses messages\. .*rabbitmqctl list_bindings --vhost"):
                await publisher.send(event(2))
            await channel.queue_purge("full")
            await publisher.send(event(2))


async def test_a_relay_goes_on_for_the_others_however_often_a_queue_refuses(bus_url: str) -> None:
    async with (
        open_store(f"memory://{uuid4()}") as store,
        open_bus(bus_url) as bus,
        another_client(bus_url) as channel,
    ):
        for _ in range(50):
            await store.append("one", [EventData("Thing", b"{}")])
        await bus.provision(SERVICE)
        await make_full_queue(channel)
        relay = Relay(store, bus, marker_seconds=0.1, checkpoint_seconds=0.01)
        with capture_logs() as logs:
            async with asyncio.timeout(PATIENCE), running(relay):
                while await relay.checkpoint() < 50:
                    await asyncio.sleep(0.005)
                await channel.queue_delete("full")
                while relay.refusals.told is not None:
                    await asyncio.sleep(0.005)
                while (await read_last(store, "main")).refusing is not None:
                    await asyncio.sleep(0.005)
        events = [line["event"] for line in logs]
        assert events.count("relay.queue_refuses") == 1, "not once for each message"
        assert "relay.queues_take_all" in events
        assert not {"relay.left_out", "relay.interrupted"} & set(events)
        async with bus.consume(SERVICE) as consumer, asyncio.timeout(PATIENCE):
            versions: list[int] = []
            while len(versions) < 50:
                message = (await anext(aiter(consumer))).message
                if message.type != MARKER:
                    versions.append(decode(message).event.version)
        assert versions == list(range(50)), "each once, in order"


@pytest.mark.parametrize(
    "headers",
    [{"tidings-metadata": b"x" * 200_000}, {"n": 2**64}, {"text": "\ud800"}, {"object": object()}],
    ids=["too long for a frame", "no 64-bit integer", "no unicode", "no AMQP type"],
)
async def test_what_amqp_cannot_hold_is_rejected_and_harms_no_other(bus_url: str, headers: dict[str, Any]) -> None:
    async with open_bus(bus_url) as bus:
        await bus.provision(SERVICE)
        async with bus.publisher() as publisher, bus.consume(SERVICE) as consumer:
            with pytest.raises(PublishRejected, match="cannot be written as AMQP"):
                await publisher.send(Message(body=b"", message_id="odd", type="Odd", headers=headers))
            await publisher.send(message := event(1))
            assert (await take(consumer, 1))[0].message == message


async def test_foreign_messages_come_through_with_empty_fields(bus_url: str) -> None:
    odd: dict[str, Any] = {
        "when": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        "price": Decimal("1.5"),
        "table": {"a": [1, {"b": None}]},
        "none": None,
        "yes": True,
        "float": 0.5,
        "tidings-position": [7],
        "cloudEvents_subject": {"a": 1},
    }
    async with open_bus(bus_url) as bus, another_client(bus_url) as channel:
        await bus.provision(SERVICE)
        await channel.basic_publish(b"bare", exchange=EXCHANGE, properties=spec.Basic.Properties())
        await channel.basic_publish(
            b"odd", exchange=EXCHANGE, properties=spec.Basic.Properties(headers=odd, content_type="text/plain")
        )
        async with bus.consume(SERVICE) as consumer:
            bare, foreign = (delivery.message for delivery in await take(consumer, 2))
    assert (bare.body, bare.type, bare.content_type, bare.headers, bare.bucket) == (b"bare", "", "", {}, None)
    assert bare.correlation_id is bare.app_id is None
    assert foreign.headers.keys() == odd.keys()
    assert {type(value) for value in foreign.headers.values()} == {bytes}
    assert foreign.headers["tidings-position"] == b"[7]"
    for message in (bare, foreign):
        with pytest.raises(MalformedMessage):
            decode(message)


UNREADABLE = {
    "a type that is no UTF-8": b"\x00\x20" + b"\x02\xff\xfe",
    "a header name that is no UTF-8": b"\x20\x00" + b"\x00\x00\x00\x05" + b"\x02\xff\xfet\x01",
    "a year beyond calendars": b"\x00\x40" + b"\x7f" * 8,
    "a table nested a thousand deep": b"\x20\x00"
    + b"".join((7 * depth).to_bytes(4, "big") + b"\x01aF" for depth in range(1_000, 0, -1))
    + b"\x00\x00\x00\x00",
}


@not_on_aio_pika(
    "pamqp decodes properties in aiormq's reader, whose connection ends with the first that it cannot read"
)
@pytest.mark.parametrize("properties", UNREADABLE.values(), ids=UNREADABLE)
async def test_a_message_whose_properties_cannot_be_read_does_not_block_its_queue(
    bus_url: str, properties: bytes
) -> None:
    """Brokers do not check such properties, and common clients die of each delivery. So this test sends raw bytes."""
    body = b"poison"
    flags, rest = properties[:2], properties[2:]
    payload = b"\x00\x3c\x00\x00" + len(body).to_bytes(8, "big") + flags + rest
    async with open_bus(bus_url) as bus:
        await bus.provision(SERVICE)
        connection = await Connection.open(address_of(bus_url), "tidings tests")
        foreign = await connection.channel()
        connection.write(
            frame.marshal(spec.Basic.Publish(exchange=EXCHANGE), 1),
            b"\x02\x00\x01" + len(payload).to_bytes(4, "big") + payload + b"\xce",
            b"\x03\x00\x01" + len(body).to_bytes(4, "big") + body + b"\xce",
        )
        await foreign.call(spec.Queue.Declare(queue=SERVICE.queue, passive=True), spec.Queue.DeclareOk)
        await connection.close()
        async with bus.publisher() as publisher:
            await publisher.send(message := event(1))
        async with bus.consume(SERVICE) as consumer:
            poison, sound = await take(consumer, 2)
            assert poison.message == Message(body=body, message_id="", type="", content_type="")
            assert sound.message == message
            consumer.settle_through(sound.tag)
