"""The conformance suite of event buses. It knows the port and nothing else; each test's name is the rule.

To run it for an adapter, derive a class and override its environment:

    class TestMyBus(BusConformance):
        @pytest.fixture
        def environment(self) -> BusEnvironment:
            return MyEnvironment()
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Final, Protocol
from uuid import UUID, uuid4

import pytest

from tidings.buses import Consumer, Delivery, EventBus, Publisher, Subscription, TopologyItem
from tidings.errors import BusUnavailable, QueueRefused, TopologyMismatch, Unroutable
from tidings.protocol.message import Marker, Message, decode, encode
from tidings.protocol.position import ALL_BUCKETS, bucket_of
from tidings.protocol.seal import Seal
from tidings.stores import RecordedEvent

__all__ = [
    "LOG",
    "BusConformance",
    "BusEnvironment",
    "RefusingBusConformance",
    "RefusingBusEnvironment",
    "event",
    "events",
    "send_all",
    "take",
]

LOG: Final = UUID("6f9d2c5e-0000-4000-8000-000000000001")
WINDOW: Final = 256
PATIENCE: Final = 60.0
"""Seconds after which a wait counts as a hang."""
QUIET: Final = 0.25
"""Seconds during which no message may arrive when none is due."""


class BusEnvironment(Protocol):
    """What the suite needs besides the port: the bus as another process would open it, and ways to harm it."""

    def open(self) -> AbstractAsyncContextManager[EventBus]:
        """Open another bus on the same broker."""
        ...

    async def delete_queue(self, name: str) -> None:
        """Delete a queue as an operator would. Harmless if there is none."""
        ...

    async def drop_connections(self) -> None:
        """Cut all connections of all buses that were opened here, without closing them."""
        ...

    async def occupy(self, name: str) -> None:
        """Create a queue of that name with other properties than Tidings needs."""
        ...


class RefusingBusEnvironment(BusEnvironment, Protocol):
    """The environment of a bus whose queues may refuse messages, because they are full or have no leader."""

    async def refuse(self, name: str) -> None:
        """Create a queue of that name, get it every message, and let it refuse each."""
        ...


def event(number: int, stream: str = "order-1", data: bytes = b'{"n": 1}', metadata: bytes = b"") -> Message:
    """Return the message of the event at position `number`, as the relay sends it."""
    recorded = RecordedEvent(
        position=number,
        stream=stream,
        version=number,
        type="OrderCreated",
        data=data,
        metadata=metadata,
        is_json=True,
        id_bytes=uuid4().bytes,
        ticks=17_000_000_000_000_000 + number % 10_000_000,
    )
    return encode(recorded, log=LOG, previous=number - 1, bucket=bucket_of(stream))


def events(count: int) -> list[Message]:
    """Return `count` messages over 50 streams, positions from 1."""
    return [event(number, stream=f"order-{number % 50}") for number in range(1, count + 1)]


async def send_all(publisher: Publisher, messages: Sequence[Message], window: int = WINDOW) -> None:
    """Send the messages in order, with at most `window` unconfirmed, as the relay does."""
    free = asyncio.Semaphore(window)

    async def send(message: Message) -> None:
        try:
            await publisher.send(message)
        finally:
            free.release()

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for message in messages:
            await free.acquire()
            group.create_task(send(message))


async def take(consumer: Consumer, count: int) -> list[Delivery]:
    """Return the next `count` deliveries, unsettled."""
    deliveries: list[Delivery] = []
    async with asyncio.timeout(PATIENCE):
        while len(deliveries) < count:
            deliveries.append(await anext(aiter(consumer)))
    return deliveries


async def nothing_comes(consumer: Consumer) -> bool:
    """Return whether no delivery arrives within `QUIET` seconds."""
    try:
        async with asyncio.timeout(QUIET):
            await anext(aiter(consumer))
    except TimeoutError:
        return True
    return False


async def counts(bus: EventBus, subscription: Subscription, *, messages: int, consumers: int) -> None:
    """Wait until the queue reports these numbers: brokers count a little late."""
    async with asyncio.timeout(PATIENCE):
        while True:
            found = (await bus.inspect([subscription]))[1]
            if (found.messages, found.consumers) == (messages, consumers):
                return
            await asyncio.sleep(0.01)


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    """Return the message ids of deliveries."""
    return [delivery.message.message_id for delivery in deliveries]


class BusConformance:
    """The suite: derive a class and override `environment`."""

    @pytest.fixture
    def environment(self) -> BusEnvironment:
        """Override it: the environment of the adapter under test."""
        raise NotImplementedError("override the fixture `environment` of BusConformance")

    @pytest.fixture
    async def bus(self, environment: BusEnvironment) -> AsyncIterator[EventBus]:
        """The bus under test."""
        async with environment.open() as bus:
            yield bus

    @pytest.fixture
    async def inventory(self, bus: EventBus, environment: BusEnvironment) -> AsyncIterator[Subscription]:
        """A service with a queue."""
        subscription = Subscription(f"inventory-{secrets.token_hex(4)}")
        await bus.provision(subscription)
        yield subscription
        await environment.delete_queue(subscription.queue)

    @pytest.fixture
    async def billing(self, bus: EventBus, environment: BusEnvironment) -> AsyncIterator[Subscription]:
        """Another service with a queue."""
        subscription = Subscription(f"billing-{secrets.token_hex(4)}")
        await bus.provision(subscription)
        yield subscription
        await environment.delete_queue(subscription.queue)

    # ---- publishing ----------------------------------------------------------------------

    async def test_a_confirmed_message_is_in_every_queue(
        self, bus: EventBus, inventory: Subscription, billing: Subscription
    ) -> None:
        message = event(1)
        async with bus.publisher() as publisher:
            await publisher.send(message)
        for service in (inventory, billing):
            async with bus.consume(service) as consumer:
                assert (await take(consumer, 1))[0].message == message

    async def test_a_marker_reaches_every_queue(
        self, bus: EventBus, inventory: Subscription, billing: Subscription
    ) -> None:
        marker = Marker(LOG, 7, 3, {0: 5, 255: 7})
        async with bus.publisher() as publisher:
            await publisher.send(marker.encode())
        for service in (inventory, billing):
            async with bus.consume(service) as consumer:
                message = (await take(consumer, 1))[0].message
            assert message.bucket is None
            assert Marker.decode(message) == marker

    async def test_a_message_that_reaches_no_queue_is_unroutable(self, bus: EventBus) -> None:
        await bus.provision()
        message = event(1)
        async with bus.publisher() as publisher:
            with pytest.raises(Unroutable) as raised:
                await publisher.send(message)
        assert raised.value.message_id == message.message_id

    async def test_each_of_many_unroutable_messages_is_reported(self, bus: EventBus) -> None:
        await bus.provision()
        async with bus.publisher() as publisher, asyncio.timeout(PATIENCE):
            outcomes = await asyncio.gather(*map(publisher.send, events(WINDOW)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unroutable] * WINDOW

    async def test_what_is_begun_goes_out_in_order_and_its_futures_end_with_the_confirms(
        self, bus: EventBus, inventory: Subscription
    ) -> None:
        messages = events(WINDOW)
        async with bus.publisher() as publisher, asyncio.timeout(PATIENCE):
            await asyncio.gather(*[await publisher.begin(message) for message in messages])
        async with bus.consume(inventory) as consumer:
            assert [delivery.message for delivery in await take(consumer, WINDOW)] == messages

    async def test_what_is_begun_and_reaches_no_queue_is_unroutable(self, bus: EventBus) -> None:
        await bus.provision()
        message = event(1)
        async with bus.publisher() as publisher, asyncio.timeout(PATIENCE):
            with pytest.raises(Unroutable) as raised:
                await (await publisher.begin(message))
        assert raised.value.message_id == message.message_id

    async def test_a_message_sent_twice_at_once_arrives_twice(self, bus: EventBus, inventory: Subscription) -> None:
        message = event(1)
        async with bus.publisher() as publisher:
            await send_all(publisher, [message, message])
        async with bus.consume(inventory) as consumer:
            assert [delivery.message for delivery in await take(consumer, 2)] == [message, message]

    async def test_a_cancelled_send_harms_no_other(self, bus: EventBus, inventory: Subscription) -> None:
        first, second = event(1), event(2)
        async with bus.publisher() as publisher:
            sending = asyncio.create_task(publisher.send(first))
            await asyncio.sleep(0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            async with asyncio.timeout(PATIENCE):
                await publisher.send(second)
        async with bus.consume(inventory) as consumer:
            assert second in [delivery.message for delivery in await take(consumer, 2)]

    # ---- what a message holds ------------------------------------------------------------

    async def test_headers_arrive_as_they_were_sent(self, bus: EventBus, inventory: Subscription) -> None:
        headers = {
            "text": "grüße 📦",
            "empty": "",
            "long": "x" * 5_000,
            "zero": 0,
            "negative": -1,
            "small": 255,
            "short": 65_535,
            "medium": 2**32,
            "largest": 2**63 - 1,
            "smallest": -(2**63),
            "bytes": b"plain",
            "no-utf8": bytes(range(256)),
            "no-bytes": b"",
        }
        message = Message(body=b"\x00\xff", message_id="1", type="Foreign", headers=headers, content_type="text/plain")
        async with bus.publisher() as publisher:
            await publisher.send(message)
        async with bus.consume(inventory) as consumer:
            received = (await take(consumer, 1))[0].message
        assert received == message
        assert {name: type(value) for name, value in received.headers.items()} == {
            name: type(value) for name, value in headers.items()
        }

    async def test_an_event_is_read_back_as_it_was_written(self, bus: EventBus, inventory: Subscription) -> None:
        metadata = b'{"$correlationId": "c-1", "actor": "\xc3\xa9va"}'
        message = event(2**62, stream="größe-☃-" + "s" * 300, data=b"{}", metadata=metadata)
        async with bus.publisher() as publisher:
            await publisher.send(message)
        async with bus.consume(inventory) as consumer:
            received = (await take(consumer, 1))[0].message
        assert decode(received) == decode(message)
        assert received.correlation_id == "c-1"

    @pytest.mark.parametrize("length", [10, 255, 256])
    async def test_what_a_seal_covers_arrives_as_it_was_sealed(
        self, bus: EventBus, inventory: Subscription, length: int
    ) -> None:
        seal, kind = Seal([secrets.token_bytes(32)]), "é" * length
        record = decode(event(1, metadata=b'{"n": 1}')).event._replace(type=kind)
        sealed = [
            encode(record, log=LOG, previous=0, bucket=bucket_of("order-1"), seal=seal),
            Marker(LOG, 7, 3, {0: 5}).encode(seal),
        ]
        async with bus.publisher() as publisher:
            await send_all(publisher, sealed)
        async with bus.consume(inventory) as consumer:
            for delivery in await take(consumer, len(sealed)):
                came = delivery.message
                assert seal.holds(came.type, came.content_type, came.headers, came.body)
                assert not seal.holds(came.type, came.content_type, came.headers, came.body + b" ")

    @pytest.mark.parametrize("length", [255, 256, 1_000])
    async def test_long_properties_arrive_whole_or_not_at_all(
        self, bus: EventBus, inventory: Subscription, length: int
    ) -> None:
        name = "é" * (length // 2) + "x" * (length % 2)
        message = Message(
            body=b"1", message_id=name, type=name, headers={"n": 1}, correlation_id=name, app_id=name, content_type=name
        )
        async with bus.publisher() as publisher:
            await publisher.send(message)
        async with bus.consume(inventory) as consumer:
            received = (await take(consumer, 1))[0].message
        assert (received.body, received.headers) == (b"1", {"n": 1})
        for found in (received.message_id, received.type, received.correlation_id, received.app_id):
            assert found == name or (not found and length > 255)

    @pytest.mark.parametrize("size", [0, 1, 131_064, 131_065, 1_000_000])
    async def test_bodies_of_any_size_arrive(self, bus: EventBus, inventory: Subscription, size: int) -> None:
        message = event(1, data=secrets.token_bytes(size))
        async with bus.publisher() as publisher:
            await publisher.send(message)
        async with bus.consume(inventory) as consumer:
            assert (await take(consumer, 1))[0].message == message

    # ---- consuming -----------------------------------------------------------------------

    async def test_order_is_kept_with_256_sends_in_flight(self, bus: EventBus, inventory: Subscription) -> None:
        messages = events(4 * WINDOW)
        async with bus.publisher() as publisher:
            await send_all(publisher, messages)
        async with bus.consume(inventory, prefetch=len(messages)) as consumer:
            assert ids(await take(consumer, len(messages))) == [message.message_id for message in messages]

    async def test_ten_thousand_messages_pass_while_being_sent(self, bus: EventBus, inventory: Subscription) -> None:
        messages = events(10_000)

        async def receive() -> list[str]:
            received: list[str] = []
            async with bus.consume(inventory) as consumer:
                async for delivery in consumer:
                    received.append(delivery.message.message_id)
                    if delivery.tag % 64 == 0:
                        consumer.settle_through(delivery.tag)
                    if len(received) == len(messages):
                        break
            return received

        async with bus.publisher() as publisher, asyncio.TaskGroup() as group:
            receiving = group.create_task(receive())
            await send_all(publisher, messages)
        assert receiving.result() == [message.message_id for message in messages]

    async def test_tags_rise_by_one(self, bus: EventBus, inventory: Subscription) -> None:
        async with bus.publisher() as publisher:
            await send_all(publisher, events(5))
        async with bus.consume(inventory) as consumer:
            tags = [delivery.tag for delivery in await take(consumer, 5)]
        assert tags == list(range(tags[0], tags[0] + 5))

    async def test_what_is_not_settled_comes_again(self, bus: EventBus, inventory: Subscription) -> None:
        messages = events(20)
        async with bus.publisher() as publisher:
            await send_all(publisher, messages)
        for _ in range(2):
            async with bus.consume(inventory) as consumer:
                assert ids(await take(consumer, 20)) == [message.message_id for message in messages]

    async def test_what_is_settled_never_comes_again(self, bus: EventBus, inventory: Subscription) -> None:
        messages = events(20)
        async with bus.publisher() as publisher:
            await send_all(publisher, messages)
        async with bus.consume(inventory) as consumer:
            consumer.settle_through((await take(consumer, 10))[6].tag)
        async with bus.consume(inventory) as consumer:
            assert ids(await take(consumer, 13)) == [message.message_id for message in messages[7:]]
            assert await nothing_comes(consumer)

    async def test_at_most_prefetch_deliveries_are_unsettled(self, bus: EventBus, inventory: Subscription) -> None:
        async with bus.publisher() as publisher:
            await send_all(publisher, events(8))
        async with bus.consume(inventory, prefetch=3) as consumer:
            deliveries = await take(consumer, 3)
            assert await nothing_comes(consumer)
            consumer.settle_through(deliveries[1].tag)
            deliveries += await take(consumer, 2)
            assert await nothing_comes(consumer)
            consumer.settle_through(deliveries[-1].tag)
            await take(consumer, 3)

    async def test_settling_is_harmless_when_repeated_or_late(
        self, bus: EventBus, environment: BusEnvironment, inventory: Subscription
    ) -> None:
        messages = events(3)
        async with bus.publisher() as publisher:
            await send_all(publisher, messages)
        async with bus.consume(inventory, prefetch=1) as old:
            first = (await take(old, 1))[0]
            old.settle_through(first.tag)
            old.settle_through(first.tag)
            old.settle_through(0)
            old.settle_through(first.tag + 1_000)
            await take(old, 1)
            await environment.drop_connections()
            with pytest.raises(BusUnavailable):
                await take(old, 1)
            async with bus.consume(inventory) as new:
                old.settle_through(2)
                assert ids(await take(new, 2)) == [message.message_id for message in messages[1:]]
                old.settle_through(2)
                new.settle_through(1)
        old.settle_through(2)
        async with bus.consume(inventory) as newest:
            assert ids(await take(newest, 1)) == [messages[2].message_id]

    async def test_a_cancelled_wait_loses_no_delivery(self, bus: EventBus, inventory: Subscription) -> None:
        async with bus.consume(inventory) as consumer, bus.publisher() as publisher:
            assert await nothing_comes(consumer)
            await publisher.send(message := event(1))
            assert (await take(consumer, 1))[0].message == message

    async def test_of_several_consumers_one_is_active_and_another_takes_over(
        self, environment: BusEnvironment, bus: EventBus, inventory: Subscription
    ) -> None:
        messages = events(4)
        async with (
            environment.open() as other,
            other.consume(inventory, prefetch=2) as active,
            bus.consume(inventory) as standby,
            bus.publisher() as publisher,
        ):
            await send_all(publisher, messages)
            deliveries = await take(active, 2)
            assert await nothing_comes(standby)  # although two messages wait
            active.settle_through(deliveries[0].tag)
            await other.close()
            assert ids(await take(standby, 3)) == [message.message_id for message in messages[1:]]

    # ---- losses --------------------------------------------------------------------------

    async def test_a_lost_connection_ends_the_iteration(
        self, bus: EventBus, environment: BusEnvironment, inventory: Subscription
    ) -> None:
        async with bus.consume(inventory) as consumer:
            waiting = asyncio.create_task(take(consumer, 1))
            await asyncio.sleep(0)
            await environment.drop_connections()
            with pytest.raises(BusUnavailable):
                await waiting
            with pytest.raises(BusUnavailable):
                await take(consumer, 1)

    async def test_a_lost_connection_ends_every_send(
        self, bus: EventBus, environment: BusEnvironment, inventory: Subscription
    ) -> None:
        async with bus.publisher() as publisher:
            sending = [asyncio.create_task(publisher.send(message)) for message in events(WINDOW)]
            await asyncio.sleep(0)
            await environment.drop_connections()
            async with asyncio.timeout(PATIENCE):
                outcomes = await asyncio.gather(*sending, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} <= {type(None), BusUnavailable}
            with pytest.raises(BusUnavailable):
                await publisher.send(event(1))
        confirmed = sum(outcome is None for outcome in outcomes)
        async with bus.consume(inventory) as consumer:
            await take(consumer, confirmed)
        async with bus.publisher() as publisher:
            await publisher.send(event(1))

    async def test_a_deleted_queue_ends_the_iteration(
        self, bus: EventBus, environment: BusEnvironment, inventory: Subscription
    ) -> None:
        async with bus.consume(inventory) as consumer:
            waiting = asyncio.create_task(take(consumer, 1))
            await asyncio.sleep(0)
            await environment.delete_queue(inventory.queue)
            with pytest.raises(BusUnavailable):
                await waiting

    async def test_a_queue_that_does_not_exist_cannot_be_consumed(self, bus: EventBus) -> None:
        nobody = Subscription("nobody")
        with pytest.raises(BusUnavailable, match=nobody.queue):
            async with bus.consume(nobody):
                pass

    async def test_closing_the_bus_ends_everything(self, environment: BusEnvironment, inventory: Subscription) -> None:
        async with environment.open() as other:
            async with other.publisher() as publisher, other.consume(inventory) as consumer:
                waiting = asyncio.create_task(take(consumer, 1))
                await asyncio.sleep(0)
                await other.close()
                await other.close()
                with pytest.raises(BusUnavailable):
                    await waiting
                with pytest.raises(BusUnavailable):
                    await publisher.send(event(1))
            with pytest.raises(BusUnavailable):
                await other.provision()

    async def test_a_consumer_that_was_left_gives_nothing_more(self, bus: EventBus, inventory: Subscription) -> None:
        async with bus.publisher() as publisher:
            await send_all(publisher, events(5))
        async with bus.consume(inventory) as consumer:
            await take(consumer, 1)
        with pytest.raises(BusUnavailable):
            await take(consumer, 1)

    # ---- locks ---------------------------------------------------------------------------

    async def test_a_lock_has_one_holder_until_it_closes(
        self, environment: BusEnvironment, bus: EventBus, inventory: Subscription
    ) -> None:
        entered = asyncio.Event()

        async def rival() -> None:
            async with environment.open() as other, other.publisher(lock="main") as publisher:
                entered.set()
                await publisher.send(event(2))

        async with asyncio.TaskGroup() as group:
            async with bus.publisher(lock="main") as publisher:
                group.create_task(rival())
                async with bus.publisher(lock="another") as unrelated:
                    await unrelated.send(event(1))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(entered.wait(), QUIET)
                await publisher.send(event(1))
            await asyncio.wait_for(entered.wait(), PATIENCE)

    async def test_losing_the_connection_loses_the_lock(
        self, bus: EventBus, environment: BusEnvironment, inventory: Subscription
    ) -> None:
        async with bus.publisher(lock="main") as old:
            await environment.drop_connections()
            async with asyncio.timeout(PATIENCE), bus.publisher(lock="main") as new:
                await new.send(event(1))
            with pytest.raises(BusUnavailable):
                await old.send(event(1))

    async def test_waiting_for_a_lock_can_be_given_up(self, bus: EventBus, inventory: Subscription) -> None:
        async with bus.publisher(lock="main"):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(QUIET), bus.publisher(lock="main"):
                    pass
        async with asyncio.timeout(PATIENCE), bus.publisher(lock="main") as publisher:
            await publisher.send(event(1))

    # ---- provisioning --------------------------------------------------------------------

    async def test_provisioning_twice_changes_nothing(self, bus: EventBus, inventory: Subscription) -> None:
        message = event(1)
        async with bus.publisher() as publisher:
            await publisher.send(message)
        await asyncio.gather(bus.provision(inventory), bus.provision(inventory), bus.provision())
        async with bus.consume(inventory) as consumer:
            assert (await take(consumer, 1))[0].message == message
            assert await nothing_comes(consumer)

    async def test_a_queue_keeps_what_comes_while_nobody_consumes(
        self, environment: BusEnvironment, bus: EventBus, inventory: Subscription
    ) -> None:
        async with environment.open() as other, other.publisher() as publisher:
            await publisher.send(message := event(1))
        async with bus.consume(inventory) as consumer:
            assert (await take(consumer, 1))[0].message == message

    async def test_a_queue_with_other_properties_is_named(self, bus: EventBus, environment: BusEnvironment) -> None:
        occupied = Subscription(f"occupied-{secrets.token_hex(4)}")
        await environment.occupy(occupied.queue)
        with pytest.raises(TopologyMismatch, match=occupied.queue):
            await bus.provision(occupied)
        await environment.delete_queue(occupied.queue)
        await bus.provision(occupied)
        await environment.delete_queue(occupied.queue)

    # ---- partitions ----------------------------------------------------------------------

    @pytest.fixture
    async def halves(self, bus: EventBus, environment: BusEnvironment) -> AsyncIterator[list[Subscription]]:
        """A service with two partitions: buckets 0 to 127, and 128 to 255."""
        name = f"halves-{secrets.token_hex(4)}"
        parts = [Subscription(name, index, 2) for index in range(2)]
        for part in parts:
            await bus.provision(part)
        yield parts
        for part in parts:
            await environment.delete_queue(part.queue)

    async def test_an_event_reaches_the_partition_of_its_bucket_and_every_undivided_service(
        self, bus: EventBus, inventory: Subscription, halves: list[Subscription]
    ) -> None:
        messages = events(40)
        async with bus.publisher() as publisher:
            await send_all(publisher, messages)
        for part in (inventory, *halves):
            wanted = [message for message in messages if message.bucket in part.buckets]
            assert wanted
            async with bus.consume(part) as consumer:
                assert [delivery.message for delivery in await take(consumer, len(wanted))] == wanted
                assert await nothing_comes(consumer)

    async def test_a_marker_reaches_every_partition(self, bus: EventBus, halves: list[Subscription]) -> None:
        marker = Marker(LOG, 7, 3, {0: 5, 255: 7})
        async with bus.publisher() as publisher:
            await publisher.send(marker.encode())
        for part in halves:
            async with bus.consume(part) as consumer:
                assert Marker.decode((await take(consumer, 1))[0].message) == marker
                assert await nothing_comes(consumer)

    async def test_every_bucket_belongs_to_a_partition(
        self, bus: EventBus, environment: BusEnvironment, halves: list[Subscription]
    ) -> None:
        thirds = [Subscription(f"thirds-{secrets.token_hex(4)}", index, 3) for index in range(3)]
        for part in thirds:
            await bus.provision(part)
        messages = [replace(event(bucket + 1), bucket=bucket) for bucket in ALL_BUCKETS]
        async with bus.publisher() as publisher:
            await send_all(publisher, messages)
        for part in (*halves, *thirds):
            async with bus.consume(part) as consumer:
                found = [delivery.message.message_id for delivery in await take(consumer, len(part.buckets))]
            assert found == [messages[bucket].message_id for bucket in part.buckets]
        for part in thirds:
            await environment.delete_queue(part.queue)

    async def test_an_event_without_the_queue_of_its_bucket_is_unroutable(
        self, bus: EventBus, environment: BusEnvironment, halves: list[Subscription]
    ) -> None:
        await environment.delete_queue(halves[1].queue)
        first, second = (next(m for m in events(40) if m.bucket in part.buckets) for part in halves)
        async with bus.publisher() as publisher:
            await publisher.send(first)
            with pytest.raises(Unroutable):
                await publisher.send(second)

    # ---- deleting ------------------------------------------------------------------------

    async def test_deleting_takes_away_what_it_is_given_and_nothing_else(
        self, bus: EventBus, inventory: Subscription, billing: Subscription, halves: list[Subscription]
    ) -> None:
        absent = Subscription(f"absent-{secrets.token_hex(4)}")
        await bus.delete([inventory, absent, halves[0]])
        found = await bus.inspect([inventory, billing, *halves])
        queues = [thing.state for thing in found if thing.kind == "queue"]
        assert queues == ["missing", "fits", "missing", "fits"]

    async def test_a_queue_that_was_deleted_is_made_anew_and_empty(
        self, bus: EventBus, inventory: Subscription
    ) -> None:
        async with bus.publisher() as publisher:
            await publisher.send(event(1))
        async with bus.consume(inventory) as consumer:
            await bus.delete([inventory])
            with pytest.raises(BusUnavailable):
                await take(consumer, 2)
        await bus.provision(inventory)
        async with bus.consume(inventory) as consumer:
            assert await nothing_comes(consumer)

    # ---- inspecting ----------------------------------------------------------------------

    async def test_inspecting_says_what_is_missing_and_makes_none_of_it(
        self, environment: BusEnvironment, bus: EventBus
    ) -> None:
        absent = Subscription(f"absent-{secrets.token_hex(4)}")
        for _ in range(2):
            found = await bus.inspect([absent])
            assert [thing.kind for thing in found] == ["exchange", "queue"]
            assert found[1] == TopologyItem("queue", absent.queue, "missing")
        async with environment.open() as fresh:
            assert (await fresh.inspect([absent]))[1].state == "missing"
            with pytest.raises(BusUnavailable):
                async with fresh.consume(absent):
                    pass

    async def test_inspecting_finds_what_was_provisioned_with_its_messages_and_consumers(
        self, bus: EventBus, inventory: Subscription
    ) -> None:
        exchange, queue = await bus.inspect([inventory])
        assert (exchange.state, queue.state) == ("fits", "fits")
        assert (queue.name, queue.messages, queue.consumers) == (inventory.queue, 0, 0)
        async with bus.publisher() as publisher:
            await send_all(publisher, events(5))
        await counts(bus, inventory, messages=5, consumers=0)
        async with bus.consume(inventory, prefetch=2) as consumer:
            await take(consumer, 2)
            await counts(bus, inventory, messages=3, consumers=1)

    async def test_inspecting_takes_nothing_and_disturbs_no_consumer(
        self, bus: EventBus, inventory: Subscription
    ) -> None:
        messages = events(3)
        async with bus.publisher() as publisher, bus.consume(inventory, prefetch=1) as consumer:
            await send_all(publisher, messages)
            await bus.inspect([inventory])
            first = (await take(consumer, 1))[0]
            await bus.inspect([inventory])
            consumer.settle_through(first.tag)
            assert ids([first, *await take(consumer, 1)]) == [message.message_id for message in messages[:2]]

    async def test_inspecting_names_what_provisioning_would_refuse(
        self, bus: EventBus, environment: BusEnvironment, inventory: Subscription
    ) -> None:
        occupied = Subscription(f"occupied-{secrets.token_hex(4)}")
        await environment.occupy(occupied.queue)
        for _ in range(2):
            _, differs, fits = await bus.inspect([occupied, inventory])
            assert (differs.name, differs.state, fits.state) == (occupied.queue, "differs", "fits")
            with pytest.raises(TopologyMismatch) as refused:
                await bus.provision(occupied)
            assert differs.detail == str(refused.value)
        await environment.delete_queue(occupied.queue)

    async def test_a_closed_bus_cannot_be_inspected(self, environment: BusEnvironment) -> None:
        async with environment.open() as other:
            await other.close()
            with pytest.raises(BusUnavailable):
                await other.inspect([])


class RefusingBusConformance(BusConformance):
    """The suite of a bus whose queues may refuse messages. `environment` is a `RefusingBusEnvironment`."""

    @pytest.fixture
    async def refusing(self, bus: EventBus, environment: RefusingBusEnvironment) -> AsyncIterator[str]:
        """A queue that takes nothing."""
        name = f"refusing-{secrets.token_hex(4)}"
        await bus.provision()
        await environment.refuse(name)
        yield name
        await environment.delete_queue(name)

    async def test_what_a_queue_refuses_reaches_every_other(
        self, bus: EventBus, inventory: Subscription, billing: Subscription, refusing: str
    ) -> None:
        messages = events(WINDOW)
        async with bus.publisher() as publisher, asyncio.timeout(PATIENCE):
            begun = [await publisher.begin(message) for message in messages]
            outcomes = await asyncio.gather(*begun, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [QueueRefused] * WINDOW
        for service in (inventory, billing):
            async with bus.consume(service) as consumer:
                assert [delivery.message for delivery in await take(consumer, WINDOW)] == messages

    async def test_a_publisher_goes_on_after_a_refusal(
        self, bus: EventBus, environment: BusEnvironment, inventory: Subscription, refusing: str
    ) -> None:
        marker, message = Marker(LOG, 7, 3, {0: 5}).encode(), event(1)
        async with bus.publisher() as publisher, asyncio.timeout(PATIENCE):
            with pytest.raises(QueueRefused):
                await publisher.send(marker)
            await environment.delete_queue(refusing)
            await publisher.send(message)
        async with bus.consume(inventory) as consumer:
            assert [delivery.message for delivery in await take(consumer, 2)] == [marker, message]
