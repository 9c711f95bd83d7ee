"""The users of `tidings topology export` on a real RabbitMQ: what they may not do is refused, and the path runs."""

from __future__ import annotations

import asyncio
import json
import re
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiormq
import pytest
from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.exceptions import AMQPConnectionError, ChannelAccessRefused

from tests.unit.command_line import Ended, invoke
from tidings import Event, EventData, Relay, Runtime, Service, Settings, open_bus, open_store
from tidings.buses import Subscription
from tidings.buses.rabbitmq.permissions import CHANNELS, CONNECTIONS, STREAMS, definitions, password_hash
from tidings.database.engine import open_database
from tidings.database.layout import lay_out, resize
from tidings.errors import BusUnavailable, QueueRefused
from tidings.protocol.message import Message
from tidings.testing.brokers import RabbitMQNode
from tidings.testing.bus_conformance import event
from tidings.testing.bus_conformance import take as take_deliveries

RELAY, STANDBY, ORDER, HISTORY = "tidings.relay.main", "tidings.relay.other", "tidings.order", "tidings.order-history"
EXCHANGE, PARTITIONS = "tidings.events", "tidings.partitions"
PARTS = 3
"""Partitions that service `order` may have."""


class Placed(Event):
    number: int


order, history = Service("order"), Service("order-history")
arrived: Final[dict[str, list[int]]] = {"order": [], "order-history": []}


@order.on(Placed)
async def take(event: Placed) -> None:
    arrived["order"].append(event.number)


@history.on(Placed)
async def note(event: Placed) -> None:
    arrived["order-history"].append(event.number)


def exported(monkeypatch: pytest.MonkeyPatch, bus: str, *options: str) -> Ended:
    monkeypatch.setenv("TIDINGS_BUS", bus)
    targets = [f"{__name__}:{name}" for name in ("order", "history")]
    return invoke("topology", "export", *targets, "--relay=main", "--relay=other", *options)


class Broker:
    """A vhost with imported users, and the URL of each."""

    def __init__(self, node: RabbitMQNode, admin: str, passwords: Mapping[str, str], definitions: Path) -> None:
        self.node, self.admin, self.definitions = node, admin, definitions
        self._passwords = passwords

    def url(self, user: str) -> str:
        parts = urlsplit(self.admin)
        return f"amqp://{user}:{self._passwords[user]}@{parts.hostname}:{parts.port}{parts.path}"

    def restore(self) -> None:
        """Import the definitions again, as an administrator does after something was deleted."""
        self.node.rabbitmqctl("import_definitions", str(self.definitions))


