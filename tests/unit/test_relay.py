"""The relay against a bus that refuses, loses and forgets on command, over a real embedded store."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from tidings import EventData, EventStore, Relay, open_store
from tidings.buses import Consumer, Subscription, TopologyItem
from tidings.errors import (
    BusUnavailable,
    PublishRejected,
    StoreUnavailable,
    TopologyMismatch,
    Unroutable,
)
from tidings.protocol.message import MARKER, Marker, Message, decode
from tidings.protocol.position import Accepted, Arrival
from tidings.stores import ANY, EVERYTHING, CaughtUp, Checkpoint, Filter, RecordedEvent


class ScriptedBus:
    """A publisher that confirms every message unless `trouble` raises, and remembers the confirmed ones in order."""

    def __init__(self) -> None:
        self.confirmed: list[Message] = []
        self.sent: list[Message] = []
        self.turns = 0
        self.in_flight = self.most_in_flight = 0
        self.trouble: Callable[[Message], None] = lambda message: None
        self._sending: set[asyncio.Task[None]] = set()

    async def provision(self, subscription: Subscription | None = None) -> None:
        pass

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        raise AssertionError("a relay does not inspect")

    async def delete(self, subscriptions: Sequence[Subscription]) -> None:
        raise AssertionError("a relay does not delete")

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[ScriptedBus]:
        self.turns += 1
        try:
            yield self
        finally:
            for task in self._sending:
                task.cancel()

    async def begin(self, message: Message) -> asyncio.Future[None]:
        task = asyncio.create_task(self.send(message))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        return task

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            self.trouble(message)
            self.confirmed.append(message)
        finally:
            self.in_flight -= 1

    def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AbstractAsyncContextManager[Consumer]:
        raise AssertionError("a relay does not consume")

    async def close(self) -> None:
        pass

    @property
    def positions(self) -> list[int]:
        return [decode(message).event.position for message in self.confirmed if message.type != MARKER]

    @property
    def markers(self) -> list[Marker]:
        return [Marker.decode(message) for message in self.confirmed if message.type == MARKER]


@pytest.fixture
async def store() -> AsyncIterator[EventStore]:
    async with open_store(f"memory://{uuid4()}") as opened:
        yield opened


@pytest.fixture
def bus() -> ScriptedBus:
    return ScriptedBus()


async def fill(store: EventStore, count: int, stream: str = "things") -> list[int]:
    """Append `count` events to several streams. Return their positions."""
    return [(await store.append(f"{stream}-{n % 7}", [EventData("Thing", b"{}")])).position for n in range(count)]


@asynccontextmanager
async def relaying(store: EventStore, bus: ScriptedBus, **options: float) -> AsyncIterator[Relay]:
    relay = Relay(
        store,
        bus,
        checkpoint_seconds=options.pop("checkpoint_seconds", 0.01),
        marker_seconds=options.pop("marker_seconds", 0.05),
    )
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def test_every_carried_event_is_sent_in_log_order_and_reserved_streams_are_not(
    store: EventStore, bus: ScriptedBus
) -> None:
    positions = await fill(store, 50)
    await store.append("tidings_private", [EventData("Secret", b"{}")])
    await store.append("$system", [EventData("Secret", b"{}")])
    async with relaying(store, bus):
        positions += await fill(store, 50)
        await until(lambda: len(bus.positions) >= 100)
    assert bus.positions == positions


async def test_a_service_that_hears_everything_in_order_sees_no_gap(store: EventStore, bus: ScriptedBus) -> None:
    await fill(store, 40)
    async with relaying(store, bus):
        await until(lambda: len(bus.positions) >= 40)
        await until(lambda: bus.markers[-1].position >= max(bus.positions))
    accepted = Accepted(range(256), -1, {})
    for message in bus.confirmed:
        if message.type == MARKER:
            marker = Marker.decode(message)
            assert accepted.hear(marker.position, marker.base, marker.touched) is not Arrival.GAP
        else:
            stamped = decode(message)
            assert accepted.offer(stamped.bucket, stamped.event.position, stamped.previous) is Arrival.NEXT
    assert accepted.reached >= max(bus.positions)


async def test_a_restarted_relay_goes_on_after_its_checkpoint(store: EventStore, bus: ScriptedBus) -> None:
    await fill(store, 20)
    async with relaying(store, bus) as relay:
        await until(lambda: len(bus.positions) >= 20)
        while await relay.checkpoint() < max(bus.positions):
            await asyncio.sleep(0.005)
    successor = ScriptedBus()
    later = await fill(store, 5)
    async with relaying(store, successor):
        await until(lambda: len(successor.positions) >= 5)
    assert successor.positions == later
    assert successor.markers[0].position < later[0], "the first marker says where it goes on"


async def test_a_relay_that_stops_records_and_tells_what_it_has_published(store: EventStore, bus: ScriptedBus) -> None:
    await fill(store, 5)
    async with relaying(store, bus, checkpoint_seconds=3600.0) as relay:
        await until(lambda: len(bus.positions) >= 5)
        more = await fill(store, 20)
        await until(lambda: len(bus.sent) > len(bus.confirmed) or len(bus.positions) >= 25)
        await until(lambda: relay.confirmed >= more[0])
        assert await relay.checkpoint() < more[0], "the next one is due in an hour"
        await until(
            lambda: more[-1] in [decode(message).event.position for message in bus.sent if message.type != MARKER]
        )
        await relay.part()
        assert await relay.checkpoint() == bus.markers[-1].position == more[-1]
        told = len(bus.markers)
        await relay.part()
        assert len(bus.markers) == told, "there is nothing more to tell"


async def test_a_relay_that_stops_waits_for_no_broker_that_confirms_nothing(
    store: EventStore, bus: ScriptedBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.relay.relay.PARTING_SECONDS", 0.05)
    async with relaying(store, bus, checkpoint_seconds=3600.0) as relay:
        await until(lambda: relay.leading)
        before = await relay.checkpoint()

        send = bus.send

        async def swallow(message: Message) -> None:
            if message.type == MARKER:  # the relay may send one first, and waits for its confirm before it goes on
                await send(message)
                return
            bus.sent.append(message)
            await asyncio.Event().wait()

        monkeypatch.setattr(bus, "send", swallow)
        await fill(store, 3)
        await until(lambda: any(message.type != MARKER for message in bus.sent))
        await asyncio.wait_for(relay.part(), 10)
        assert await relay.checkpoint() == before


async def test_the_checkpoint_never_passes_an_unconfirmed_event(store: EventStore, bus: ScriptedBus) -> None:
    positions = await fill(store, 30)
    stuck = positions[10]

    def refuse(message: Message) -> None:
        if message.type != MARKER and decode(message).event.position == stuck:
            raise BusUnavailable("cut")

    bus.trouble = refuse
    async with relaying(store, bus) as relay:
        await until(lambda: bus.turns >= 3)
        assert relay.confirmed < stuck
        assert await relay.checkpoint() < stuck
        bus.trouble = lambda message: None
        await until(lambda: set(bus.positions) >= set(positions))


async def test_nobody_bound_is_waited_for_and_nothing_is_skipped(store: EventStore, bus: ScriptedBus) -> None:
    positions = await fill(store, 5)

    def nobody(message: Message) -> None:
        raise Unroutable("tidings.events", message.message_id)

    bus.trouble = nobody
    async with relaying(store, bus) as relay:
        await until(lambda: bus.turns >= 2)
        assert relay.confirmed == -1
        bus.trouble = lambda message: None
        await until(lambda: len(bus.positions) >= 5)
    assert bus.positions == positions


async def test_a_bus_that_cannot_take_events_for_a_while_gets_all_of_them_in_order(
    store: EventStore, bus: ScriptedBus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tidings.relay.relay.RETRY_SECONDS", (0.01, 0.01))
    positions = await fill(store, 20)

    def nack(message: Message) -> None:
        if message.type != MARKER and decode(message).event.position >= positions[5]:
            raise BusUnavailable("negative confirm")

    bus.trouble = nack
    async with relaying(store, bus):
        await until(lambda: bus.turns >= 6)  # twice as often as it takes to leave out what is refused for its content
        bus.trouble = lambda message: None
        await until(lambda: positions[-1] in bus.positions)
    assert list(dict.fromkeys(bus.positions)) == positions
    gc.collect()
    assert not caplog.records, "every failed confirm was looked at"


async def test_an_event_refused_three_times_is_left_out_and_the_chain_shows_the_gap(
    store: EventStore, bus: ScriptedBus
) -> None:
    positions = [(await store.append("one", [EventData("Thing", b"{}")])).position for _ in range(6)]
    refused = positions[2]

    def refuse(message: Message) -> None:
        if message.type != MARKER and decode(message).event.position == refused:
            raise PublishRejected(message.message_id, "too large")

    bus.trouble = refuse
    async with relaying(store, bus):
        await until(lambda: positions[-1] in bus.positions)
        await until(lambda: bus.markers[-1].position >= positions[-1])
    attempts = [m for m in bus.sent if m.type != MARKER and decode(m).event.position == refused]
    assert len(attempts) == 3
    assert refused not in bus.positions
    after = next(m for m in bus.confirmed if m.type != MARKER and decode(m).event.position == positions[3])
    assert decode(after).previous >= refused, "the next event of the bucket shows that something is missing"


async def test_a_confirm_that_never_comes_is_named_and_the_event_sent_again(
    store: EventStore, bus: ScriptedBus, capsys: pytest.CaptureFixture[str]
) -> None:
    (position,) = await fill(store, 1)
    swallow = asyncio.Event()
    send = bus.send

    async def send_or_hang(message: Message) -> None:
        if message.type != MARKER and not swallow.is_set():
            swallow.set()
            await asyncio.Event().wait()
        await send(message)

    bus.send = send_or_hang  # type: ignore[method-assign]
    relay = Relay(store, bus, confirm_seconds=0.05)
    task = asyncio.create_task(relay.run())
    await until(lambda: position in bus.positions)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert "was not confirmed within 0.05 s" in capsys.readouterr().out


async def test_the_window_bounds_what_is_in_flight(store: EventStore, bus: ScriptedBus) -> None:
    await fill(store, 300)
    relay = Relay(store, bus, window=16)
    task = asyncio.create_task(relay.run())
    await until(lambda: len(bus.positions) >= 300)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert 1 < bus.most_in_flight <= 17  # and a marker


async def test_an_idle_relay_goes_on_publishing_markers(store: EventStore, bus: ScriptedBus) -> None:
    await fill(store, 3)
    async with relaying(store, bus, marker_seconds=0.02):
        await until(lambda: len(bus.markers) >= 5)
    before, idle = bus.markers[-2:]
    assert idle.position >= before.position >= max(bus.positions)
    assert (idle.base, dict(idle.touched)) == (before.position, {}), "markers follow each other without a gap"


async def test_a_foreign_event_in_the_checkpoint_stream_is_reported_with_the_remedy(
    store: EventStore, bus: ScriptedBus
) -> None:
    relay = Relay(store, bus)
    await store.append(relay.stream, [EventData("Odd", b"not a checkpoint")], expected=ANY)
    with pytest.raises(StoreUnavailable, match="somebody else wrote there"):
        await relay.checkpoint()


@pytest.mark.parametrize("position", [1_000_000, 2**63, 2**64 - 1, 10**40])
async def test_a_checkpoint_above_the_end_of_the_log_is_reported_and_what_follows_is_sent(
    store: EventStore, bus: ScriptedBus, position: int
) -> None:
    beyond = EventData("tidings_Checkpoint", b'{"position": %d}' % position)
    await store.append("tidings_relay-main", [beyond], expected=ANY)
    with capture_logs() as logs:
        async with relaying(store, bus):
            await until(lambda: bool(bus.markers))
            later = await fill(store, 3)
            await until(lambda: bus.positions == later)
    said = [line["checkpoint"] for line in logs if line["event"] == "relay.beyond_the_log"]
    assert said == [min(position, 2**63 - 1)]
    head = await store.head()
    assert all(-1 <= marker.base <= marker.position <= head for marker in bus.markers)


class Boasting:
    """A store whose subscription first sends a checkpoint beyond the end of its log."""

    def __init__(self, store: EventStore, boasts: list[Checkpoint | CaughtUp]) -> None:
        self._store = store
        self._boasts = boasts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        if self._boasts:
            yield self._boasts.pop()
        async for item in self._store.subscribe_all(after=after, filter=filter):
            yield item


@pytest.mark.parametrize("kind", [Checkpoint, CaughtUp])
@pytest.mark.parametrize("ahead", [1, 10**6, 2**63 - 1, 2**64 - 1])
async def test_a_place_beyond_the_log_is_said_and_not_carried_on(
    store: EventStore, bus: ScriptedBus, kind: type[Checkpoint | CaughtUp], ahead: int
) -> None:
    """The checkpoint that EventStoreDB 24.2 sends on an empty log made the relay skip every later event."""
    boasting = cast("EventStore", Boasting(store, [kind(await store.head() + ahead)]))
    with capture_logs() as logs:
        async with relaying(boasting, bus):
            await until(lambda: any(line["event"] == "relay.beyond_the_log" for line in logs))
            later = await fill(store, 3)
            await until(lambda: bus.positions == later)
            await until(lambda: bus.markers[-1].position >= later[-1])
    head = await store.head()
    assert all(-1 <= marker.base <= marker.position <= head for marker in bus.markers)


class Aged:
    """A store in which the events of one stream have a time that services cannot read."""

    def __init__(self, store: EventStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def subscribe_all(
        self, *, after: int = -1, filter: Filter = EVERYTHING
    ) -> AsyncIterator[RecordedEvent | Checkpoint | CaughtUp]:
        async for item in self._store.subscribe_all(after=after, filter=filter):
            yield item._replace(ticks=10**19) if isinstance(item, RecordedEvent) and item.stream == "old-0" else item


async def test_an_event_whose_message_no_service_could_read_is_left_out_and_the_chain_shows_the_gap(
    store: EventStore, bus: ScriptedBus
) -> None:
    good = [
        (await store.append(name, [EventData("Thing", b"{}")])).position for name in ("a-1", "old-0", "old-0", "b-2")
    ]
    with capture_logs() as logs:
        async with relaying(cast("EventStore", Aged(store)), bus):
            await until(lambda: bus.markers[-1:] != [] and bus.markers[-1].position >= good[-1])
    assert bus.positions == [good[0], good[3]]
    assert [line["position"] for line in logs if line["event"] == "relay.left_out"] == good[1:3]
    touched = {at for marker in bus.markers for at in marker.touched.values()}
    assert good[2] in touched, "a marker names what was left out, so that services read it from the log"


async def test_a_topology_that_differs_ends_the_relay(store: EventStore, bus: ScriptedBus) -> None:
    async def differs(subscription: Subscription | None = None) -> None:
        raise TopologyMismatch("exchange 'tidings.events' is direct, not fanout")

    bus.provision = differs  # type: ignore[method-assign]
    with pytest.raises(TopologyMismatch):
        await Relay(store, bus).run()


async def test_only_two_checkpoints_are_kept(store: EventStore, bus: ScriptedBus) -> None:
    async with relaying(store, bus) as relay:
        for _ in range(4):
            (position,) = await fill(store, 1)
            while await relay.checkpoint() < position:
                await asyncio.sleep(0.005)
        kept = [event async for event in store.read_stream(relay.stream)]
    assert len(kept) <= 2


async def test_positions_of_one_log_mean_nothing_in_another(store: EventStore, bus: ScriptedBus) -> None:
    await fill(store, 30)
    relay = Relay(store, bus)
    task = asyncio.create_task(relay.run())
    await until(lambda: len(bus.positions) >= 30)
    async with open_store(f"memory://{uuid4()}") as restored:
        expected = await fill(restored, 3)
        relay._store = restored
        bus.confirmed.clear()

        def cut(message: Message) -> None:
            bus.trouble = lambda message: None
            raise BusUnavailable("cut")

        bus.trouble = cut
        await fill(store, 1)
        await until(lambda: len(bus.positions) >= 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert bus.positions == expected
