"""The demo, act by act. Each act may be interrupted, and is continued by the next run in the same folder."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Final, TypeVar

from services.demo.books import best_countries, read_books, sales_of
from services.demo.customers import Customers, Mood, mood_of
from services.demo.invariants import checks
from services.demo.screen import Screen
from services.demo.stock import SCARCE, SHARE, opening_stock
from services.demo.tally import Tally
from services.importer import Invoice, Kind, Report, invoices, read_rows
from services.inventory import inventory
from services.inventory.events import GoodsReceived, ReturnReceived
from services.order import Order, orders, repository
from services.order.events import OrderLine
from services.payment import payment
from services.sales import sales
from services.shipping import shipping
from tidings import NO_STREAM, Event, RecordedEvent, Runtime, Settings
from tidings.errors import WrongExpectedVersion

__all__ = ["LEDGER", "Demo", "perform"]

T = TypeVar("T")

LEDGER: Final = "gateway.db"
"""The sandbox gateway's file in the demo's folder."""

AT_ONCE: Final = 64
"""Deliveries and returns under way at the same time, so that they share the store's commits."""

LIVE_COUNTRY: Final = "Iceland"
"""Nobody there bought anything in the five days."""
LIVE_SKU: Final = "DEMO-MUG"
LIVE_ORDERS: Final = 3


@dataclass(slots=True)
class Demo:
    """What the acts share."""

    runtime: Runtime
    folder: Path
    data: Path
    screen: Screen
    tally: Tally
    customers: Customers
    already: int
    """Orders that were in the log when this run began."""

    async def quiet(self) -> None:
        """Wait until everything has settled in every service, and no customer reacts to it any more."""
        while True:
            await self.runtime.settled(timeout=120)
            head = await self.runtime.store.head()
            while self.tally.position < head:
                await asyncio.sleep(0.01)
            if await self.runtime.store.head() == head:
                return


async def perform(folder: Path, data: Path, screen: Screen) -> bool:
    """Run all acts; whether every invariant holds. Raises `BrokenFile`, and Tidings' errors when something is broken."""
    began = time.monotonic()
    settings = Settings(
        store=f"sqlite:///{folder}/events.db", bus="memory://demo", database=f"sqlite:///{folder}/{{service}}.db"
    )
    async with Runtime(settings=settings) as runtime:
        for service in (orders, inventory, payment, shipping):
            await runtime.start(service)
        async with _listening(runtime) as (tally, customers):
            demo = Demo(runtime, folder, data, screen, tally, customers, already=len(tally.orders))
            _say_hello(demo)
            await _receive_stock(demo)
            await _import(demo)
            _show_results(demo)
            await _show_one_order(demo)
            await _join_late(demo)
            holds = await _prove(demo)
    screen.line(f"\nDone in {time.monotonic() - began:.1f} s. Run it again, and it continues with what is in {folder}.")
    return holds


@asynccontextmanager
async def _listening(runtime: Runtime) -> AsyncIterator[tuple[Tally, Customers]]:
    """The whole log into a tally, from its beginning, then live; and customers who call when they read something."""
    tally, customers = Tally(), Customers(since=await runtime.store.head())

    async def listen() -> None:
        async for event in runtime.store.subscribe_all():
            if isinstance(event, RecordedEvent):
                tally.hear(event)
                await customers.hear(event)

    async with asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(listen())
        while tally.position < await runtime.store.head():
            await asyncio.sleep(0.01)
        try:
            yield tally, customers
        finally:
            listening.cancel()


def _say_hello(demo: Demo) -> None:
    demo.screen.heading(f"Tidings: four services, a relay and five days of real orders, in {demo.folder}")
    if demo.tally.events:
        done = demo.tally.count("dispatched") + demo.tally.count("cancelled")
        demo.screen.line(
            f"An earlier run left {demo.tally.events:,} events here, with {demo.already} orders, {done} of them done. "
            "This run continues: what is there is not done again."
        )


# ---- goods come in -------------------------------------------------------------------


async def _receive_stock(demo: Demo) -> None:
    stock = opening_stock(invoices(read_rows(demo.data)))
    why = {"actor": "demo", "reason": "opening stock"}
    made = await _append_all(
        (f"goods-{sku}", GoodsReceived(sku=sku, quantity=quantity), why) for sku, quantity in stock.items()
    )
    await demo.quiet()
    short = f"the {SCARCE} best sellers with {SHARE} % of what will be asked for"
    demo.screen.line(f"Stock: {made:,} of {len(stock):,} articles received now, {short}; {len(stock) - made:,} before.")


