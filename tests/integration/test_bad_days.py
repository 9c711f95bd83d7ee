"""Days on which nothing works as it should, with real processes: what is said, and that nothing is lost afterwards."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from tests.integration.processes import (
    Worker,
    Workers,
    audit_of,
    proves_every_effect_once_in_order,
    tick,
    until,
)
from tidings import Event, EventStore, Runtime, Service, Settings, open_store
from tidings.database import dead
from tidings.errors import StoreUnavailable
from tidings.stores import EventData
from tidings.stores.sqlite import open_sqlite
from tidings.testing.brokers import RabbitMQNode

SOME = 100
HOUR = 3600


pytestmark = pytest.mark.faults


@pytest.fixture
async def workers(tmp_path: Path, harmed_url: str) -> AsyncIterator[Workers]:
    with Workers(tmp_path, harmed_url) as found:
        yield found


@pytest.fixture
async def store(workers: Workers) -> AsyncIterator[EventStore]:
    async with open_store(workers.store) as opened:
        yield opened


async def says(worker: Worker, *words: str, seconds: float = 60) -> str:
    """Wait for one line of its log that has all these words."""

    def found() -> str | None:
        return next((line for line in worker.log.splitlines() if all(word in line for word in words)), None)

    await until(lambda: found() is not None or not worker.alive, f"{words} in a line of the log", seconds)
    line = found()
    assert line is not None, f"it ended, and never said {words}:\n{worker.log[-2000:]}"
    return line


async def all_arrive(workers: Workers, count: int, seconds: float = 60) -> None:
    await until(lambda: len(audit_of(workers.database())) >= count, f"{count} effects", seconds)


def floor_of(database: Path) -> int:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
        (found,) = connection.execute("SELECT max(position) FROM tidings_floors").fetchone()
    return int(found)


async def floor_reaches(database: Path, position: int) -> None:
    await until(lambda: floor_of(database) >= position, f"markers raise the floor to {position}", 20)


# ---- the broker ----------------------------------------------------------------------------------------------------


async def test_without_a_broker_at_the_start_relay_and_service_wait_and_say_so(
    workers: Workers, store: EventStore, rabbitmq_node: RabbitMQNode
) -> None:
    await asyncio.to_thread(rabbitmq_node.stop)
    service, relay = workers.start("service"), workers.start("relay")
    await tick(store, 0, SOME)
    place = urlsplit(workers.bus)
    for worker, event in ((service, "bus.unreachable"), (relay, "relay.interrupted")):
        line = await says(worker, event)
        assert f"RabbitMQ at {place.hostname}:{place.port}" in line
        assert "check host and port in TIDINGS_BUS" in line
        assert str(place.password) not in worker.log
    await asyncio.to_thread(rabbitmq_node.start)
    await all_arrive(workers, SOME)
    proves_every_effect_once_in_order(workers.database(), SOME)


@contextmanager
def user(node: RabbitMQNode, url: str, password: str) -> Iterator[tuple[str, Callable[..., str]]]:
    """A user of the vhost, and what sets its permissions (configure, write, read) by patterns."""
    place, name = urlsplit(url).path[1:], f"user{uuid4().hex[:8]}"
    node.rabbitmqctl("add_user", name, password)

    def permit(*patterns: str) -> str:
        return node.rabbitmqctl("set_permissions", "--vhost", place, name, *patterns)

    permit(".*", ".*", ".*")
    try:
        yield name, permit
    finally:
        node.rabbitmqctl("delete_user", name)


async def test_a_wrong_password_is_named_and_waited_for(
    workers: Workers, store: EventStore, rabbitmq_node: RabbitMQNode
) -> None:
    host = workers.bus.rpartition("@")[2]
    with user(rabbitmq_node, workers.bus, "right") as (name, _):
        workers.bus = f"amqp://{name}:wr%40ng@{host}"
        service, relay = workers.start("service"), workers.start("relay")
        await tick(store, 0, SOME)
        for worker, event in ((service, "bus.unreachable"), (relay, "relay.interrupted")):
            line = await says(worker, event, "403", f"user '{name}'")
            assert "Check user and password in TIDINGS_BUS" in line
            assert "wr%40ng" not in worker.log
            assert "wr@ng" not in worker.log
        await asyncio.to_thread(rabbitmq_node.rabbitmqctl, "change_password", name, "wr@ng")
        await all_arrive(workers, SOME)
        proves_every_effect_once_in_order(workers.database(), SOME)
        assert [await service.stop(), relay.alive] == [0, True]


async def test_permissions_that_are_revoked_and_granted_again_lose_nothing(
    workers: Workers, store: EventStore, rabbitmq_node: RabbitMQNode
) -> None:
    place, host = urlsplit(workers.bus).path[1:], workers.bus.rpartition("@")[2]
    with user(rabbitmq_node, workers.bus, "pass") as (name, permit):
        workers.bus = f"amqp://{name}:pass@{host}"
        service, relay = workers.start("service"), workers.start("relay")
        await tick(store, 0, SOME)
        await all_arrive(workers, SOME)
        await asyncio.to_thread(permit, "^$", "^$", "^$")
        # RabbitMQ asks for permissions when a channel does something new: who is connected goes on for a while.
        command = ("close_all_connections", "--vhost", place, "permissions changed")
        await asyncio.to_thread(rabbitmq_node.rabbitmqctl, *command)
        await tick(store, SOME, SOME)
        for worker, event in ((service, "bus.unreachable"), (relay, "relay.interrupted")):
            line = await says(worker, event, "403", "access to")
            assert f"rabbitmqctl set_permissions --vhost {place} {name}" in line
        assert len(audit_of(workers.database())) < 2 * SOME
        await asyncio.to_thread(permit, ".*", ".*", ".*")
        await all_arrive(workers, 2 * SOME)
        proves_every_effect_once_in_order(workers.database(), 2 * SOME)


# ---- the disk ------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of some kilobytes."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def fill(self) -> None:
        """Leave no block free."""
        with (self.place / "other-files").open("ab", buffering=0) as file:
            size = 1 << 16
            while size:
                try:
                    file.write(b"x" * size)
                except OSError:
                    size >>= 1

    def free(self) -> None:
        (self.place / "other-files").unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tidings-test", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode != 0:
        said = "" if done is None else done.stderr.strip()
        pytest.skip(f"no file system can be mounted here ({said}): run as root, in a container with CAP_SYS_ADMIN")
    try:
        yield SmallDisk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


async def test_a_store_on_a_full_disk_refuses_loses_nothing_and_goes_on(
    workers: Workers, small_disk: SmallDisk
) -> None:
    workers.store = f"sqlite:///{small_disk.place}/events.db"
    service, relay = workers.start("service"), workers.start("relay")
    async with open_store(workers.store) as store:
        await tick(store, 0, SOME)
        await all_arrive(workers, SOME)
        small_disk.fill()
        acknowledged = SOME

        async def append_until_refused() -> None:
            nonlocal acknowledged
            while True:
                await tick(store, acknowledged, 1)
                acknowledged += 1

        async def relay_is_refused_too() -> None:
            """Its checkpoint may have found the last free page: then there must be more to write."""
            while "relay.interrupted" not in relay.log:
                with suppress(StoreUnavailable):
                    await append_until_refused()
                await asyncio.sleep(0.2)

        with pytest.raises(StoreUnavailable, match=r"events\.db failed: .*full.*free some and try again"):
            await append_until_refused()
        async with asyncio.timeout(60):
            await relay_is_refused_too()
        await says(relay, "relay.interrupted", "full", "free some")
        small_disk.free()
        await tick(store, acknowledged, SOME)
        await all_arrive(workers, acknowledged + SOME)
        assert (service.alive, relay.alive) == (True, True)
    proves_every_effect_once_in_order(workers.database(), acknowledged + SOME)


async def test_a_store_is_opened_on_a_full_disk_or_says_why_not(small_disk: SmallDisk) -> None:
    url = f"sqlite:///{small_disk.place}/events.db"
    small_disk.fill()
    with pytest.raises(StoreUnavailable, match="full"):
        async with open_store(url):
            pass
    small_disk.free()
    async with open_store(url) as store:
        await tick(store, 0, 1)


async def refusing_pauses_the_service(
    workers: Workers, store: EventStore, service: Worker, refusing: AbstractContextManager[None], *words: str
) -> None:
    """Feeds the service while its database is refused room, and sees that it goes on afterwards."""
    await tick(store, 0, SOME)
    await all_arrive(workers, SOME)
    with refusing:
        feeding = asyncio.create_task(tick(store, SOME, 5 * SOME))
        line = await says(service, "service.rejoining", *words)
        assert "audit.db" in line
        assert "Nothing is lost" in line
    await feeding
    await all_arrive(workers, 6 * SOME)
    proves_every_effect_once_in_order(workers.database(), 6 * SOME)
    assert service.alive


async def test_a_database_on_a_full_disk_pauses_the_service_and_nothing_is_lost(
    workers: Workers, store: EventStore, small_disk: SmallDisk
) -> None:
    workers.database().symlink_to(small_disk.place / "audit.db")
    service = workers.start("service")
    workers.start("relay")

    @contextmanager
    def full() -> Iterator[None]:
        small_disk.fill()
        yield
        small_disk.free()

    await refusing_pauses_the_service(workers, store, service, full(), "the disk is full: free some space")


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux can limit a process that runs already")
async def test_a_database_over_its_quota_pauses_the_service_and_nothing_is_lost(
    workers: Workers, store: EventStore
) -> None:
    service = workers.start("service")
    workers.start("relay")

    @contextmanager
    def limited() -> Iterator[None]:
        """No file of the process may grow beyond what the database's log has now, and a little."""
        size = workers.database().with_suffix(".db-wal").stat().st_size + 50_000
        _, hard = resource.prlimit(service.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (size, hard))
        yield
        resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (hard, hard))

    await refusing_pauses_the_service(workers, store, service, limited(), "the disk failed or is full")


