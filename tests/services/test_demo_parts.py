"""The demo's own arithmetic: a check that cannot fail proves nothing, so each is made to fail here."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from services.demo.customers import Customers, Mood, mood_of
from services.demo.invariants import Numbers, checks
from services.demo.listener import Listener
from services.demo.screen import Screen
from services.demo.shop import InProcess
from services.demo.stage import Stage
from services.demo.stock import SCARCE, SPARE, opening_stock
from services.demo.tally import Tally
from services.demo.warehouse import Warehouse
from services.importer import Invoice, Kind, invoices, read_rows
from tidings import EventStore, RecordedEvent, Runtime
from tidings.errors import StoreUnavailable

DATA = Path(__file__).parents[2] / "services" / "data" / "online-retail.csv"


def heard(*events: tuple[str, dict[str, Any]]) -> Tally:
    tally = Tally()
    for position, (kind, data) in enumerate(events, 1):
        row = RecordedEvent(position, "some-stream", 0, kind, json.dumps(data).encode(), b"", True, b"", 0)
        tally.hear(row)
    return tally


def about(order_id: str, *kinds: str, **data: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(kind, {"order_id": order_id, "amount": "10.00", "by": "customer", **data}) for kind in kinds]


CHARGED = ("OrderCreated", "PaymentAuthorised", "OrderConfirmed", "PaymentCaptured")
SOLD = (*CHARGED, "ShipmentDispatched", "OrderDispatched")
STOPPED = (*CHARGED, "OrderCancellationRequested", "OrderCancelled", "PaymentRefunded")
VOIDED = ("OrderCreated", "PaymentAuthorised", "OrderCancelled", "PaymentVoided")

GOODS: list[tuple[str, dict[str, Any]]] = [("GoodsReceived", {"quantity": 9}), ("ReturnReceived", {"quantity": 1})]
LOG = [*GOODS, *about("1", *SOLD), *about("2", *STOPPED), *about("3", *VOIDED)]
TEN = Decimal("10.00")

GOOD = Numbers(
    on_hand=7,
    reserved=0,
    shipped=3,
    open=Decimal(),
    ledger={"authorise": 3 * TEN, "capture": 2 * TEN, "void": TEN, "refund": TEN},
    operations=7,
    calls=8,
    shipments={"dispatched": 1, "stopped": 2},
    sales=TEN,
    dead=0,
    settled=True,
)


# ---- tally ---------------------------------------------------------------------------


def test_the_tally_knows_where_every_order_is_and_how_it_came_there() -> None:
    tally = heard(*LOG, *about("4", "OrderCreated"))
    assert tally.orders == {"1": "dispatched", "2": "cancelled", "3": "cancelled", "4": "placed"}
    assert (tally.confirmed, tally.stopped, tally.cancelled_by["customer"]) == (2, ["2"], 2)
    assert (tally.received, tally.returned) == (9, 1)
    assert tally.pounds("PaymentCaptured") == Decimal("20.00")
    assert not tally.contradictory


def test_what_tidings_writes_for_itself_is_not_counted() -> None:
    tally = Tally()
    tally.hear(RecordedEvent(1, "tidings_relay-main", 0, "Checkpoint", b"{}", b"", True, b"", 0))
    tally.hear(RecordedEvent(2, "$settings", 0, "OrderCreated", b"{}", b"", True, b"", 0))
    assert tally.events == 0


@pytest.mark.parametrize(
    "after",
    [
        (*SOLD, "OrderCancelled"),
        ("OrderCreated", "OrderCancelled", "OrderDispatched"),
        ("OrderCreated", "OrderCancelled", "ShipmentDispatched"),
    ],
)
def test_the_tally_notices_an_order_that_was_both_dispatched_and_cancelled(after: tuple[str, ...]) -> None:
    assert heard(*about("1", *after)).contradictory == {"1"}


# ---- invariants ----------------------------------------------------------------------


def broken(log: Tally, now: Numbers) -> set[str]:
    return {check.what for check in checks(log, now) if not check.holds}


def test_good_numbers_break_nothing() -> None:
    assert broken(heard(*LOG), GOOD) == set()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda n: replace(n, on_hand=8), "on hand + reserved + shipped = initial + returned"),
        (lambda n: replace(n, open=Decimal("0.01")), "authorised = captured + voided + open"),
        (lambda n: replace(n, operations=8), "each payment took effect at the gateway once"),
        (lambda n: replace(n, ledger={**n.ledger, "refund": 2 * TEN}), "each payment took effect at the gateway once"),
        (lambda n: replace(n, shipments={"dispatched": 2}), "no order both dispatched and cancelled"),
        (lambda n: replace(n, sales=Decimal("10.01")), "sales of all countries = captured - refunded"),
        (lambda n: replace(n, dead=1), "every event settled in every service"),
        (lambda n: replace(n, settled=False), "every event settled in every service"),
    ],
)
def test_a_wrong_number_in_a_database_is_found(change: Callable[[Numbers], Numbers], what: str) -> None:
    assert what in broken(heard(*LOG), change(GOOD))


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (about("9", "OrderCreated"), "every order dispatched or cancelled"),
        (about("1", "OrderCancelled"), "no order both dispatched and cancelled"),
        (about("3", "ShipmentDispatched"), "no order both dispatched and cancelled"),
        (about("1", "PaymentRefunded", amount="99.00"), "refunded <= captured"),
        (about("1", "PaymentCaptured"), "authorised = captured + voided + open"),
        ([("GoodsReceived", {"quantity": 1})], "on hand + reserved + shipped = initial + returned"),
    ],
)
def test_an_event_too_many_in_the_log_is_found(more: list[tuple[str, dict[str, Any]]], what: str) -> None:
    assert what in broken(heard(*LOG, *more), GOOD)


# ---- stock and customers -------------------------------------------------------------


def test_the_best_sellers_come_short_and_everything_else_suffices() -> None:
    found = [finding for finding in invoices(read_rows(DATA)) if isinstance(finding, Invoice)]
    demand: dict[str, int] = {}
    for invoice in found:
        for goods in invoice.goods if invoice.kind is Kind.ORDER else ():
            demand[goods.sku] = demand.get(goods.sku, 0) + goods.quantity
    stock = opening_stock(found)
    short = {sku for sku in demand if stock[sku] < demand[sku]}
    assert len(short) == SCARCE
    assert min(demand[sku] for sku in short) >= max(demand[sku] for sku in demand.keys() - short)
    assert all(stock[sku] == demand[sku] + SPARE for sku in demand.keys() - short)


def test_some_customers_of_each_mood_are_among_the_real_orders_and_none_among_the_live_ones() -> None:
    numbers = [found.number for found in invoices(read_rows(DATA)) if isinstance(found, Invoice)]
    moods = [mood_of(number) for number in numbers]
    assert all(moods.count(mood) >= 5 for mood in Mood)
    assert moods.count(Mood.NEVER) > len(moods) * 0.8
    assert {mood_of(f"live-{number}") for number in range(100)} == {Mood.NEVER}


# ---- silence -------------------------------------------------------------------------


class SlowStore:
    """A log of two events. After the first it fails once, and it shows the second when the test says so."""

    def __init__(self) -> None:
        self.shown = asyncio.Event()
        self.failed = False

    async def head(self) -> int:
        return 2

    async def subscribe_all(self, *, after: int) -> AsyncIterator[RecordedEvent]:
        for position in range(max(after, 0) + 1, 3):
            if position == 2:
                if not self.failed:
                    self.failed = True
                    raise StoreUnavailable("away for a moment")
                await self.shown.wait()
            yield RecordedEvent(position, "some-stream", 0, "GoodsReceived", b'{"quantity": 4}', b"", True, b"", 0)


class SettledRuntime:
    """Every service settles an event before the demo's listener hears it."""

    def __init__(self, store: SlowStore) -> None:
        self.store = store

    async def settled(self, *, timeout: float) -> None:
        """React at once."""


