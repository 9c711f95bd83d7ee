"""The demo over RabbitMQ, act by act. Each run has its own folder and leaves no process behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from functools import partial
from io import StringIO
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

from rich.console import Console
from sqlalchemy.engine import make_url

from services.demo.books import read_books
from services.demo.demo import rehearse
from services.demo.fleet.audit import audit, read_effects
from services.demo.fleet.comparison import compare
from services.demo.fleet.faults import ENOUGH, disturb
from services.demo.fleet.processes import ROOT, settings
from services.demo.fleet.reading import Reading, read_log
from services.demo.fleet.scene import SALES, TARGETS, Scene, ledger, scene
from services.demo.fleet.traffic import Traffic
from services.demo.invariants import Check, checks
from services.demo.screen import Screen
from services.demo.stock import opening_stock
from services.demo.trade import take_in
from services.importer import Invoice, Kind, invoices, read_rows
from tidings import open_store

__all__ = ["TooFew", "perform"]


class TooFew(Exception):
    """The file has too few invoices for all faults."""


async def perform(folder: Path, data: Path, screen: Screen) -> bool:
    """Send real orders through real processes, with faults. Return whether the result equals that of a run without
    faults.

    Raises `BrokenFile`, `TooFew`, `BrokerRefused`, `Died`, `NotReady`, `ShopFailed`, `TimeoutError`, Tidings' errors.
    """
    began = time.monotonic()
    coming = [found for found in invoices(read_rows(data)) if isinstance(found, Invoice)]
    if len(coming) < ENOUGH:
        raise TooFew(f"{data} has {len(coming)} orders and returns: {ENOUGH} are needed for the faults to meet some")
    screen.heading(f"Tidings over RabbitMQ: event store, relay and five services as processes, in {folder}")
    alone, place = folder / "embedded", folder / "fleet"
    for made in (alone, place):
        made.mkdir(parents=True)
    embedded = await _rehearse(alone, data, screen)
    async with scene(place, opening_stock(coming)) as play:
        _introduce(play, screen)
        await _trade(play, coming, data, screen)
        holds = await _prove(play, embedded, screen)
        holds = await _end(play, screen) and holds
    if holds:
        shutil.rmtree(place / "rabbitmq", ignore_errors=True)
    else:
        screen.line("\nNOT everything is as it must be: see above.", style="bold red")
    screen.line(f"\nDone in {time.monotonic() - began:.1f} s. The log, the databases and all logs are in {place}.")
    return holds


async def _rehearse(folder: Path, data: Path, screen: Screen) -> Reading:
    """Send the same orders through the same services in this process, for comparison."""
    os.environ["PAYMENT_LEDGER"] = str(ledger(folder))
    began = time.monotonic()
    async with open_store(f"sqlite:///{await rehearse(folder, data, Screen(Console(file=StringIO())))}") as store:
        reading = await read_log(store)
    seconds = time.monotonic() - began
    screen.line(f"For comparison, first without any server: {len(reading.baskets)} orders, in {seconds:.1f} s.")
    return reading


def _introduce(play: Scene, screen: Screen) -> None:
    screen.line("RabbitMQ runs, started by deploy/local/rabbitmq. So do, each as a process of its own:")
    rows = [(name, f"{child.pid}", f"tidings {' '.join(child.arguments)}") for name, child in play.children.items()]
    screen.table(rows, titles=("name", "process", "command"), right=[1])
    told = settings(
        play.folder,
        play.fleet.env["TIDINGS_STORE"],
        make_url(play.broker.url).render_as_string(),
        list(TARGETS.values()),
    )
    screen.line("\n".join(f"{name}={value}" for name, value in told.items()), style="dim")


async def _trade(play: Scene, coming: list[Invoice], data: Path, screen: Screen) -> None:
    screen.line(f"Stock: {play.received:,} articles received.")
    number = sum(1 for invoice in coming if invoice.kind is Kind.ORDER)
    screen.heading(
        f"{number} orders from {data.name} enter through POST http://127.0.0.1:{play.children['order'].port}/orders"
    )
    traffic = Traffic(coming, partial(take_in, source=data.name, shop=play.shop, warehouse=play.warehouse))
    began = time.monotonic()
    async with screen.live("Trading", number, play.listener.tally), asyncio.TaskGroup() as tasks:
        tasks.create_task(traffic.run())
        await disturb(play, traffic, screen)
        await play.look_into(SALES)
        await traffic.go_on(traffic.total)
        await traffic.reached(traffic.total)
        await play.silence()
    screen.line(
        f"\nAll {play.shop.answered} orders were answered, and all that came of them has settled, after "
        f"{time.monotonic() - began:.1f} s. {play.shop.asked_again} requests had to be repeated."
    )


# ---- the proof -----------------------------------------------------------------------


async def _prove(play: Scene, embedded: Reading, screen: Screen) -> bool:
    screen.heading("The embedded run and this one")
    log = await read_log(play.store)
    lines = compare(embedded, log, play.shop.number_of)
    rows = [(each.what, each.embedded, each.fleet, each.difference or "equal") for each in lines]
    screen.table(rows, titles=("", "embedded", "RabbitMQ", ""), right=[1, 2])

    screen.heading("tidings verify")
    settled, said = await _command(play, "verify")
    screen.line(said)

    screen.heading("Invariants")
    books = await read_books(play.engine, ledger(play.folder), await play.verify())
    hold = _show(list(checks(play.listener.tally, books)), screen)
    screen.heading("No event was handled twice or never")
    once = _show(list(audit(log, await read_effects(play.engine, ledger(play.folder)))), screen)
    return hold and once and settled == 0 and not any(each.difference for each in lines)


def _show(found: list[Check], screen: Screen) -> bool:
    screen.table([("ok" if check.holds else "BROKEN", check.what, check.numbers) for check in found])
    return all(check.holds for check in found)


async def _command(play: Scene, *arguments: str) -> tuple[int, str]:
    """Run a command as a user would, in the processes' environment. Return its exit status and output."""
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tidings", *arguments),
        cwd=ROOT,
        env=play.fleet.env,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=STDOUT,
        process_group=play.fleet.group,
    )
    out, _ = await command.communicate()
    assert command.returncode is not None
    return command.returncode, out.decode(errors="replace").rstrip()


async def _end(play: Scene, screen: Screen) -> bool:
    statuses = await play.fleet.stop()
    wrong = {name: status for name, status in statuses.items() if status}
    if wrong:
        screen.line(f"\nNot all ended well after SIGTERM: {wrong}; their logs are in {play.folder}.", style="bold red")
    else:
        screen.line(f"\nAll {len(statuses)} processes drained after SIGTERM and ended with exit status 0.")
    return not wrong
