"""What a relay makes of queues that refuse: it goes on for the others, and names the queue where the bus can tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from tidings import EventData, EventStore, Relay, open_store
from tidings._support.tasks import supervised
from tidings.buses import Subscription, TopologyItem
from tidings.buses.memory import MemoryBus
from tidings.errors import BusUnavailable, ConfigurationError, QueueRefused
from tidings.hosting.checks import check_relay
from tidings.hosting.facts import RelayFacts
from tidings.protocol.message import MARKER, Message, decode
from tidings.relay.checkpoints import Checkpointed, read_last, write_checkpoint
from tidings.relay.refusals import Refusals, strays, suspected

ORDER, OTHER = Subscription("order"), Subscription("other")
REFUSED = QueueRefused("a queue refuses messages. Look for it")


@pytest.fixture
async def store() -> AsyncIterator[EventStore]:
    async with open_store(f"memory://{uuid4()}") as opened:
        yield opened


@pytest.fixture
async def bus() -> AsyncIterator[MemoryBus]:
    made = MemoryBus(str(uuid4()))
    yield made
    await made.close()


async def known() -> Sequence[Subscription]:
    return [ORDER, OTHER]


@asynccontextmanager
async def relaying(store: EventStore, bus: MemoryBus) -> AsyncIterator[Relay]:
    relay = Relay(store, bus, checkpoint_seconds=0.01, marker_seconds=0.02, queues=known)
    async with supervised(relay.run()):
        yield relay


async def until(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    async with asyncio.timeout(30):
        while True:
            met = condition()
            if met if isinstance(met, bool) else await met:
                return
            await asyncio.sleep(0.005)


async def positions(bus: MemoryBus, subscription: Subscription, count: int) -> list[int]:
    """Return the positions of the first `count` events in a queue."""
    found: list[int] = []
    async with bus.consume(subscription) as consumer, asyncio.timeout(30):
        async for delivery in consumer:
            if delivery.message.type != MARKER:
                found.append(decode(delivery.message).event.position)
            if len(found) == count:
                break
    return found


async def test_the_others_get_everything_once_and_the_queue_is_named_until_it_takes_messages(
    store: EventStore, bus: MemoryBus
) -> None:
    await bus.provision(ORDER)
    await bus.provision(OTHER)
    bus.refuse(ORDER.queue)
    with capture_logs() as logs:
        async with relaying(store, bus) as relay:
            sent = [(await store.append("things", [EventData("Thing", b"{}")])).position for _ in range(20)]
            await until(lambda: relay.confirmed >= sent[-1])
            await until(lambda: "'tidings.order' refuses" in (relay.refusals.told or ""))
            assert await relay.checkpoint() >= 0, "a refusal holds up no checkpoint"

            async def noted() -> bool:
                return (await read_last(store, "main")).refusing == relay.refusals.told

            await until(noted)
            assert relay.trouble is None
            bus.refuse(ORDER.queue, False)
            await until(lambda: relay.refusals.told is None)
            await until(noted)
    assert bus.queued(ORDER.queue) > 0, "markers come again, and show the gap"
    assert await positions(bus, OTHER, 20) == sent
    told = [line for line in logs if line["event"] == "relay.queue_refuses"]
    assert [line["queues"] for line in told] == [[], ["tidings.order"]]
    assert "relay.interrupted" not in [line["event"] for line in logs]


class Looked:
    """A bus that says what it is told of its queues."""

    def __init__(self, *looks: Sequence[TopologyItem]) -> None:
        self.looks = list(looks)
        self.silent: set[str] = set()

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        asked = {each.queue for each in subscriptions}
        if len(asked) > 1 and self.silent:
            raise BusUnavailable("the connection ended")
        if asked & self.silent:
            raise BusUnavailable(f"{min(asked)} does not answer")
        look = self.looks[0] if self.silent else self.looks.pop(0)
        return [TopologyItem("exchange", "tidings.events", "fits"), *(each for each in look if each.name in asked)]


def refusals(bus: Looked, queues: object = known) -> Refusals:
    return Refusals("main", bus, queues, lambda: 0.0)  # type: ignore[arg-type]


def queue(name: str, messages: int, consumers: int = 0, state: str = "fits", detail: str = "") -> TopologyItem:
    return TopologyItem("queue", name, state, detail, messages, consumers)  # type: ignore[arg-type]


async def test_a_queue_without_a_leader_is_named_because_it_alone_does_not_answer() -> None:
    bus = Looked([queue("tidings.other", 3)])
    bus.silent = {"tidings.order"}
    seen = refusals(bus)
    await seen.look(REFUSED)
    assert seen.told == "queue 'tidings.order' refuses messages. tidings.order does not answer Look for it"


async def test_a_broker_that_does_not_answer_names_no_queue() -> None:
    bus = Looked([])
    bus.silent = {part.queue for part in [ORDER, OTHER, *strays([ORDER, OTHER])]}
    seen = refusals(bus)
    seen.refused(REFUSED)
    await seen.look(REFUSED)
    assert seen.told == str(REFUSED)


async def test_strays_that_do_not_exist_are_not_looked_for_after_each_marker() -> None:
    """RabbitMQ writes an error into its log for each queue that is looked for in vain."""
    asked = list[set[str]]()

    class Counting(Looked):
        async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
            asked.append({each.queue for each in subscriptions})
            return await super().inspect(subscriptions)

    now, there = [0.0], [queue("tidings.order", 1), queue("tidings.other", 1), queue("tidings.order.7", 1)]
    seen = Refusals("main", Counting(*[there] * 4), known, lambda: now[0])  # type: ignore[arg-type]
    for now[0] in (0.0, 1.0, 2.0, 601.0):
        await seen.look(REFUSED)
        seen.forget()
    few = {"tidings.order", "tidings.other", "tidings.order.7"}
    assert asked[1:3] == [few, few]
    assert asked[0] == asked[3] > few


async def test_services_that_cannot_be_found_are_no_trouble() -> None:
    async def unknown() -> Sequence[Subscription]:
        raise ConfigurationError("no such service")

    seen = refusals(Looked(), unknown)
    seen.refused(REFUSED)
    await seen.look(REFUSED)
    assert seen.told == str(REFUSED)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ([queue("a", 5), queue("b", 5)], [queue("a", 5), queue("b", 6)], ["a"]),
        ([queue("a", 5), queue("b", 5)], [queue("a", 6), queue("b", 6)], []),
        ([], [queue("a", 5)], []),
        ([queue("a", 5), queue("b", 0, 1)], [queue("a", 6), queue("b", 0, 1)], []),
        ([queue("a", 5), queue("b", 9, 1)], [queue("a", 6), queue("b", 9, 1)], ["b"]),
        ([queue("a", 5), queue("b", 9, 1)], [queue("a", 5), queue("b", 9, 1)], ["a"]),
        ([queue("a", 5), queue("b", 1, 0, "differs")], [queue("a", 5), queue("b", 1, 0, "differs")], ["b"]),
    ],
    ids=[
        "it does not grow",
        "all grow",
        "seen once",
        "consumed at once",
        "consumed and still",
        "without a consumer first",
        "what differs first",
    ],
)
def test_the_queue_that_did_not_grow_is_suspected(
    before: list[TopologyItem], after: list[TopologyItem], named: list[str]
) -> None:
    found = suspected({each.name: each for each in before}, {each.name: each for each in after}, {})
    assert list(found) == named


def test_queues_named_like_partitions_that_a_service_has_not_are_strays() -> None:
    found = {part.queue for part in strays([ORDER, *(Subscription("divided", index, 3) for index in range(3))])}
    assert {"tidings.order.0", "tidings.order.7", "tidings.divided", "tidings.divided.3"} <= found
    assert not found & {"tidings.order", "tidings.divided.0", "tidings.divided.2"}


async def test_a_checkpoint_keeps_what_refuses_and_one_without_it_is_read_as_before(store: EventStore) -> None:
    await write_checkpoint(store, "main", 7, "queue 'x' refuses messages. Delete it")
    assert await read_last(store, "main") == Checkpointed(7, "queue 'x' refuses messages. Delete it")
    await write_checkpoint(store, "main", 8)
    assert await read_last(store, "main") == Checkpointed(8)


def test_ready_is_degraded_and_says_which_queue_and_what_to_do() -> None:
    facts = RelayFacts("main", leading=True, marker_age=1.0, refusing="queue 'x' refuses messages. Delete it: really")
    (check,) = [check for check in check_relay(facts) if not check.ok]
    assert (check.name, check.serious, check.remedy) == ("relay.main.queues", False, "Delete it: really")
    assert check.detail.startswith("queue 'x' refuses messages; the others get everything")


async def test_a_message_that_is_refused_is_no_lost_message_of_a_publisher(bus: MemoryBus) -> None:
    await bus.provision(OTHER)
    bus.refuse("foreign")
    async with bus.publisher() as publisher:
        with pytest.raises(QueueRefused, match="'foreign'"):
            await publisher.send(Message(body=b"", message_id="1", type="T", bucket=3))
    assert bus.queued(OTHER.queue) == 1


class Pausing(Looked):
    """A bus that answers when it is let."""

    def __init__(self, *looks: Sequence[TopologyItem]) -> None:
        super().__init__(*looks)
        self.asked, self.answers = asyncio.Event(), asyncio.Event()

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        self.asked.set()
        await self.answers.wait()
        return await super().inspect(subscriptions)


async def test_a_refusal_that_is_over_while_the_bus_is_asked_stays_forgotten() -> None:
    bus = Pausing([], [queue("tidings.order", 5)])
    bus.silent = {"tidings.order"}
    seen = refusals(bus)
    seen.refused(REFUSED)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(seen.look(REFUSED))
        await bus.asked.wait()
        seen.taken()
        bus.answers.set()
    assert seen.told is None


async def test_markers_go_on_while_the_bus_does_not_say_which_queue_refuses(
    store: EventStore, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bus.provision(ORDER)
    await bus.provision(OTHER)
    bus.refuse(ORDER.queue)
    looks, answers = 0, asyncio.Event()

    async def inspect(subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        nonlocal looks
        looks += 1
        await answers.wait()
        return []

    monkeypatch.setattr(bus, "inspect", inspect)
    async with relaying(store, bus) as relay:
        await until(lambda: looks == 1)
        there = bus.queued(OTHER.queue)
        await until(lambda: bus.queued(OTHER.queue) >= there + 5)
        assert looks == 1, "one look after the other"
        bus.refuse(ORDER.queue, False)
        await until(lambda: relay.refusals.told is None)
        answers.set()
