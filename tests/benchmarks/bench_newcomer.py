"""A service added late reads a log of a million events while more are appended: nothing missing, nothing twice, memory.

    python -m tests.benchmarks.bench_newcomer

The log's history was published before, so that only the log has it. Then a producer goes on, the relay publishes what
it appends through RabbitMQ, and a service that nobody knew starts. For each event it writes a record into a file of its
own, which is compared with the log at the end; its peak of resident memory is compared with that of the same service on
a log of 10,000 events.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from uuid import uuid4

from tests.benchmarks.bench_fleet import processes
from tests.benchmarks.bench_server import peak_mb
from tests.benchmarks.path import KEYS, Measured, drop_queue, with_broker
from tidings import Context, EventData, EventStore, Service, open_store
from tidings.database.engine import file_of
from tidings.hosting.serve import serve
from tidings.operations.verify import last_carried
from tidings.protocol.position import CARRIED, carried, partition_key
from tidings.relay.checkpoints import write_checkpoint
from tidings.testing.brokers import RabbitMQ

EVENTS, FEW = 1_000_000, 10_000
GROWTH_MB = 40.0
"""MiB by which the service's peak may be higher with the long log."""
BATCH, IN_FLIGHT = 1_000, 8
PAUSE = 0.01
"""Seconds between two events of the producer."""
LIVE_SECONDS = 2.0
"""Seconds of traffic after the newcomer has caught up."""
DEADLINE = 300.0
RECORD = struct.Struct("<QQ")
"""One effect: the event's position and the number of its partition key."""


# ---- the service -------------------------------------------------------------------------


class Audit:
    """The file of the service's effects, in order."""

    def __init__(self, file: BufferedWriter) -> None:
        self._file = file

    def note(self, position: int, key: str) -> None:
        self._file.write(RECORD.pack(position, number_of(key)))


def number_of(key: str) -> int:
    return int(key.removeprefix("key-"))


@asynccontextmanager
async def auditing(service: Service) -> AsyncIterator[Audit]:
    database = file_of(service.running_now.database.shown)
    with Path(database or "").with_name("audit").open("wb") as file:
        yield Audit(file)


newcomer = Service("newcomer", lifespan=auditing)


@newcomer.on(Measured)
async def note(event: Measured, context: Context, audit: Audit) -> None:
    audit.note(context.position, event.key)


# ---- the log -----------------------------------------------------------------------------


def event(number: int) -> EventData:
    """Encode an event like `tidings.modelling.codec.encode`, in a fifth of the time."""
    identity, key = uuid4(), f"key-{number * 7919 % KEYS:03}"
    data = f'{{"key":"{key}","number":{number},"text":"{"x" * 150}"}}'
    metadata = f'{{"$correlationId":"{identity}","schemaVersion":1,"partitionKey":"{key}"}}'
    return EventData("Measured", data.encode(), metadata.encode(), id=identity)


async def write_history(store: EventStore, count: int) -> None:
    """Append the history, a thousand events at a time with eight appends in flight, as if a relay had published it."""
    room = asyncio.Semaphore(IN_FLIGHT)

    async def append(first: int) -> None:
        async with room:
            events = [event(number) for number in range(first, min(first + BATCH, count))]
            await store.append(f"history-{first // BATCH % 97}", events)

    async with asyncio.TaskGroup() as tasks:
        for first in range(0, count, BATCH):
            tasks.create_task(append(first))
    await write_checkpoint(store, "main", await store.head())


async def produce(store: EventStore, first: int) -> None:
    for number in range(first, sys.maxsize):
        await store.append(f"live-{number % 64}", [event(number)])
        await asyncio.sleep(PAUSE)


# ---- the measure -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """The result of one log."""

    events: int
    seconds: float
    """Seconds from the service's start until it had caught up."""
    peak_mb: float
    progress: int
    """Number of log lines that say how far the pass is."""


def effects_in(audit: Path) -> list[tuple[int, int]]:
    """Position and key of each effect, in order."""
    return [(position, key) for position, key in RECORD.iter_unpack(audit.read_bytes())]


def said(log: Path, word: str) -> int:
    """Return how often the service logged it."""
    return log.read_bytes().count(word.encode())


