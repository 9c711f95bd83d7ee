"""What `tidings status` calls unhealthy, over a real store and a bus that says what the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.command_line import OrderCreated, Poisoned, invoke, run_shop, shop
from tidings import EventStore, Settings, open_store
from tidings.buses import EventBus, Found, Subscription
from tidings.cli.state import LATE, State, look
from tidings.errors import BusUnavailable
from tidings.stores import ANY, EventData

SHOP = "tests.unit.command_line:shop"
FITS = Found("queue", "tidings.shop", "fits", "", 3, 1)


class StubBus:
    """Only inspected: `queue` is what is found of the service's queue; None: the bus is away."""

    def __init__(self, queue: Found | None) -> None:
        self._queue = queue

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[Found]:
        if self._queue is None:
            raise BusUnavailable("nobody is there. Start the broker.")
        return [Found("exchange", "tidings.events", "fits"), self._queue]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STORE", "BUS", "DATABASE", "SERVICES", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seen(*, queue: Found | None = FITS, bus: str = "amqp://host", later: float = 0.0) -> State:
    """One look, `later` seconds from now."""

    async def work() -> State:
        import time

        settings = Settings(bus=bus, database="sqlite:///{service}.db")
        async with open_store(settings.store) as store:
            stub = cast("EventBus", StubBus(queue))
            return await look(settings, store, stub, {SHOP: shop}, now=time.time() + later)

    return asyncio.run(work())


def write(*events: tuple[str, str], checkpoint: int | None = None) -> None:
    """Streams and types, while nothing runs."""

    async def work(store: EventStore) -> None:
        for stream, name in events:
            await store.append(stream, [EventData(name, b'{"order_id": "1"}')], expected=ANY)
        if checkpoint is not None:
            done = EventData("tidings_Checkpoint", b'{"position": %d}' % checkpoint)
            await store.append("tidings_relay-main", [done], expected=ANY)

    async def opened() -> None:
        async with open_store(Settings().store) as store:
            await work(store)

    asyncio.run(opened())


def test_all_is_well_when_everything_is_published_handled_and_consumed(folder: Path) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    write(checkpoint=2)
    state = seen(later=10 * LATE)
    assert state.problems == []
    (part,) = state.services
    assert (part.pending, part.held, part.staged, part.dead) == (0, 0, 0, 0)
    assert (part.queue, part.ready, part.consumers) == ("fits", 3, 1)
    assert (state.relay.behind, state.relay.oldest_seconds) == (0, None)


def test_a_relay_that_is_late_is_named_and_one_that_has_just_begun_is_not(folder: Path) -> None:
    run_shop(folder)
    write(("a-1", "Ignored"), ("a-1", "Ignored"), checkpoint=-1)
    fresh = seen()
    assert (fresh.relay.behind, fresh.problems) == (2, [])
    (problem,) = seen(later=LATE + 5).problems
    assert "relay main: 2 events are not published, the oldest for" in problem
    assert "tidings relay --name main" in problem


def test_a_service_that_is_late_is_named_with_what_it_lacks(folder: Path) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    write(("order-2", "OrderCreated"), ("order-3", "OrderCreated"), ("x-1", "Ignored"), checkpoint=100)
    assert seen().problems == []
    state = seen(later=LATE + 5)
    assert state.services[0].pending == 2
    assert (state.services[0].lag or 0) >= 3
    (problem,) = state.problems
    assert "shop: 2 events are pending, the oldest for" in problem
    assert f"tidings run {SHOP}" in problem


def test_dead_letters_are_a_problem_with_the_command_that_shows_them(folder: Path) -> None:
    run_shop(folder, ("bad-1", Poisoned()))
    state = seen()
    assert state.services[0].dead == 1
    assert state.problems == [f"shop: 1 dead letters; tidings dead list {SHOP}"]


def test_held_events_that_nobody_runs_when_they_are_due_are_a_problem(folder: Path) -> None:
    run_shop(folder, ("bad-1", Poisoned()))
    assert invoke("dead", "retry", "1", "--service", SHOP, "--yes").code == 0
    fresh = seen()
    assert (fresh.problems, fresh.services[0].held) == ([], 1)
    (problem,) = seen(later=LATE + 5).problems
    assert problem.startswith("shop: of 1 held events the first was due 35 s ago, and nobody ran it")
    assert f"tidings run {SHOP}" in problem


