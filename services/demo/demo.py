"""The demo, act by act. Every act may be interrupted; the next run in the same folder continues it."""

from __future__ import annotations

import time
from pathlib import Path

from services.demo.books import best_countries, places, read_books, sales_of
from services.demo.invariants import checks
from services.demo.screen import Screen
from services.demo.stage import LEDGER, Stage, stage
from services.demo.stock import SCARCE, SHARE, opening_stock
from services.demo.tally import Tally
from services.demo.trade import LIVE_COUNTRY, LIVE_ORDERS, place_live, take_in
from services.importer import Invoice, Kind, Report, invoices, read_rows
from services.order import repository
from services.sales import sales
from tidings import wire_name

__all__ = ["perform", "rehearse"]


async def perform(folder: Path, data: Path, screen: Screen) -> bool:
    """Send real orders through four services. Return whether every invariant holds in the end.

    Raises `BrokenFile`, `TimeoutError` if something never settles, and Tidings' errors.
    """
    began = time.monotonic()
    screen.heading(f"Tidings: four services, a relay and five days of real orders, in {folder}")
    async with stage(folder, data, screen) as demo:
        _say_what_is_there(demo)
        await _receive_stock(demo)
        await _import_orders(demo)
        await _show_results(demo)
        await _show_one_order(demo)
        await _join_late(demo)
        await _sell_live(demo)
        holds = await _prove(demo)
    screen.line(f"\nDone in {time.monotonic() - began:.1f} s. Run it again, and it continues with what is in {folder}.")
    return holds


async def rehearse(folder: Path, data: Path, screen: Screen) -> Path:
    """Run only the orders of the file. Return the path of the log with all of their events. Raises as `perform`."""
    async with stage(folder, data, screen) as demo:
        await _receive_stock(demo)
        await _import_orders(demo)
    return folder / "events.db"


def _say_what_is_there(demo: Stage) -> None:
    tally = demo.tally
    if tally.events:
        done = tally.count("dispatched") + tally.count("cancelled")
        demo.screen.line(
            f"Continues an earlier run, which left {tally.events:,} events with {len(tally.orders)} orders, {done} of "
            "them done. Nothing is done twice."
        )


async def _receive_stock(demo: Stage) -> None:
    stock = opening_stock(invoices(read_rows(demo.data)))
    made = await demo.warehouse.receive(stock)
    await demo.silence()
    demo.screen.line(
        f"Stock: {made:,} of {len(stock):,} articles received now. Of the {SCARCE} best sellers there is only "
        f"{SHARE} % of the demand."
    )


async def _import_orders(demo: Stage) -> None:
    findings = list(invoices(read_rows(demo.data)))
    coming = {found.number for found in findings if isinstance(found, Invoice) and found.kind is Kind.ORDER}
    demo.screen.heading(f"Importing {len(coming)} orders from {demo.data.name}")
    report, placed, began = Report(), 0, time.monotonic()
    async with demo.screen.live("Importing", len(coming | demo.tally.orders.keys()), demo.tally):
        for found in findings:
            report.add(found)
            if isinstance(found, Invoice):
                placed += await take_in(found, demo.data.name, demo.shop, demo.warehouse)
        await demo.silence()
    seconds = time.monotonic() - began
    demo.screen.line(f"{placed} orders imported in {seconds:.1f} s; {len(coming) - placed} existed already.")
    demo.screen.line(str(report), style="dim")


# ---- the results ---------------------------------------------------------------------