@pytest.fixture(scope="module")
def broker(rabbitmq_node: RabbitMQNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    folder = tmp_path_factory.mktemp("users")
    secrets, definitions = folder / "secrets.json", folder / "definitions.json"
    admin = rabbitmq_node.add_vhost()
    with pytest.MonkeyPatch.context() as monkeypatch:
        ended = exported(monkeypatch, admin, f"--secrets={secrets}", f"--partitions=order={PARTS}")
    assert (ended.code, ended.err) == (0, "")
    definitions.write_text(ended.out)
    made = Broker(rabbitmq_node, admin, json.loads(secrets.read_bytes()), definitions)
    made.restore()
    yield made
    rabbitmq_node.delete_vhost(admin)


@asynccontextmanager
async def channel(url: str) -> AsyncIterator[AbstractChannel]:
    connection = await aiormq.connect(url)
    try:
        yield await connection.channel()
    finally:
        await connection.close()


@pytest.fixture
async def queues(broker: Broker) -> AsyncIterator[AbstractChannel]:
    """Let each service create its queue. Yields the administrator's channel."""
    for user, name in ((ORDER, "order"), (HISTORY, "order-history")):
        async with open_bus(broker.url(user)) as bus:
            await bus.provision(Subscription(name))
    async with channel(broker.admin) as administrator:
        for queue in (ORDER, HISTORY):
            await administrator.queue_purge(queue)
        yield administrator


async def nothing(message: DeliveredMessage) -> None:
    """Do nothing with a message."""


Attempt = Callable[[AbstractChannel], Awaitable[object]]
OTHERS: dict[str, Attempt] = {
    "read another's queue": lambda channel: channel.basic_get(HISTORY),
    "consume another's queue": lambda channel: channel.basic_consume(HISTORY, nothing),
    "empty another's queue": lambda channel: channel.queue_purge(HISTORY),
    "delete another's queue": lambda channel: channel.queue_delete(HISTORY),
    "unbind another's queue": lambda channel: channel.queue_unbind(HISTORY, EXCHANGE),
    "bind another's queue": lambda channel: channel.queue_bind(HISTORY, EXCHANGE),
    "make a partition of another": lambda channel: channel.queue_declare(f"{HISTORY}.0"),
    "make a partition that it has not": lambda channel: channel.queue_declare(f"{ORDER}.7"),
    "make a partition of any number": lambda channel: channel.queue_declare(f"{ORDER}.{'9' * 80}"),
    "make a partition with a zero before its number": lambda channel: channel.queue_declare(f"{ORDER}.01"),
    "make a queue below its own": lambda channel: channel.queue_declare(f"{ORDER}.0.more"),
    "make a queue whose name begins as its own": lambda channel: channel.queue_declare(f"{ORDER}0"),
    "make any queue": lambda channel: channel.queue_declare("mine"),
    "make a queue that the broker names": lambda channel: channel.queue_declare(""),
    "delete the events' exchange": lambda channel: channel.exchange_delete(EXCHANGE),
    "delete the partitions' exchange": lambda channel: channel.exchange_delete(PARTITIONS),
    "make an exchange": lambda channel: channel.exchange_declare("mine"),
    "bind the exchanges": lambda channel: channel.exchange_bind(PARTITIONS, EXCHANGE),
    "unbind the exchanges": lambda channel: channel.exchange_unbind(PARTITIONS, EXCHANGE),
    "publish to partitions": lambda channel: channel.basic_publish(b"{}", exchange=PARTITIONS, routing_key="marker"),
    "publish into another's queue": lambda channel: channel.basic_publish(b"{}", routing_key=HISTORY),
    "publish into its own queue": lambda channel: channel.basic_publish(b"{}", routing_key=ORDER),
}
OF_A_SERVICE: dict[str, Attempt] = {
    **OTHERS,
    "publish an event": lambda channel: channel.basic_publish(b"{}", exchange=EXCHANGE),
    "hold a relay's lock": lambda channel: channel.queue_declare(RELAY, exclusive=True),
}
OF_A_RELAY: dict[str, Attempt] = {
    **OTHERS,
    "read a service's queue": lambda channel: channel.basic_get(ORDER),
    "consume a service's queue": lambda channel: channel.basic_consume(ORDER, nothing),
    "delete a service's queue": lambda channel: channel.queue_delete(ORDER),
    "hold another relay's lock": lambda channel: channel.queue_declare(STANDBY, exclusive=True),
    "read its own lock": lambda channel: channel.basic_get(RELAY),
}


async def refused(url: str, attempt: Attempt) -> None:
    """Assert that the broker refuses with 403. It refuses a publish by closing the channel, which ends the wait for the
    confirm."""
    async with channel(url) as trying:
        await trying.confirm_delivery()
        with pytest.raises(ChannelAccessRefused, match="ACCESS_REFUSED"):
            await attempt(trying)


@pytest.mark.parametrize("attempt", OF_A_SERVICE.values(), ids=OF_A_SERVICE)
async def test_a_service_may_not(broker: Broker, queues: AbstractChannel, attempt: Attempt) -> None:
    await refused(broker.url(ORDER), attempt)
    for queue in (ORDER, HISTORY):
        assert (await queues.queue_declare(queue, passive=True)).message_count == 0


@pytest.mark.parametrize("attempt", OF_A_RELAY.values(), ids=OF_A_RELAY)
async def test_a_relay_may_not(broker: Broker, queues: AbstractChannel, attempt: Attempt) -> None:
    async with open_bus(broker.url(RELAY)) as bus, bus.publisher(lock="main"):
        await refused(broker.url(RELAY), attempt)


@pytest.mark.parametrize("user", [RELAY, ORDER])
async def test_nobody_enters_another_vhost(broker: Broker, user: str) -> None:
    elsewhere = broker.url(user).replace(urlsplit(broker.admin).path, "/%2F")
    async with open_bus(elsewhere) as bus:
        with pytest.raises(BusUnavailable, match=f"530 NOT_ALLOWED.*'{user}'"):
            await bus.provision()


async def test_a_service_may_make_bind_consume_and_delete_each_of_its_partitions(broker: Broker) -> None:
    parts = [Subscription("order", index, PARTS) for index in range(PARTS)]
    async with open_bus(broker.url(ORDER)) as bus, open_bus(broker.url(RELAY)) as relay:
        for part in parts:
            await bus.provision(part)
        assert [found.state for found in await bus.inspect(parts)] == ["fits"] * 5
        for part in parts:
            async with relay.publisher() as publisher, bus.consume(part) as consumer:
                await publisher.send(message := in_bucket(part.buckets[0]))
                (delivery,) = await take_deliveries(consumer, 1)
                assert delivery.message == message
                consumer.settle_through(delivery.tag)
    async with channel(broker.url(ORDER)) as own:
        for part in parts:
            await own.queue_unbind(part.queue, PARTITIONS, "marker")
            await own.queue_delete(part.queue)


def in_bucket(bucket: int) -> Message:
    return next(made for number in range(10_000) if (made := event(1, stream=f"order-{number}")).bucket == bucket)


async def test_the_whole_path_runs_with_these_users_and_topology_has_nothing_to_say(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay and a service may inspect, create, hold the lock, stand by, publish, consume, and find a deleted queue
    again."""
    log, database = f"sqlite:///{tmp_path}/log.db", f"sqlite:///{tmp_path}/{{service}}.db"
    for taken in arrived.values():
        taken.clear()
    async with (
        open_store(log) as store,
        open_bus(broker.url(RELAY)) as ours,
        open_bus(broker.url(RELAY)) as theirs,
        Runtime(order, settings=Settings(bus=broker.url(ORDER), store=log, database=database)) as runtime,
        Runtime(history, settings=Settings(bus=broker.url(HISTORY), store=log, database=database)),
    ):
        relays = [asyncio.create_task(Relay(store, bus, marker_seconds=0.2).run()) for bus in (ours, theirs)]
        try:
            await all_take(runtime, 0, 50)
            async with channel(broker.url(ORDER)) as own:  # as a service may do with its own
                await own.queue_delete(ORDER)
            await all_take(runtime, 50, 100)
            for user, target in ((ORDER, "order"), (HISTORY, "history")):
                monkeypatch.setenv("TIDINGS_BUS", broker.url(user))
                ended = await asyncio.to_thread(invoke, "topology", "diff", f"{__name__}:{target}")
                assert (ended.code, ended.out) == (0, "No differences.\n")
                ended = await asyncio.to_thread(invoke, "topology", "apply", f"{__name__}:{target}")
                assert ended.code == 0, ended
        finally:
            for relay in relays:
                relay.cancel()
            await asyncio.gather(*relays, return_exceptions=True)


async def all_take(runtime: Runtime, begin: int, end: int) -> None:
    for number in range(begin, end):
        data = json.dumps({"number": number}).encode()
        await runtime.store.append("order-1", [EventData("Placed", data)])
    async with asyncio.timeout(60):
        while any(taken != list(range(end)) for taken in arrived.values()):
            await asyncio.sleep(0.02)


async def test_what_only_an_administrator_makes_is_asked_of_him_and_then_found(broker: Broker) -> None:
    async with channel(broker.admin) as administrator:
        await administrator.exchange_delete(EXCHANGE)
    for user, subscription in ((RELAY, None), (ORDER, Subscription("order"))):
        async with open_bus(broker.url(user)) as bus:
            with pytest.raises(BusUnavailable, match=r"403 ACCESS_REFUSED.*tidings topology export"):
                await bus.provision(subscription)
            await asyncio.to_thread(broker.restore)
            await bus.provision(subscription)
        async with channel(broker.admin) as administrator:
            await administrator.exchange_delete(EXCHANGE)
    await asyncio.to_thread(broker.restore)


async def test_without_passwords_nobody_can_log_in_before_he_is_given_one(
    rabbitmq_node: RabbitMQNode, harmed_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDINGS_BUS", harmed_url)
    ended = await asyncio.to_thread(invoke, "topology", "export", f"{__name__}:order", "--relay=unlocked")
    assert ended.code == 0
    assert "have no passwords" in ended.err
    users = {user["name"] for user in json.loads(ended.out)["users"]}
    assert users == {ORDER, "tidings.relay.unlocked"}
    definitions = tmp_path / "definitions.json"
    definitions.write_text(ended.out.replace(ORDER, "tidings.locked"))
    await asyncio.to_thread(rabbitmq_node.rabbitmqctl, "import_definitions", str(definitions))
    parts = urlsplit(harmed_url)
    for user in ("tidings.locked", "tidings.relay.unlocked"):
        for password in ("", "guest", user):
            with pytest.raises(AMQPConnectionError, match="ACCESS_REFUSED"):
                await aiormq.connect(f"amqp://{user}:{password}@{parts.hostname}:{parts.port}{parts.path}")
    await asyncio.to_thread(rabbitmq_node.rabbitmqctl, "change_password", "tidings.relay.unlocked", "g1ven")
    async with open_bus(f"amqp://tidings.relay.unlocked:g1ven@{parts.hostname}:{parts.port}{parts.path}") as bus:
        await bus.provision()


def test_a_password_is_hashed_as_rabbitmq_documents_it() -> None:
    """The hash agrees with the example of rabbitmq.com/docs/passwords."""
    assert password_hash("test12", bytes.fromhex("908DC60A")) == "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    assert password_hash("same") != password_hash("same")


@pytest.mark.parametrize("service", ["order", "a-b_c", "0"])
@pytest.mark.parametrize("relay", ["main", "x.y*", "[a-z]+|.*", "é (1)"])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_a_pattern_matches_its_own_names_and_no_others(service: str, relay: str, count: int) -> None:
    parts = [Subscription(service), *(Subscription(service, index, 256) for index in range(count))]
    ours, theirs = definitions("/", parts, [relay], {})["permissions"]
    own = [part.queue for part in parts]
    lock = f"tidings.relay.{relay}"
    others = [
        *(f"tidings.{service}{end}" for end in ("x", "-history", ".", ".0.1", ".a", ".-1", "0", " ", ".00", ".01")),
        *(f"tidings.{service}.{number}" for number in (count, 13, 110, 255, "9" * 80)),
        f"tidingsx{service}",
        *(f"{begin}tidings.{service}" for begin in ("x", ".", "tidings.")),
        *(
            "tidings.relay.",
            f"{lock}x",
            f"x{lock}",
            "tidings.relay.other",
            f"tidings-{service}",
            "amq.default",
            "",
            "tidings",
        ),
    ]
    names = [*own, lock, EXCHANGE, PARTITIONS, *others]

    def matched(pattern: str) -> list[str]:
        return [name for name in names if re.search(pattern, name)]

    assert matched(ours["configure"]) == [lock]
    assert matched(ours["write"]) == [EXCHANGE]
    assert matched(ours["read"]) == [""], "no queue and no exchange is called that"
    assert matched(theirs["configure"]) == matched(theirs["write"]) == own
    assert matched(theirs["read"]) == [*own, EXCHANGE, PARTITIONS]


def test_passwords_are_made_once_kept_for_their_owner_alone_and_never_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = tmp_path / "secrets.json"
    secrets.write_text(json.dumps({ORDER: "ch0sen", "somebody": "else"}))
    bus = "amqp://admin:hush@nobody.invalid/shop"
    first, second = (exported(monkeypatch, bus, f"--secrets={secrets}") for _ in range(2))
    kept = json.loads(secrets.read_bytes())
    assert set(kept) == {RELAY, STANDBY, ORDER, HISTORY, "somebody"}
    assert (kept[ORDER], kept["somebody"]) == ("ch0sen", "else")
    assert len({*kept.values()}) == 5
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
    for ended in (first, second):
        assert ended.code == 0
        assert not any(secret in ended.out + ended.err for secret in (*kept.values(), "hush"))
        assert {part["vhost"] for part in json.loads(ended.out)["permissions"]} == {"shop"}
    assert list(tmp_path.iterdir()) == [secrets]


@pytest.mark.parametrize("content", ["{", "[]", '{"tidings.order": 1}', '{"tidings.order": ""}', "[" * 100_000])
def test_a_file_of_passwords_that_is_none_is_refused_without_a_word_of_it(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = tmp_path / "secrets.json"
    secrets.write_text(content)
    ended = exported(monkeypatch, "amqp://host/shop", f"--secrets={secrets}")
    assert (ended.code, ended.out) == (2, "")
    assert "secrets.json' cannot be kept" in ended.err
    assert secrets.read_text() == content


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_services_own_queue_holds_up_nobody_however_it_was_declared(broker: Broker, kind: str) -> None:
    """The exported policy lets a quorum queue drop messages that it was declared to refuse. A classic one refuses, and
    the relay goes on."""
    hostile: dict[str, Any] = {"x-queue-type": kind, "x-max-length": 1, "x-overflow": "reject-publish"}
    history = Subscription("order-history")
    async with channel(broker.url(ORDER)) as own, open_bus(broker.url(HISTORY)) as others:
        await others.provision(history)
        await own.queue_declare(f"{ORDER}.2", durable=True, arguments=hostile)
        await own.queue_bind(f"{ORDER}.2", EXCHANGE)
        try:
            async with open_bus(broker.url(RELAY)) as relay, relay.publisher() as publisher:
                sent = [event(number) for number in range(1, 6)]
                outcomes = await asyncio.gather(*map(publisher.send, sent), return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} <= {type(None), QueueRefused}
            assert (QueueRefused in map(type, outcomes)) == (kind == "classic")
            async with others.consume(history) as consumer:
                deliveries = await take_deliveries(consumer, 5)
                assert [delivery.message for delivery in deliveries] == sent
                consumer.settle_through(deliveries[-1].tag)
        finally:
            await own.queue_delete(f"{ORDER}.2")
            await own.queue_delete(ORDER)


async def test_what_a_service_declares_as_a_stream_is_bounded_too(broker: Broker) -> None:
    """The first policy has an overflow, which no stream knows, so RabbitMQ passes it over there."""
    async with channel(broker.url(ORDER)) as own:
        await own.queue_declare(f"{ORDER}.2", durable=True, arguments={"x-queue-type": "stream"})
        try:
            vhost = urlsplit(broker.admin).path[1:]
            listed = await asyncio.to_thread(
                broker.node.rabbitmqctl, "list_queues", "--vhost", vhost, "--quiet", "name", "policy"
            )
            assert [f"{ORDER}.2", STREAMS] in [line.split() for line in listed.splitlines()]
        finally:
            await own.queue_delete(f"{ORDER}.2")


async def test_a_user_has_so_many_connections_and_no_more(rabbitmq_node: RabbitMQNode, harmed_url: str) -> None:
    parts = urlsplit(harmed_url)
    vhost = parts.path[1:]
    made = definitions(vhost, [Subscription("crowd")], [], {"tidings.crowd": "w0rd"})
    (user,) = made["users"]
    assert user["limits"] == {"max-connections": CONNECTIONS, "max-channels": CHANNELS * CONNECTIONS}
    url = f"amqp://tidings.crowd:w0rd@{parts.hostname}:{parts.port}{parts.path}"
    user["limits"] = {"max-connections": 2}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(made, file)
        file.flush()
        await asyncio.to_thread(rabbitmq_node.rabbitmqctl, "import_definitions", file.name)
    opened = [await aiormq.connect(url) for _ in range(2)]
    async with open_bus(url) as bus:
        with pytest.raises(BusUnavailable, match=r"user connection limit \(2\) is reached"):
            await bus.provision(Subscription("crowd"))
        for connection in opened:
            await connection.close()
        async with asyncio.timeout(30):
            while True:
                try:
                    await bus.provision(Subscription("crowd"))
                    break
                except BusUnavailable:
                    await asyncio.sleep(0.1)


@pytest.mark.parametrize("given", ["order", "order=0", "order=257", "order=x", "unknown=2", "order=-1", "=2"])
def test_partitions_that_cannot_be_are_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = exported(monkeypatch, "amqp://host/shop", f"--partitions={given}")
    assert (ended.code, ended.out) == (2, "")
    assert "write NAME=COUNT" in ended.err


def test_a_divided_service_may_make_its_queues_and_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDINGS_DATABASE", f"sqlite:///{tmp_path}/{{service}}.db")

    async def divide() -> None:
        async with open_database(f"sqlite:///{tmp_path}/order.db") as database:
            await lay_out(database, "order", 4)
            await resize(database, "order", 2)

    asyncio.run(divide())
    ended = exported(monkeypatch, "amqp://host/shop")
    (mine,) = [one for one in json.loads(ended.out)["permissions"] if one["user"] == ORDER]
    names = [ORDER, *(f"{ORDER}.{number}" for number in range(5))]
    assert [name for name in names if re.search(mine["configure"], name)] == names[:5]
