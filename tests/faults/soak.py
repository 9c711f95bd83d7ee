"""`python -m tests.faults.soak --minutes N [--seed S]`: a night of random faults under order traffic, and what held.

The demo's processes (event store, two relays, five services, RabbitMQ) trade real orders while faults of
`tests.faults.night` meet them, often two at once. At the end everything is counted: exit status 1 when a promise broke.
A part of the minutes goes to the deterministic simulation.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from math import ceil
from pathlib import Path
from typing import Final

from services.demo.__main__ import DATA, log_to
from services.demo.books import read_books
from services.demo.fleet.audit import audit, read_effects
from services.demo.fleet.processes import Died, NotReady, free_ports
from services.demo.fleet.reading import read_log
from services.demo.fleet.scene import SALES, TARGETS, Scene, ledger, scene
from services.demo.fleet.shop import ShopFailed
from services.demo.invariants import Check, checks
from services.demo.stock import opening_stock
from services.demo.trade import take_in
from services.importer import Invoice, Kind, invoices, read_rows
from services.payment import payment
from tests.faults.night import FAULTS, Fault, Night
from tidings._support.tasks import leading, supervised
from tidings.errors import TidingsError

__all__ = ["main", "soak"]

BESIDE: Final = 4
"""Invoices that are placed concurrently."""
PAUSE: Final = 1.2
"""Seconds between two invoices of each task: about 3 a second in all, with 20 lines each."""
CALM: Final = (1.0, 5.0)
"""Seconds from the recovery of one fault to the next."""
TWO_AT_ONCE: Final = 0.25
"""Probability that a second fault hits something else at the same time."""
WITHIN: Final = 120.0
"""Seconds from the end of a fault until orders must go through again. Longer is a broken promise."""
SIMULATED: Final = 0.2
"""Share of the minutes for the simulation."""
DEBUG: Final = ("--log-level", "debug")
"""Log level at which a service writes a line for each repeated delivery that it drops."""
BROKEN: Final = (Died, NotReady, ShopFailed, TidingsError, TimeoutError)


@dataclass(slots=True)
class Trade:
    """Traffic: the file's invoices again and again, under new numbers, until told to stop."""

    play: Scene
    coming: Iterator[Invoice]
    placed: dict[str, float] = field(default_factory=dict)
    """Order id to the monotonic time of the answer."""
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(BESIDE):
                tasks.create_task(self._carry())

    async def _carry(self) -> None:
        while not self.stopped.is_set():
            invoice = next(self.coming)
            await take_in(invoice, "the soak", self.play.shop, self.play.warehouse)
            if invoice.kind is Kind.ORDER:
                self.placed[self.play.shop.id_of(invoice.number)] = time.monotonic()
            await asyncio.sleep(PAUSE)

    async def goes_through(self) -> float:
        """Wait until an order that is placed from now on has been through every service. Return the seconds. Raises
        `TimeoutError`."""
        began = time.monotonic()
        async with asyncio.timeout(WITHIN):
            while True:
                new = (name for name, at in self.placed.items() if at > began)
                if any(self.play.listener.tally.orders.get(name) == "dispatched" for name in new):
                    return time.monotonic() - began
                await asyncio.sleep(0.05)


@dataclass(slots=True)
class Result:
    """The counts of `soak`."""

    events: int = 0
    repeated: int = 0
    survived: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, float] = field(default_factory=dict)
    """Longest recovery of each fault, in seconds."""
    checks: list[Check] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return bool(self.survived) and bool(self.checks) and all(check.holds for check in self.checks)


async def soak(folder: Path, seconds: float, seed: int) -> Result:
    """Inject faults for some seconds, wait until everything is settled, then count. Raises one of `BROKEN`."""
    chance, result = random.Random(seed), Result()
    found = [invoice for invoice in invoices(read_rows(DATA)) if isinstance(invoice, Invoice)]
    rounds = ceil(seconds * BESIDE / PAUSE / len(found)) + 1
    stock = {sku: pieces * rounds for sku, pieces in opening_stock(found).items()}
    coming = (replace(invoice, number=f"{invoice.number}-{turn}") for turn in count(1) for invoice in found)
    async with scene(folder, stock, DEBUG) as play:
        for name, command, port in zip(
            ("relay-2", "payment-2", SALES.name),
            (("relay",), ("run", TARGETS[payment.name]), ("run", TARGETS[SALES.name])),
            free_ports(3),
            strict=True,
        ):
            await play.start(name, *command, *DEBUG, port=port)
        await play.ready()
        await play.look_into(SALES)
        trade = Trade(play, coming)
        try:
            async with supervised(trade.run(), stop=trade.stopped):
                await trade.goes_through()
                await _faults(Night(play, chance), trade, seconds, result)
        finally:
            result.repeated = _repeated(play)
        await play.ready()
        await play.silence()
        log = await read_log(play.store)
        result.events = play.listener.tally.events
        books = await read_books(play.engine, ledger(folder), await play.verify())
        result.checks += checks(play.listener.tally, books)
        result.checks += audit(log, await read_effects(play.engine, ledger(folder)))
        lost = [order for order in trade.placed if order not in log.baskets]
        result.checks.append(
            Check("every order that was answered is in the log", f"{len(trade.placed)}, {len(lost)} lost", not lost)
        )
        result.repeated = _repeated(play)
        statuses = await play.fleet.stop()
        ended = ", ".join(f"{name} {status}" for name, status in statuses.items() if status) or "all with status 0"
        result.checks.append(Check("every process drains after SIGTERM", ended, not any(statuses.values())))
    return result


