"""What `tidings status` calls unhealthy, over a real store and a bus that says what the test wants."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.command_line import OrderCreated, Poisoned, Unlucky, holding, invoke, run_holding, run_shop, shop
from tidings import EventStore, Runtime, Service, Settings, open_store
from tidings.buses import EventBus, Subscription, TopologyItem
from tidings.cli._exits import Refused
from tidings.database.engine import Database
from tidings.errors import BusUnavailable, DatabaseUnavailable, StoreUnavailable, TidingsError
from tidings.operations.status import LATE, State, look
from tidings.stores import ANY, EventData

pytestmark = pytest.mark.lower_bounds

SHOP = "tests.unit.command_line:shop"
FITS = TopologyItem("queue", "tidings.shop", "fits", "", 3, 1)


class StubBus:
    """A bus that is only inspected. `queue` is the result for the service's queue; with None the bus is down."""

    def __init__(self, queue: TopologyItem | None) -> None:
        self._queue = queue

    async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
        if self._queue is None:
            raise BusUnavailable("nobody is there. Start the broker.")
        return [TopologyItem("exchange", "tidings.events", "fits"), self._queue]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STORE", "BUS", "DATABASE", "SERVICES", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def seen(
    *,
    queue: TopologyItem | None = FITS,
    bus: str = "amqp://host",
    later: float = 0.0,
    target: str = SHOP,
    service: Service = shop,
) -> State:
    """Look once, `later` seconds from now."""

    async def work() -> State:
        settings = Settings(bus=bus, database="sqlite:///{service}.db")
        async with open_store(settings.store) as store:
            stub = cast("EventBus", StubBus(queue))
            return await look(settings, store, stub, {target: service}, now=time.time() + later)

    return asyncio.run(work())


def write(*events: tuple[str, str], checkpoint: int | None = None) -> None:
    """Append events to streams while nothing runs."""

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
    assert re.match(r"shop: of 1 held events the first was due 3\d s ago; if the number does not fall", problem)
    assert f"tidings run {SHOP}" in problem
    asyncio.run(announce(("2.4.1", -LATE)))
    (problem,) = seen(later=LATE + 5).problems
    assert "tidings run" not in problem, "a second process would not help"
    assert "the log of process 0 on h says what holds it" in problem


def test_counts_that_ended_early_say_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_shop(folder)
    write(*((f"order-{n}", "OrderCreated") for n in range(5)), checkpoint=-1)
    assert not any("+" in line for line in invoke("status", SHOP).out.splitlines())
    monkeypatch.setattr("tidings.operations.status.LOOKED", 3)
    ended = invoke("status", SHOP)
    assert "checkpoint -1, 3+ behind" in ended.out
    assert "3+" in next(line for line in ended.out.splitlines() if line.startswith("shop")).split()
    late = seen(later=LATE + 5)
    (problem,) = late.problems
    assert "3 or more events are not published" in problem
    assert any("3 or more events are pending" in effect for effect in late.effects[problem])


def test_what_only_follows_from_a_cause_stands_under_it(folder: Path) -> None:
    """The relay is down, so events are pending. No one is told to look at the service."""
    run_shop(folder)
    write(("order-1", "OrderCreated"), checkpoint=-1)
    state = seen(later=LATE + 5, queue=TopologyItem("queue", "tidings.shop", "fits", messages=0, consumers=1))
    (problem,) = state.problems
    assert problem.startswith("relay main: 1 events are not published")
    (effect,) = state.effects[problem]
    assert effect.startswith("shop: 1 events are pending")


def test_a_log_that_takes_no_appends_is_unhealthy_though_it_can_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(self: object, *_: object, **__: object) -> None:
        raise StoreUnavailable("database or disk is full")

    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    write(checkpoint=2)
    before = seen(later=LATE + 5)
    assert before.problems == []
    monkeypatch.setattr("tidings.stores.sqlite.store.SqliteStore.append", full)
    assert seen().problems == [], "something was appended just now"
    (problem,) = seen(later=LATE + 5).problems
    assert "takes no appends: database or disk is full" in problem
    assert "df -h" in problem