async def _show_results(demo: Stage) -> None:
    tally, by = demo.tally, demo.tally.cancelled_by
    demo.screen.heading("The results")
    in_time = f"by the customer, {len(tally.stopped)} of them just in time to stop the parcel"
    demo.screen.table(
        [
            (f"{tally.confirmed}", "confirmed", "goods reserved and payment authorised"),
            (f"{tally.count('dispatched')}", "dispatched", f"{len(tally.parcels)} parcels with the carrier"),
            (f"{by['inventory']}", "cancelled", "out of stock"),
            (f"{by['payment']}", "cancelled", "payment declined"),
            (f"{by['customer']}", "cancelled", in_time),
            (f"{len(tally.refused)}", "refused", "cancellations that came after the parcel had left"),
        ],
        right=[0],
    )
    failed = 100 * (by["inventory"] + by["payment"]) / max(len(tally.orders), 1)
    demo.screen.line(f"{failed:.1f} % of the orders failed because stock or money was missing.")
    on_hand, reserved, shipped = await places(demo.runtime.engine)
    demo.screen.line(f"Stock: {on_hand:,} pieces on hand, {reserved:,} reserved, {shipped:,} shipped.")
    money = [f"£{tally.pounds(f'Payment{what}'):,} {what.lower()}" for what in ("Captured", "Refunded", "Voided")]
    demo.screen.line(f"Revenue: {', '.join(money)}.")


async def _show_one_order(demo: Stage) -> None:
    if not demo.tally.orders:
        return
    order_id = _worth_telling(demo.tally)
    demo.screen.heading(f"The whole history of order {order_id}")
    entries = [
        (
            str(entry.version),
            entry.recorded_at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3],
            wire_name(entry.event),
            str(entry.metadata.get("actor", "")),
            str(entry.metadata.get("reason", "")),
        )
        async for entry in repository.history(order_id)
    ]
    demo.screen.table(entries, titles=("version", "when (UTC)", "what", "who", "why"), right=[0])
    for version in (1, len(entries) - 1):
        order = await repository.load(order_id, at_version=version)
        stock, money = ("yes" if there else "no" for there in (order.reserved, order.authorised))
        demo.screen.line(
            f"At version {version}: {order.status} (stock reserved: {stock}, payment authorised: {money}), "
            f"{len(order.lines)} lines worth £{order.total:,.2f}."
        )


def _worth_telling(tally: Tally) -> str:
    """Return the most interesting order: one that was stopped late, or refused, or simply the first."""
    return next(iter([*tally.stopped, *tally.refused, *tally.orders]))


# ---- a new service -------------------------------------------------------------------


async def _join_late(demo: Stage) -> None:
    demo.screen.heading("A fifth service that nobody planned for: sales per country")
    began, before = time.monotonic(), demo.tally.events
    running = await demo.runtime.start(sales)
    is_new = running.floor < 0
    await demo.silence()
    if is_new:
        demo.screen.line(f"It has read all {before:,} events of history in {time.monotonic() - began:.1f} s.")
    else:
        demo.screen.line("It joined in an earlier run and goes on where it stopped.")
    best = await best_countries(demo.runtime.engine, limit=5)
    rows = [(country, f"{number}", f"{amount:,}") for country, number, amount in best]
    demo.screen.table(rows, titles=("country", "sales", "£"), right=[1, 2])


async def _sell_live(demo: Stage) -> None:
    before, _ = await sales_of(demo.runtime.engine, LIVE_COUNTRY)
    await place_live(demo.tally, demo.shop, demo.warehouse)
    await demo.silence()
    after, amount = await sales_of(demo.runtime.engine, LIVE_COUNTRY)
    demo.screen.line(
        f"{LIVE_ORDERS} orders from {LIVE_COUNTRY} were placed just now and reached it: from {before} sales there to "
        f"{after}, £{amount:,}."
    )


# ---- the proof -----------------------------------------------------------------------


async def _prove(demo: Stage) -> bool:
    report = await demo.runtime.verify()
    demo.screen.heading("Verify")
    demo.screen.line(str(report))
    found = list(checks(demo.tally, await read_books(demo.runtime.engine, demo.folder / LEDGER, report)))
    demo.screen.heading("Invariants")
    demo.screen.table([("ok" if check.holds else "BROKEN", check.what, check.numbers) for check in found])
    return all(check.holds for check in found)