async def _faults(night: Night, trade: Trade, seconds: float, result: Result) -> None:
    """Inject one fault after the other, sometimes two at once, each until orders go through again."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        chosen = _chosen(night.chance)
        name = " + ".join(fault.name for fault in chosen)
        print(f"{time.monotonic() - began:7.1f} s  {name} ... ", end="", flush=True)
        await asyncio.gather(*(fault.happen(night) for fault in chosen))
        recovery = await trade.goes_through()
        print(f"orders go through again after {recovery:.1f} s", flush=True)
        for fault in chosen:
            result.survived[fault.name] += 1
            result.recoveries[fault.name] = max(result.recoveries.get(fault.name, 0.0), recovery)
        await night.lasts(CALM)


def _chosen(chance: random.Random) -> list[Fault]:
    chosen = [chance.choice(FAULTS)]
    if chance.random() < TWO_AT_ONCE:
        chosen.append(chance.choice([fault for fault in FAULTS if fault.meets != chosen[0].meets]))
    return chosen


def _repeated(play: Scene) -> int:
    """Count the repeated deliveries that services dropped, from their logs."""
    total = 0
    for child in play.children.values():
        with child.log.open(encoding="utf-8", errors="replace") as lines:
            total += sum(1 for line in lines if '"event.repeated"' in line)
    return total


def _report(result: Result) -> None:
    print("\nInvariants")
    for check in result.checks:
        print(f"  {'ok    ' if check.holds else 'BROKEN'}  {check.what}: {check.numbers}")
    print("\nFaults survived, and the longest until an order placed after one had been through every service")
    for name, number in sorted(result.survived.items()):
        print(f"  {number:5}  {name:40} {result.recoveries[name]:6.1f} s")
    worst = max(result.recoveries, key=lambda name: result.recoveries[name], default="none")
    print(
        f"\nevents                {result.events:,}"
        f"\nfaults survived       {result.survived.total()}"
        f"\nduplicates absorbed   {result.repeated:,} repeated deliveries recognised and dropped"
        f"\nworst recovery        {result.recoveries.get(worst, 0.0):.1f} s ({worst})"
    )


def _simulate(minutes: float, seed: int) -> bool:
    """Run as many simulated worlds as fit into the minutes. Return whether the promises held in all of them."""
    from tidings.testing import simulation

    runs, failed = simulation.soak(minutes, seed=seed)
    print(f"simulated worlds      {runs:,} from seed {seed} on, {len(failed)} with a broken promise")
    for outcome in failed[:3]:
        print(f"  {outcome}")
    return runs > 0 and not failed


def main(arguments: list[str] | None = None) -> int:
    """Run the night. Return exit status 1 when a promise broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of what is chosen; by default a new one each time")
    chosen = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 32) if chosen.seed is None else chosen.seed
    folder = Path(tempfile.mkdtemp(prefix="tidings-soak-"))
    print(f"{chosen.minutes:g} minutes, seed {seed}; logs and databases are in {folder} meanwhile", flush=True)
    holds = False
    try:
        with (folder / "soak.log").open("a", encoding="utf-8") as log:
            log_to(log)
            result = asyncio.run(soak(folder, chosen.minutes * 60 * (1 - SIMULATED), seed))
        _report(result)
        holds = result.holds
    except (*BROKEN, BaseExceptionGroup) as error:
        cause = leading(error)
        if not isinstance(cause, BROKEN):
            raise
        print(f"\nBROKEN: {type(cause).__name__}: {cause}")
    if holds:
        shutil.rmtree(folder)
    holds = _simulate(chosen.minutes * SIMULATED, seed) and holds
    print(
        "\nEvery promise held."
        if holds
        else f"\nNOT every promise held. Again: --minutes {chosen.minutes:g} --seed {seed}"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