async def _append_all(things: Iterable[tuple[str, Event, dict[str, str]]]) -> int:
    """Begin a stream with each event, unless it exists; how many did not."""

    async def append(stream: str, event: Event, metadata: dict[str, str]) -> bool:
        return await _new(lambda: inventory.append(stream, event, expected=NO_STREAM, metadata=metadata))

    made = 0
    for together in _batches(things, AT_ONCE):
        made += sum(await asyncio.gather(*(append(*thing) for thing in together)))
    return made


async def _new(begin: Callable[[], Awaitable[object]]) -> bool:
    """Whether a stream was begun; False when it exists, because an earlier run began it."""
    try:
        await begin()
    except WrongExpectedVersion:
        return False
    return True


def _batches(things: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(things)
    while batch := list(islice(iterator, size)):
        yield batch


# ---- orders come in ------------------------------------------------------------------


async def _import(demo: Demo) -> None:
    findings = list(invoices(read_rows(demo.data)))
    total = sum(isinstance(finding, Invoice) and finding.kind is Kind.ORDER for finding in findings)
    demo.screen.heading(f"Importing {total} orders from {demo.data.name}")
    report, placed, began = Report(), 0, time.monotonic()
    async with demo.screen.live("Importing", max(total, demo.already), demo.tally):
        for finding in findings:
            report.add(finding)
            if isinstance(finding, Invoice):
                placed += await _take_in(demo, finding)
        await demo.quiet()
    seconds = time.monotonic() - began
    demo.screen.line(f"{placed} orders imported in {seconds:.1f} s, {total - placed} were there already.")
    demo.screen.line(str(report), style="dim")


async def _take_in(demo: Demo, invoice: Invoice) -> int:
    """An order placed, or goods come back; how many orders are new."""
    source = f"invoice {invoice.number}, line {invoice.line} of {demo.data.name}"
    if invoice.kind is Kind.RETURN:
        await _append_all(_came_back(invoice, {"actor": "importer", "reason": source}))
        return 0
    lines = [
        OrderLine(sku=goods.sku, description=goods.description, quantity=goods.quantity, unit_price=goods.price)
        for goods in invoice.goods
    ]
    is_new = await _place(demo, invoice.number, lines, invoice.customer, invoice.country, invoice.date, source)
    if is_new and mood_of(invoice.number) is Mood.AT_ONCE:
        await demo.customers.call(invoice.number)
    return int(is_new)


def _came_back(invoice: Invoice, why: dict[str, str]) -> Iterator[tuple[str, Event, dict[str, str]]]:
    for number, goods in enumerate(invoice.goods, 1):
        returned = ReturnReceived(return_id=invoice.number, sku=goods.sku, quantity=goods.quantity)
        yield f"return-{invoice.number}.{number}", returned, why


async def _place(
    demo: Demo, order_id: str, lines: list[OrderLine], customer: str | None, country: str, at: datetime, source: str
) -> bool:
    why = {"actor": f"customer {customer}" if customer else "guest", "reason": source}
    return await _new(lambda: repository.create(order_id, Order.place, lines, customer, country, at, metadata=why))


# ---- what came of it -----------------------------------------------------------------


def _show_results(demo: Demo) -> None:
    tally = demo.tally
    share = 100 * (tally.cancelled_by["inventory"] + tally.cancelled_by["payment"]) / max(len(tally.orders), 1)
    demo.screen.heading("What came of them")
    demo.screen.table(
        ("", "orders", ""),
        [
            ("confirmed", f"{tally.confirmed}", "stock and payment were both there"),
            ("dispatched", f"{tally.count('dispatched')}", f"{len(tally.parcels)} parcels with the carrier"),
            ("cancelled", f"{tally.cancelled_by['inventory']}", "out of stock"),
            ("cancelled", f"{tally.cancelled_by['payment']}", "payment declined"),
            (
                "cancelled",
                f"{tally.cancelled_by['customer']}",
                f"by the customer, {len(tally.stopped)} of them in time to stop the parcel",
            ),
            ("refused", f"{len(tally.refused)}", "customers who asked when the parcel had left"),
        ],
        right=[1],
    )
    demo.screen.line(f"{share:.1f} % failed for want of stock or money.")
    revenue, refunded = tally.pounds("PaymentCaptured"), tally.pounds("PaymentRefunded")
    demo.screen.line(
        f"Revenue: £{revenue:,} captured, £{refunded:,} refunded, £{tally.pounds('PaymentVoided'):,} voided. "
        f"Stock: {tally.received:,} pieces received, {tally.returned:,} returned."
    )


async def _show_one_order(demo: Demo) -> None:
    order_id = _worth_telling(demo.tally)
    demo.screen.heading(f"The whole history of order {order_id}")
    rows = [
        (
            str(entry.version),
            f"{entry.recorded_at:%H:%M:%S.%f}"[:-3],
            entry.event.wire_name,
            str(entry.metadata.get("actor", "")),
            str(entry.metadata.get("reason", "")),
        )
        async for entry in repository.history(order_id)
    ]
    demo.screen.table(("version", "when", "what", "who", "why"), rows, right=[0])
    then, now = await repository.load(order_id, at_version=1), await repository.load(order_id)
    demo.screen.line(
        f"At version {then.version} it was {then.status} (reserved: {_yes(then.reserved)}, authorised: "
        f"{_yes(then.authorised)}); now, at version {now.version}, it is {now.status}. Its {len(now.lines)} lines are worth "
        f"£{now.total:,.2f}."
    )


def _worth_telling(tally: Tally) -> str:
    """The order with the most to tell: stopped at the last moment, or refused, or just any."""
    return next(iter([*tally.stopped, *tally.refused, *tally.orders]))


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


# ---- somebody new --------------------------------------------------------------------


async def _join_late(demo: Demo) -> None:
    demo.screen.heading("A fifth service that nobody planned for: sales per country")
    began, before = time.monotonic(), demo.tally.events
    await demo.runtime.start(sales)
    known = sales.running_now.floor >= 0
    await demo.quiet()
    seconds = time.monotonic() - began
    if known:
        demo.screen.line("It joined in an earlier run, and goes on where it stopped.")
    else:
        demo.screen.line(f"It has read {before:,} events of history in {seconds:.1f} s and is up to date.")
    rows = [(country, f"{number}", f"{amount:,}") for country, number, amount in await best_countries(demo.runtime, 5)]
    demo.screen.table(("country", "sales", "£"), rows, right=[1, 2])
    await _sell_live(demo)


async def _sell_live(demo: Demo) -> None:
    """New orders, to show that the new service hears them as they come; each run has its own."""
    run = 1 + sum(order_id.startswith("live-") for order_id in demo.tally.orders) // LIVE_ORDERS
    before, _ = await sales_of(demo.runtime, LIVE_COUNTRY)
    why = {"actor": "demo", "reason": f"for the live orders of run {run}"}
    await _append_all([(f"goods-{LIVE_SKU}-{run}", GoodsReceived(sku=LIVE_SKU, quantity=LIVE_ORDERS), why)])
    await demo.quiet()
    mug = OrderLine(sku=LIVE_SKU, description="MUG", quantity=1, unit_price=Decimal("12.50"))
    for number in range(1, LIVE_ORDERS + 1):
        order_id = f"live-{run}.{number}"
        await _place(demo, order_id, [mug], None, LIVE_COUNTRY, datetime.now(UTC), f"live order of run {run}")
    await demo.quiet()
    after, amount = await sales_of(demo.runtime, LIVE_COUNTRY)
    demo.screen.line(
        f"{LIVE_ORDERS} orders from {LIVE_COUNTRY} placed just now: its sales went from {before} to {after} (£{amount:,})."
    )


# ---- the proof -----------------------------------------------------------------------


async def _prove(demo: Demo) -> bool:
    report = await demo.runtime.verify()
    demo.screen.heading("Verify")
    demo.screen.line(str(report))
    demo.screen.heading("Invariants")
    found = list(checks(demo.tally, await read_books(demo.runtime, demo.folder / LEDGER, report)))
    demo.screen.table(("", "what must hold", "numbers"), [(_mark(c.holds), c.what, c.numbers) for c in found])
    return all(check.holds for check in found)


def _mark(holds: bool) -> str:
    return "ok" if holds else "BROKEN"