# ---- the clock -----------------------------------------------------------------------------------------------------

CLOCK = """
import time
from pathlib import Path
_real = time.time_ns
def _shifted():
    try:
        return _real() + int(Path({path!r}).read_text()) * 10**9
    except (OSError, ValueError):
        return _real()
time.time_ns = _shifted
time.time = lambda: _shifted() / 1e9
"""


async def test_a_clock_that_jumps_an_hour_forward_and_back_changes_nothing(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A jump reaches the time of day alone. What waits goes by `time.monotonic`, which never jumps; held events are the
    exception, because they wait over restarts."""
    shift = workers.folder / "shift"
    patch = workers.folder / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(CLOCK.format(path=str(shift)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(patch), os.environ.get("PYTHONPATH")])))
    base = 17_000_000_000_000_000  # ticks of 100 ns
    hours = 0

    store = await open_sqlite(workers.store, clock=lambda: base + hours * HOUR * 10_000_000)

    async def quiet() -> int:
        """An event that is not carried: only a marker of the idle relay says that the log goes so far."""
        return (await store.append("tidings_test", [EventData("tidings_Test", b"{}")])).position

    try:
        service, relay = workers.start("service"), workers.start("relay")
        for number, hours in enumerate((1, 0, -1, 0)):
            await tick(store, number * SOME, SOME)
            await all_arrive(workers, (number + 1) * SOME)
            await floor_reaches(workers.database(), await quiet())
            # While relay and service are idle, so that nothing else starts their timers anew.
            shift.write_text(str(hours * HOUR))
            await floor_reaches(workers.database(), await quiet())
        times = [event.ticks async for event in store.read_all() if event.type == "Ticked"]
        versions = [event.version async for event in store.read_stream("ticks-0")]
    finally:
        await store.close()
    assert times != sorted(times), "the clock did jump"
    assert versions == list(range(len(versions)))
    proves_every_effect_once_in_order(workers.database(), 4 * SOME)
    for worker in (service, relay):
        assert worker.alive
        assert "interrupted" not in worker.log
        assert "rejoining" not in worker.log


# ---- the same service twice ----------------------------------------------------------------------------------------


async def test_an_embedded_service_started_twice_does_everything_once_and_says_so(tmp_path: Path) -> None:
    with Workers(tmp_path, "memory://") as workers:
        async with open_store(workers.store) as store:
            first, second = workers.start("service"), workers.start("service")
            await says(first, "service.connected")
            await says(second, "service.connected")
            await tick(store, 0, 5 * SOME)
            await all_arrive(workers, 5 * SOME)
            assert (first.alive, second.alive) == (True, True)
            question = "Are two processes of the service active at once?"
            await until(lambda: question in first.log + second.log, "the one that came too late says so")
            first.kill()
            await tick(store, 5 * SOME, SOME)
            await all_arrive(workers, 6 * SOME)
        proves_every_effect_once_in_order(workers.database(), 6 * SOME)


# ---- yesterday's code beside today's -------------------------------------------------------------------------------


class Placed(Event, name="Placed", version=2, key="order_id"):
    order_id: str
    country: str


class Shipped(Event, name="Shipped", key="order_id"):
    order_id: str
    carrier: str
    weight: int


class Insured(Event, name="Insured", key="order_id"):
    order_id: str


class PlacedYesterday(Event, name="Placed", key="order_id"):
    order_id: str


class ShippedYesterday(Event, name="Shipped", key="order_id"):
    order_id: str


async def test_yesterdays_service_beside_todays_loses_nothing_and_says_what_it_cannot_read(tmp_path: Path) -> None:
    seen: list[str] = []
    today, yesterday = Service("today"), Service("yesterday")

    @today.on(Placed, Shipped, Insured)
    async def handle(event: Placed | Shipped | Insured) -> None:
        seen.append(f"today {event.wire_name} {event.order_id}")

    @yesterday.on(PlacedYesterday, ShippedYesterday)
    async def handle_as_yesterday(event: PlacedYesterday | ShippedYesterday) -> None:
        seen.append(f"yesterday {event.wire_name} {event.order_id}")

    settings = Settings(store=f"sqlite:///{tmp_path}/events.db", database=f"sqlite:///{tmp_path}/{{service}}.db")
    with capture_logs() as logs:
        async with Runtime(today, yesterday, settings=settings) as runtime:
            await today.append("order-a", Shipped(order_id="a", carrier="ship", weight=3), Insured(order_id="a"))
            await today.append("order-b", placed := Placed(order_id="b", country="Iceland"))
            report = await runtime.settled()
            async with runtime.engine(yesterday).connect() as connection:
                (letter,) = (await connection.execute(sa.select(dead))).all()
    assert sorted(seen) == ["today Insured a", "today Placed b", "today Shipped a", "yesterday Shipped a"]
    said = "schema version 2, this service knows up to 1: deploy the service with the newer declaration, then retry"
    assert (letter.service, letter.type, letter.stream) == ("yesterday", "Placed", "order-b")
    assert letter.data == placed.model_dump_json().encode(), "the whole event is kept"
    assert said in letter.reason
    (line,) = [line for line in logs if line["log_level"] == "error"]
    assert line["service"] == "yesterday"
    assert said in line["reason"]
    assert "dead" in str(report)


async def test_a_database_of_tomorrows_tidings_ends_the_process_with_the_remedy(tmp_path: Path) -> None:
    with Workers(tmp_path, "memory://") as workers:
        service = workers.start("service")
        await says(service, "service.connected")
        assert await service.stop() == 0
        with closing(sqlite3.connect(workers.database())) as connection, connection:
            connection.execute("UPDATE tidings_schema SET version = version + 1")
        before = workers.database().read_bytes()
        refused = workers.start("service")
        await until(lambda: not refused.alive, "the process ends")
        assert "audit.db has Tidings tables of version" in refused.log
        assert "upgrade it" in refused.log
        assert workers.database().read_bytes() == before
