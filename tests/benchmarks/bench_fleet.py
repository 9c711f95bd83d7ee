"""Four services at once on one broker, relay and services as processes of their own: what goes in, what comes out.

    python -m tests.benchmarks.bench_fleet
    python -m tests.benchmarks.bench_fleet --against CHECKOUT [--rounds 3] [--events 12000]

It has no floor: it prints events a second into the exchange and effects a second out of it, and each process's CPU.
With `--against`, this checkout and another one (an older commit, whose environment is in its `.venv`) run their own
`bench_fleet` in turns, and the medians over the rounds of events a second, and of the services' CPU, are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.benchmarks.path import Measured, fill, make_queue, with_broker
from tidings import Service, open_store
from tidings.hosting.serve import serve
from tidings.testing.brokers import RabbitMQ, RabbitMQNode

EVENTS = 12_000
SERVICES = ("first", "second", "third", "fourth")
DEADLINE = 120.0
PATIENCE = 900.0
"""Seconds that a run may take when two checkouts are compared: one may be slow, and the machine busy."""

tables = sa.MetaData()
effects = sa.Table("effects", tables, sa.Column("id", sa.Integer, primary_key=True), sa.Column("number", sa.Integer))


def service_of(name: str) -> Service:
    service = Service(name, tables=tables)

    @service.on(Measured)
    async def write(event: Measured, session: AsyncSession) -> None:
        await session.execute(sa.insert(effects).values(number=event.number))

    return service


def play(role: str) -> None:
    """Run one process of this benchmark until SIGTERM."""
    asyncio.run(serve(relay=True) if role == "relay" else serve(service_of(role)))


@contextmanager
def processes(
    url: str, folder: Path, roles: tuple[str, ...], module: str = "tests.benchmarks.bench_fleet"
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Run `python -m MODULE ROLE` for each role until the block ends, with logs in the folder."""
    env = os.environ | {
        "TIDINGS_STORE": f"sqlite:///{folder}/events.db",
        "TIDINGS_BUS": url,
        "TIDINGS_DATABASE": f"sqlite:///{folder}/{{service}}.db",
    }
    command = [sys.executable, "-m", module]
    started = {}
    try:
        for role in roles:
            with (folder / f"{role}.log").open("wb") as log:
                started[role] = subprocess.Popen([*command, role], env=env, stdout=log, stderr=subprocess.STDOUT)
        yield started
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.wait(15)


def cpu_seconds(process: int) -> float:
    """Return the CPU seconds of a process so far (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rows(folder: Path, service: str) -> int:
    try:
        with closing(sqlite3.connect(f"file:{folder}/{service}.db?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM effects").fetchone()[0])
    except sqlite3.OperationalError:  # not made yet
        return 0


async def until_all(folder: Path, began: float) -> dict[str, float]:
    """Return the seconds until each service had every effect."""
    ended: dict[str, float] = {}
    while len(ended) < len(SERVICES):
        for service in SERVICES:
            if service not in ended and rows(folder, service) >= EVENTS:
                ended[service] = time.perf_counter() - began
        if time.perf_counter() - began > DEADLINE:
            raise TimeoutError(f"after {DEADLINE:g} s only {sorted(ended)} had handled everything; see {folder}/*.log")
        await asyncio.sleep(0.02)
    return ended


async def measure(url: str, folder: Path, broker: RabbitMQ) -> int:
    async with open_store(f"sqlite:///{folder}/events.db") as store:
        await fill(store, EVENTS)
    for service in SERVICES:
        await make_queue(url, service)
    roles = {}
    if isinstance(broker, RabbitMQNode):
        roles["rabbitmq"] = int(re.sub(r"\D", "", broker.eval("os:getpid()")))
    with processes(url, folder, SERVICES) as services:
        while any(not (folder / f"{name}.db").exists() for name in SERVICES):
            await asyncio.sleep(0.05)
        roles |= {name: process.pid for name, process in services.items()}
        before = {role: cpu_seconds(process) for role, process in roles.items()}
        began = time.perf_counter()
        with processes(url, folder, ("relay",)) as relay:
            roles["relay"] = relay["relay"].pid
            ended = await until_all(folder, began)
            used = {role: cpu_seconds(process) - before.get(role, 0.0) for role, process in roles.items()}
    took = max(ended.values())
    print(
        f"{len(SERVICES)} services, one INSERT each, {EVENTS:,} events: {EVENTS / took:,.0f} events/s in, "
        f"{len(SERVICES) * EVENTS / took:,.0f} effects/s out, {took:.1f} s on {os.cpu_count()} cores "
        f"({sum(used.values()) / took:.1f} busy)"
    )
    print("CPU seconds: " + ", ".join(f"{role} {seconds:.1f}" for role, seconds in used.items()))
    return 0


def run_of(checkout: Path, python: str, events: int) -> tuple[float, float]:
    """Run the benchmark of a checkout. Return events a second in, and CPU seconds of its services together."""
    bench = f"from tests.benchmarks import bench_fleet as it; it.EVENTS, it.DEADLINE = {events}, {PATIENCE}; it.main()"
    done = subprocess.run([python, "-c", bench], cwd=checkout, capture_output=True, text=True, check=False)
    speed = re.search(r"([\d,]+) events/s in", done.stdout)
    used = [re.search(rf"\b{name} ([\d.]+)", done.stdout) for name in SERVICES]
    if done.returncode or speed is None:
        raise RuntimeError(f"the benchmark of {checkout} failed:\n{done.stdout}{done.stderr}")
    return float(speed[1].replace(",", "")), sum(float(found[1]) for found in used if found is not None)


def compare(other: Path, rounds: int, events: int) -> int:
    """Print how much faster this checkout is than another. Return exit status 0."""
    here = Path(__file__).parents[2]
    ratios: list[tuple[float, float]] = []
    for _ in range(rounds):
        ours = run_of(here, sys.executable, events)
        theirs = run_of(other, str(other / ".venv" / "bin" / "python"), events)
        ratios.append((ours[0] / theirs[0], theirs[1] / ours[1]))
        print(
            f"events/s in: {ours[0]:,.0f} here, {theirs[0]:,.0f} there; "
            f"CPU seconds of the services: {ours[1]:.1f} here, {theirs[1]:.1f} there",
            flush=True,
        )
    speed, cpu = (median(pair[place] for pair in ratios) for place in (0, 1))
    print(f"four services / {other}: {speed:.2f} x events a second, {cpu:.2f} x by CPU; {rounds} rounds")
    return 0


def main() -> int:
    """Run the benchmark. Return exit status 0: it has no floor."""
    return with_broker(measure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="?", help="what this process is, started by the benchmark itself")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--events", type=int, default=EVENTS)
    given = parser.parse_args()
    if given.role:
        play(given.role)
    else:
        sys.exit(compare(given.against.resolve(), given.rounds, given.events) if given.against else main())