def test_a_database_that_takes_no_writes_is_unhealthy_though_it_can_be_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: Database) -> None:
        self.writes.failed(DatabaseUnavailable("database shop.db: attempt to write a readonly database"))

    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    write(checkpoint=2)
    assert seen(later=LATE + 5).problems == []
    monkeypatch.setattr(Database, "probe_writes", refuse)
    (problem,) = seen(later=LATE + 5).problems
    assert problem.startswith("shop: its database takes no writes: database shop.db: attempt to write a readonly")
    assert "df -h" in problem
    assert "shop.db" in problem


@pytest.mark.parametrize(("silent", "named"), [(2.0, False), (20.0, True)])
def test_processes_that_do_not_report_any_more_hide_no_database_that_takes_no_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, silent: float, named: bool
) -> None:
    """A process still exists, but cannot report."""

    async def refuse(self: Database) -> None:
        self.writes.failed(DatabaseUnavailable("database shop.db: attempt to write a readonly database"))

    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    asyncio.run(announce(("2.4.1", silent)))
    monkeypatch.setattr(Database, "probe_writes", refuse)
    state = seen()
    assert len(state.services[0].processes) == 1
    assert [problem.partition(": database")[0] for problem in state.problems] == (
        ["shop: its database takes no writes"] if named else []
    )


