"""A renamed handler: a replay under `was=` appends nothing twice, and without it is refused, with the remedy."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from tests.unit.command_line import invoke
from tidings import Aggregate, Context, Event, Runtime, Service, Settings, evolves
from tidings.adapters import open_store

HERE = __name__


class Ordered(Event, key="order_id"):
    order_id: str


class Cancelled(Event, key="order_id"):
    order_id: str


class Reserved(Event, key="order_id"):
    order_id: str


class Stock(Aggregate, category="stock"):
    left = 10

    @evolves(Reserved)
    def _reserved(self, event: Reserved) -> None:
        self.left -= 1

    def take(self, order_id: str) -> None:
        self.record(Reserved(order_id=order_id))


def service_of(name: str, *, was: tuple[str, ...] = (), replay: bool = True, emits: bool = True) -> Service:
    service = Service("shop")
    stocks = service.repository(Stock)

    async def reserve(event: Ordered, context: Context) -> None:
        context.emit(f"reserved-{event.order_id}", Reserved(order_id=event.order_id))
        await context.change(stocks, "1", Stock.take, event.order_id)

    async def keep(event: Ordered) -> None: ...

    service.on(Ordered, name=name, was=was, replay=replay)(reserve if emits else keep)
    return service


first = service_of("reserve")
renamed = service_of("book")
declared = service_of("book", was=("reserve",))
silent = service_of("book", emits=False)
kept_out = service_of("book", replay=False)
moved = service_of("book")


@moved.on(Cancelled)
async def reserve(event: Cancelled, context: Context) -> None: ...


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three orders that `reserve` has handled."""
    for name in ("STORE", "BUS", "DATABASE", "DEBUG", "SERVICES"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    run(first, "1", "2", "3", begin=True)
    return tmp_path


def run(service: Service, *orders: str, begin: bool = False) -> None:
    """Run the service until these orders are settled, too."""

    async def work() -> None:
        settings = Settings(store="sqlite:///tidings.db", bus="memory://", database="sqlite:///{service}.db")
        async with Runtime(service, settings=settings) as runtime:
            if begin:
                await service.repository(Stock).create("1", Stock.take, "0")
            for order in orders:
                await service.append(f"order-{order}", Ordered(order_id=order))
            await runtime.settled()

    with structlog.testing.capture_logs():
        asyncio.run(work())


def reservations() -> Counter[str]:
    """Return how often each order was emitted to its own stream and taken from the stock."""

    async def read() -> Counter[str]:
        async with open_store("sqlite:///tidings.db") as store:
            events = [event async for event in store.read_all() if event.type == "Reserved"]
        return Counter(json.loads(event.data)["order_id"] for event in events)

    return asyncio.run(read()) - Counter(["0"])


def replay(service: str, *options: str) -> tuple[int, str]:
    ended = invoke("replay", f"{HERE}:{service}", "--from", "0", *options)
    return ended.code, ended.out + ended.err


def once(*orders: str) -> Counter[str]:
    return Counter(dict.fromkeys(orders, 2))


def test_with_its_former_name_a_renamed_handler_appends_nothing_twice() -> None:
    code, said = replay("declared", "--yes")
    assert (code, "TWICE" in said) == (0, False)
    run(declared, "4")
    assert reservations() == once("1", "2", "3", "4")


def test_a_former_name_that_is_added_late_is_as_good() -> None:
    run(renamed, "4", "5")
    assert replay("declared", "--yes")[0] == 0
    run(declared, "6")
    assert reservations() == once("1", "2", "3", "4", "5", "6")


def test_a_dry_run_names_the_handler_that_is_gone_and_counts_what_would_be_appended_twice() -> None:
    run(renamed, "4")
    code, said = replay("renamed", "--dry-run")
    assert code == 0
    assert "TWICE: the log holds 6 events (Reserved) that handler reserve emitted for Ordered" in said
    assert 'write @service.on(Ordered, ..., was=("reserve",)) and deploy that' in said
    (stranger,) = json.loads(replay("renamed", "--dry-run", "--json")[1])["unknown_authors"]
    assert (stranger["name"], stranger["handler"], stranger["count"]) == ("reserve", "book", 6)
    assert stranger["line"] == '@service.on(Ordered, ..., was=("reserve",))'


def test_a_replay_that_would_append_twice_is_refused_and_changes_nothing(folder: Path) -> None:
    code, said = replay("renamed", "--yes")
    assert code == 1
    assert "if 'book' is 'reserve' under another name, write @service.on(Ordered, ..., was=(\"reserve\",))" in said
    assert "add --gone reserve" in said
    run(renamed)
    assert reservations() == once("1", "2", "3")


def test_a_handler_that_is_said_to_be_gone_is_no_reason_to_refuse() -> None:
    assert replay("renamed", "--yes", "--gone", "another")[0] == 1
    assert replay("renamed", "--yes", "--gone", "reserve")[0] == 0
    run(renamed)
    assert reservations() == Counter({"1": 4, "2": 4, "3": 4})


def test_an_event_that_another_handler_has_now_is_found_though_the_name_is_still_there() -> None:
    code, said = replay("moved", "--yes")
    assert code == 1
    assert "have handler 'reserve', which is still there, handle Ordered again" in said
    assert "was=" not in said


@pytest.mark.parametrize("service", ["first", "silent", "kept_out"])
def test_who_cannot_append_twice_is_not_named(service: str) -> None:
    code, said = replay(service, "--dry-run")
    assert (code, "TWICE" in said) == (0, False)


def test_an_event_that_failed_under_the_former_name_is_not_changed_twice_when_it_is_retried() -> None:
    """`context.change` appends at once, even if the attempt fails afterwards."""
    ran: list[str] = []

    def failing(name: str, fails: bool, was: tuple[str, ...] = ()) -> Service:
        service = Service("retrying")
        stocks = service.repository(Stock)

        async def take(event: Ordered, context: Context) -> None:
            ran.append(name)
            await context.change(stocks, "1", Stock.take, event.order_id)
            if fails:
                raise ValueError("after the change")

        service.on(Ordered, name=name, was=was)(take)
        return service

    assert reservations_after(lambda: failing("old", True), ran) == once("1", "2", "3") + Counter(["1", "2", "3"])
    assert reservations_after(lambda: failing("new", False, ("old",)), ran) == once("1", "2", "3") + Counter(
        ["1", "2", "3"]
    )


def reservations_after(service: Callable[[], Service], ran: list[str]) -> Counter[str]:
    async def work() -> None:
        settings = Settings(store="sqlite:///tidings.db", bus="memory://", database="sqlite:///{service}.db")
        ran.clear()
        async with Runtime(service(), settings=settings), asyncio.timeout(30):
            while len(ran) < 3:
                await asyncio.sleep(0.01)

    with structlog.testing.capture_logs():
        asyncio.run(work())
    return reservations()