async def compare(store: EventStore, audit: Path) -> int:
    """Return the number of events. Raises `AssertionError` if one had no effect, or two, or out of order."""
    records = effects_in(audit)
    last: dict[int, int] = {}
    for position, key in records:
        assert last.get(key, -1) < position, f"key {key}: position {position} came after {last[key]}"
        last[key] = position
    effects = iter(sorted(records))
    count = 0
    async for recorded in store.read_all(filter=CARRIED):
        if carried(recorded) is not None:
            expected = recorded.position, number_of(partition_key(recorded))
            assert next(effects, None) == expected, f"not exactly one effect of the event at {recorded.position}"
            count += 1
    assert next(effects, None) is None, "there is an effect of what nobody appended"
    return count


async def until(log: Path, word: str) -> None:
    """Wait until the service has logged a word."""
    deadline = time.perf_counter() + DEADLINE
    while not said(log, word):
        assert time.perf_counter() < deadline, f"after {DEADLINE:g} s the service has not said {word}: see {log}"
        await asyncio.sleep(0.1)


async def settled(database: Path, position: int) -> None:
    """Wait until the service has settled the log up to a position."""
    deadline = time.perf_counter() + DEADLINE
    while floor_of(database) < position:
        assert time.perf_counter() < deadline, f"after {DEADLINE:g} s position {position} is not settled"
        await asyncio.sleep(0.1)


def floor_of(database: Path) -> int:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
        return int(connection.execute("SELECT min(position) FROM tidings_floors").fetchone()[0])


async def join(url: str, folder: Path, history: int) -> Found:
    """Run a newcomer on a log of `count` events, in a new folder."""
    log, database = folder / "newcomer.log", folder / "newcomer.db"
    async with open_store(f"sqlite:///{folder}/events.db") as store:
        await write_history(store, history)
        module = "tests.benchmarks.bench_newcomer"
        with processes(url, folder, ("relay",), module=module):
            producing = asyncio.create_task(produce(store, history))
            began = time.perf_counter()
            with processes(url, folder, ("newcomer",), module=module) as started:
                await until(log, "pass.finished")
                seconds = time.perf_counter() - began
                await asyncio.sleep(LIVE_SECONDS)  # of live traffic
                producing.cancel()
                await asyncio.gather(producing, return_exceptions=True)
                await settled(database, await last_carried(store))
                peak = peak_mb(started["newcomer"].pid)
        events = await compare(store, folder / "audit")
    await drop_queue(url, newcomer.name)
    return Found(events, seconds, peak, said(log, "pass.progressed"))


async def measure(url: str, folder: Path, events: int) -> int:
    few, many = [await join(url, Path(tempfile.mkdtemp(dir=folder)), history) for history in (min(FEW, events), events)]
    grown = many.peak_mb - few.peak_mb
    for found in (few, many):
        print(
            f"newcomer, {found.events:,} events with {found.events / found.seconds:,.0f}/s while traffic went on: each "
            f"had one effect, in order per key; {found.progress} lines of progress, peak {found.peak_mb:.0f} MiB",
            flush=True,
        )
    shown = many.progress > 0
    print(
        f"newcomer's peak memory over {events:,} events: {grown:+.0f} MiB (limit {GROWTH_MB:.0f}) "
        f"{'ok' if grown <= GROWTH_MB and shown else 'MISSED'}{'' if shown else ', no progress shown'}"
    )
    return int(grown > GROWTH_MB or not shown)


def play(role: str) -> None:
    """Run one process of this benchmark until SIGTERM."""
    asyncio.run(serve(relay=True) if role == "relay" else serve(newcomer))


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark. Return exit status 1 when memory grew over the limit, or no progress was logged."""
    parser = argparse.ArgumentParser(prog="bench_newcomer")
    parser.add_argument("--events", type=int, default=EVENTS, help=f"in the long log ({EVENTS:,})")
    options = parser.parse_args(arguments or [])

    async def run(url: str, folder: Path, broker: RabbitMQ) -> int:
        return await measure(url, folder, options.events)

    return with_broker(run)


if __name__ == "__main__":
    if sys.argv[1:] in (["relay"], ["newcomer"]):
        play(sys.argv[1])
    else:
        sys.exit(main(sys.argv[1:]))