async def test_there_is_no_silence_before_the_demo_itself_has_heard_everything() -> None:
    store = SlowStore()
    log, shop = cast("EventStore", store), InProcess()
    listener = Listener(log, Customers(shop))
    runtime = cast("Runtime", SettledRuntime(store))
    demo = Stage(runtime, listener, shop, Warehouse(log), screen(False)[0], Path(), Path())
    listening = asyncio.create_task(listener.run())
    waiting = asyncio.create_task(demo.silence())
    await listener.reached(1)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    store.shown.set()
    await waiting
    assert demo.tally.received == 8
    await listening


# ---- screen --------------------------------------------------------------------------


def screen(terminal: bool) -> tuple[Screen, StringIO]:
    out = StringIO()
    return Screen(Console(file=out, force_terminal=terminal, width=60, highlight=False)), out


def test_a_table_is_as_wide_as_it_needs_and_cuts_nothing_off() -> None:
    shown, out = screen(terminal=False)
    shown.table([("a", "1"), ("b" * 60, "1,000")], titles=("name", "pieces"), right=[1])
    assert out.getvalue().splitlines() == [
        f"name{' ' * 56}  pieces",
        f"a{' ' * 59}       1",
        f"{'b' * 60}   1,000",
    ]


@pytest.mark.parametrize("terminal", [True, False])
async def test_progress_is_shown_on_a_terminal_and_elsewhere(terminal: bool) -> None:
    shown, out = screen(terminal)
    tally = heard(*LOG)
    async with shown.live("Importing", 7, tally):
        await asyncio.sleep(0)
    assert "Importing" in out.getvalue()
    assert ("3/7" if terminal else "3 of 7 orders done; 0 placed") in out.getvalue()
    assert ("\x1b[" in out.getvalue()) is terminal