def test_counts_that_ended_early_say_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_shop(folder)
    write(*((f"order-{n}", "OrderCreated") for n in range(5)), checkpoint=-1)
    assert not any("+" in line for line in invoke("status", SHOP).out.splitlines())
    monkeypatch.setattr("tidings.cli.state.LOOKED", 3)
    ended = invoke("status", SHOP)
    assert "checkpoint -1, 3+ behind" in ended.out
    assert "3+" in next(line for line in ended.out.splitlines() if line.startswith("shop")).split()
    late = seen(later=LATE + 5).problems
    assert any("3 or more events are pending" in problem for problem in late)
    assert any("3 or more events are not published" in problem for problem in late)


def test_a_service_that_never_ran_is_a_problem_and_is_not_made_by_looking(folder: Path) -> None:
    write(("order-1", "OrderCreated"))
    state = seen()
    assert state.problems == [f"shop: has never run on this log; tidings run {SHOP}"]
    assert state.services[0].pending == 1
    assert not (folder / "shop.db").exists()


@pytest.mark.parametrize(
    ("queue", "said"),
    [
        (Found("queue", "tidings.shop", "missing"), "shop: queue tidings.shop is missing"),
        (
            Found("queue", "tidings.shop", "differs", "its type is classic. Delete it.", 0, 0),
            "shop: its type is classic.",
        ),
        (Found("queue", "tidings.shop", "fits", "", 3, 0), "shop: nobody consumes queue tidings.shop"),
        (None, "bus: nobody is there. Start the broker."),
    ],
)
def test_what_is_wrong_with_a_queue_is_a_problem(folder: Path, queue: Found | None, said: str) -> None:
    run_shop(folder)
    (problem,) = seen(queue=queue).problems
    assert problem.startswith(said)


def test_an_embedded_bus_is_not_asked(folder: Path) -> None:
    run_shop(folder)
    state = seen(queue=None, bus="memory://")
    assert state.problems == []
    assert state.services[0].queue == "unknown"


def test_a_log_that_lost_its_end_is_a_problem(folder: Path) -> None:
    run_shop(folder, *((f"order-{n}", OrderCreated(order_id=str(n))) for n in range(5)))

    async def claim() -> None:
        from tidings.database import floors, open_database

        async with open_database("sqlite:///shop.db") as database, database.transaction() as connection:
            await connection.execute(floors.update().values(position=10_000))

    asyncio.run(claim())
    (problem,) = seen().problems
    assert "claims position 10000, which the log does not reach" in problem


def test_the_command_is_0_when_healthy_and_1_with_the_problems_when_not(folder: Path) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    ended = invoke("status", SHOP)
    assert ended.code == 0
    assert ended.out.splitlines()[-1] == "healthy"
    titles = ended.out.splitlines()[2].split()
    assert titles[:4] == ["SERVICE", "FLOOR", "LAG", "PENDING"]
    assert len(ended.out.splitlines()[3].split()) == len(titles)
    run_shop(folder, ("bad-1", Poisoned()))
    ended = invoke("status", SHOP)
    assert ended.code == 1
    assert f"UNHEALTHY  shop: 1 dead letters; tidings dead list {SHOP}" in ended.out
    ended = invoke("status", SHOP, "--json")
    assert ended.code == 1
    shown: dict[str, Any] = json.loads(ended.out)
    assert (shown["healthy"], shown["services"][0]["dead"], len(shown["problems"])) == (False, 1, 1)


def test_without_services_log_and_relay_are_shown(folder: Path) -> None:
    run_shop(folder)
    ended = invoke("status")
    assert ended.code == 0
    assert ended.out.splitlines()[0].startswith("log ")
    assert ended.out.splitlines()[1].startswith("relay  main  checkpoint ")


def test_topology_of_an_embedded_bus_is_refused() -> None:
    for command in ("plan", "apply", "diff"):
        ended = invoke("topology", command, SHOP)
        assert (ended.code, ended.out) == (2, "")
        assert "such a bus lives in the process of its services" in ended.err


def test_topology_of_a_bus_that_is_away_is_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_BUS", "amqp://u:hush@127.0.0.1:1")
    for command in ("plan", "apply", "diff"):
        ended = invoke("topology", command, SHOP)
        assert (ended.code, ended.out) == (3, "")
        assert "RabbitMQ at 127.0.0.1:1" in ended.err
        assert "hush" not in ended.err


def test_a_relay_on_an_embedded_bus_is_refused() -> None:
    ended = invoke("relay")
    assert (ended.code, ended.out) == (2, "")
    assert "the relay runs where the services do" in ended.err
