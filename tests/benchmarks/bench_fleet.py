"""Four services at once on one broker, relay and services as processes of their own: what goes in, what comes out.

    python -m tests.benchmarks.bench_fleet

It has no floor: it prints events a second into the exchange and effects a second out of it, and each process's CPU.
"""

from __future__ import annotations

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

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.benchmarks.path import Measured, fill, make_queue, with_broker
from tidings import Service, open_store
from tidings.hosting.serve import serve
from tidings.testing.brokers import RabbitMQ, RabbitMQNode

EVENTS = 12_000
SERVICES = ("first", "second", "third", "fourth")
DEADLINE = 120.0

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


def main() -> int:
    """Run the benchmark. Return exit status 0: it has no floor."""
    return with_broker(measure)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        play(sys.argv[1])
    else:
        sys.exit(main())