def test_that_nobody_consumes_a_queue_follows_from_the_database_that_is_away(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def away(*_: object) -> AsyncIterator[None]:
        raise DatabaseUnavailable("database shop.db: connection refused")
        yield

    run_shop(folder)
    monkeypatch.setattr("tidings.operations.status.existing_database", away)
    state = seen(queue=TopologyItem("queue", "tidings.shop", "fits", "", 3, 0))
    (problem,) = state.problems
    assert problem == "shop: database shop.db: connection refused"
    assert state.effects[problem] == ["shop: nobody consumes queue tidings.shop"], "an effect needs nothing done"


def test_a_process_that_is_there_and_consumes_nothing_is_named_instead_of_a_second_one(folder: Path) -> None:
    run_shop(folder)
    asyncio.run(announce(("2.4.1", 8.0)))
    (problem,) = seen(queue=TopologyItem("queue", "tidings.shop", "fits", "", 3, 0)).problems
    assert problem.startswith("shop: nobody consumes queue tidings.shop; process 0 on h runs it, and wrote last ")
    assert "kill -9 0" in problem
    assert "tidings run" not in problem


def test_a_service_that_never_ran_is_a_problem_and_is_not_made_by_looking(folder: Path) -> None:
    write(("order-1", "OrderCreated"))
    state = seen()
    (problem,) = state.problems
    assert problem.startswith("shop: there is no database of it where the settings say; if it has run before, find")
    assert f"tidings run {SHOP}" in problem
    assert state.services[0].pending == 1
    assert not (folder / "shop.db").exists()


@pytest.mark.parametrize(
    ("queue", "said"),
    [
        (TopologyItem("queue", "tidings.shop", "missing"), "shop: queue tidings.shop is missing"),
        (
            TopologyItem("queue", "tidings.shop", "differs", "its type is classic. Delete it.", 0, 0),
            "shop: its type is classic.",
        ),
        (TopologyItem("queue", "tidings.shop", "fits", "", 3, 0), "shop: nobody consumes queue tidings.shop"),
        (None, "bus: nobody is there. Start the broker."),
    ],
)
def test_what_is_wrong_with_a_queue_is_a_problem(folder: Path, queue: TopologyItem | None, said: str) -> None:
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
        from tidings.database.engine import open_database
        from tidings.database.tables import floors

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


def test_without_services_log_and_relay_are_shown_and_nothing_is_called_healthy(folder: Path) -> None:
    run_shop(folder, ("bad-1", Poisoned()))
    ended = invoke("status")
    assert ended.code == 2
    assert "healthy" not in ended.out
    assert "NO SERVICE  was looked at: give MODULE:SERVICE, or set TIDINGS_SERVICES" in ended.out
    assert json.loads(invoke("status", "--json").out)["healthy"] is None
    assert ended.out.splitlines()[0].startswith("log ")
    assert ended.out.splitlines()[1].startswith("relay  main  checkpoint ")


def test_topology_of_an_embedded_bus_is_refused() -> None:
    for command in ("plan", "apply", "diff"):
        ended = invoke("topology", command, SHOP)
        assert (ended.code, ended.out) == (2, "")
        assert "such a bus is in the process of its services" in ended.err


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
    assert "the relay runs where the services run" in ended.err


# ---- held events, ages, lag, code, other logs --------------------------------------------

HOLDING = "tests.unit.command_line:holding"


def test_held_events_are_a_problem_with_handler_age_and_reason(folder: Path) -> None:
    run_holding(folder, ("s-a", Unlucky(name="a", error="value")), ("s-a", Unlucky(name="a")), held=2)
    ended = invoke("status", HOLDING)
    assert ended.code == 1
    (problem,) = (line for line in ended.out.splitlines() if line.startswith("UNHEALTHY"))
    assert "holding: handler try_it failed at 1 events, which are held, the oldest for" in problem
    assert problem.endswith(rf"ValueError: a \x1b[31mis unlucky; tidings held list {HOLDING}")
    (service,) = json.loads(invoke("status", HOLDING, "--json").out)["services"]
    assert (service["held"], service["failing"][0]["handler"], service["failing"][0]["events"]) == (2, "try_it", 1)
    (line,) = (line for line in invoke("verify", HOLDING).out.splitlines() if "handler try_it failed at 1" in line)
    assert "the oldest held since 20" in line


def test_ages_are_seconds_and_never_negative_when_the_clock_of_the_store_is_ahead(folder: Path) -> None:
    run_shop(folder)
    write(("order-2", "OrderCreated"), checkpoint=-1)
    behind = seen(later=-7200.0)
    assert behind.relay.oldest_seconds == 0.0
    assert behind.services[0].oldest_seconds == 0.0
    later = seen(later=100.0)
    assert 99 < (later.relay.oldest_seconds or 0) < 160
    assert 99 < (later.services[0].oldest_seconds or 0) < 160
    run_holding(folder, ("s-a", Unlucky(name="a", error="value")), held=1)
    assert "oldest for -" not in " ".join(seen(later=-7200.0, target=HOLDING, service=holding).problems)


def test_lag_is_in_events_however_far_apart_their_positions_are(folder: Path) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    write(*[("tidings_own", "tidings_Checkpoint")] * 50, ("order-2", "OrderCreated"), ("x", "Ignored"), checkpoint=0)
    (part,) = seen().services
    assert (part.lag, part.pending) == (2, 1)


def test_a_database_that_follows_another_log_is_named_with_both(folder: Path) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    before = str(seen().log)
    for file in folder.glob("tidings.db*"):
        file.unlink()
    write(("order-1", "OrderCreated"))
    state = seen()
    (problem,) = state.problems
    assert f"shop: its database follows log {before}, but TIDINGS_STORE holds log {state.log}" in problem
    assert f"follows log {before}, not this one" in invoke("verify", SHOP).out


@pytest.mark.parametrize("option", ["--strict", "--deep", "--json", "--repair"])
def test_nothing_is_settled_of_a_log_that_a_service_does_not_follow(folder: Path, option: str) -> None:
    """Not even where that log holds nothing that the service handles: TIDINGS_STORE may be wrong."""
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    for file in folder.glob("tidings.db*"):
        file.unlink()
    write(("x", "Ignored"))
    ended = invoke("verify", SHOP, option)
    assert ended.code == 1
    assert "all settled" not in ended.out.replace("NOT all settled", "")
    assert '"ok": true' not in ended.out.partition('"relay"')[0]


async def announce(*rows: tuple[str, float]) -> None:
    """Record processes with these code versions, seen some seconds ago."""
    from tidings.database.engine import open_database
    from tidings.database.tables import processes

    now = time.time()
    async with open_database("sqlite:///shop.db") as database, database.transaction() as connection:
        await connection.execute(
            processes.insert(),
            [
                {"service": "shop", "process": str(n), "host": "h", "pid": n, "version": version, "code": f"c{n}"}
                | {"started": now - n, "seen": now - age}
                for n, (version, age) in enumerate(rows)
            ],
        )


def test_processes_are_shown_with_the_code_that_each_runs(folder: Path) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    assert seen().services[0].processes == [], "who ended cleanly is gone"
    asyncio.run(announce(("2.4.1", 0), ("2.4.2", -7200), ("1.0", 61)))
    assert sorted(one.version for one in seen().services[0].processes) == ["2.4.1", "2.4.2"]
    ended = invoke("status", SHOP)
    assert "2.4.2,2.4.1" in ended.out
    assert "shop: its processes run different code: 2.4.2 (process 1 on h), 2.4.1 (process 0 on h)" in ended.out


def test_a_running_service_shows_its_process(folder: Path) -> None:
    async def work() -> list[Any]:
        settings = Settings(store="sqlite:///tidings.db", bus="memory://", database="sqlite:///{service}.db")
        async with Runtime(shop, settings=settings), open_store(settings.store) as store:
            while True:
                state = await look(settings, store, cast("EventBus", StubBus(None)), {SHOP: shop})
                if state.services[0].processes:
                    return state.services[0].processes
                await asyncio.sleep(0.02)

    (process,) = asyncio.run(asyncio.wait_for(work(), 20))
    assert process.pid == os.getpid()
    assert len(process.code) == 8


# ---- --watch and --json -------------------------------------------------------------------


@pytest.mark.parametrize("error", [StoreUnavailable("it is away"), DatabaseUnavailable("it is locked")])
def test_watch_outlives_an_outage(folder: Path, monkeypatch: pytest.MonkeyPatch, error: TidingsError) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    monkeypatch.setattr("tidings.cli.status.SECONDS", 0.01)
    answers = iter((True, False, False, True, True))

    async def looked(*args: Any, **options: Any) -> State:
        if next(answers):
            return await look(*args, **options)
        raise error

    monkeypatch.setattr("tidings.operations.status.look", looked)
    told: list[str] = []

    def printed(line: str, **_: object) -> None:
        told.append(line)
        if len(told) == 3:
            raise Refused(99, "enough")

    monkeypatch.setattr("tidings.cli.status.print", printed, raising=False)
    assert invoke("status", "--watch", SHOP).code == 99
    first, away, again = (line.partition("  ")[2] for line in told)
    assert "head=" in first
    assert away == f"problems=1 {error}"
    assert again == first


def test_watch_names_the_problems_once_though_their_ages_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    monkeypatch.setattr("tidings.cli.status.SECONDS", 0.01)
    looks = 0

    async def looked(*args: Any, **options: Any) -> State:
        nonlocal looks
        looks += 1
        state = await look(*args, **options)
        state.problems = [f"shop: 1 events are pending, the oldest for {looks} s"] if looks < 4 else ["shop: gone"]
        return state

    monkeypatch.setattr("tidings.operations.status.look", looked)
    told: list[str] = []

    def printed(line: str, **_: object) -> None:
        told.append(line)
        if len(told) == 2:
            raise Refused(99, "enough")

    monkeypatch.setattr("tidings.cli.status.print", printed, raising=False)
    assert invoke("status", "--watch", SHOP).code == 99
    first, last = told
    assert first.endswith("problems=1 UNHEALTHY shop: 1 events are pending, the oldest for 1 s")
    assert last.endswith("problems=1 UNHEALTHY shop: gone")


def test_watch_begins_before_there_is_a_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def printed(line: str, **_: object) -> None:
        told.append(line)
        if len(told) == 2:
            raise Refused(99, "enough")
        run_shop(folder, ("order-1", OrderCreated(order_id="1")))

    monkeypatch.setattr("tidings.cli.status.SECONDS", 0.01)
    monkeypatch.setattr("tidings.cli.status.print", lambda line, **_: _outside(printed, line), raising=False)
    assert invoke("status", "--watch", "--json", SHOP).code == 99
    assert "there is no log at" in json.loads(told[0])["problems"][0]
    assert json.loads(told[1])["head"] >= 1


def _outside(function: Callable[[str], None], line: str) -> None:
    """Run it in a thread without an event loop."""
    failed: list[BaseException] = []

    def call() -> None:
        try:
            function(line)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize(
    "command",
    [
        ("status",),
        ("verify", SHOP),
        ("dead", "list", SHOP),
        ("held", "list", SHOP),
        ("dead", "show", "1", "--service", SHOP),
        ("held", "show", "1", "--service", SHOP),
        ("skip", "1", "--service", SHOP),
        ("why", "1"),
        ("streams", "show", "a"),
        ("topology", "diff", SHOP),
        ("replay", SHOP, "--from", "0"),
        ("partitions", "tests.unit.command_line:nobody"),
    ],
)
def test_json_is_printed_for_errors_too(command: tuple[str, ...]) -> None:
    ended = invoke(*command, "--json")
    assert ended.code in (1, 2, 3)
    (line,) = ended.out.splitlines()
    error = json.loads(line)
    assert error["exit_code"] == ended.code
    assert error["message"] in " ".join(ended.err.split())
