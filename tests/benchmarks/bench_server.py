"""The EventStoreDB-compatible server: appends of a sequential client, reading beside the store inside it, its memory.

    python -m tests.benchmarks.bench_server [--events 1000000]

The server is `python -m tidings server` on a database file, in a process of its own. Appending: esdbclient's
synchronous client, one durable event of 200 bytes after the other, beside what no append can do without: the same
client's no-op, a read of a stream that is not there, and SQLite's own durable commit on the same disk. Reading: the
whole log by the adapter, beside the embedded store read in this process. Memory: the most that the server had resident
while `--events` events were appended, a thousand at a time, and then read by a subscriber.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from statistics import median

from esdbclient import EventStoreDBClient, NewEvent, StreamState
from esdbclient.exceptions import NotFound

from tidings.stores import EventData, EventStore, RecordedEvent
from tidings.stores.eventstoredb.store import open_eventstoredb
from tidings.stores.sqlite.store import open_sqlite

DATA = b"x" * 200
CALLS, CALL_ROUNDS = 400, 7
READ_EVENTS, READ_ROUNDS = 100_000, 5
EVENTS, BATCH, IN_FLIGHT = 1_000_000, 1_000, 8
APPENDS_PER_SECOND, APPENDS_TO_PARTS = 1_000.0, 0.5
EVENTS_PER_SECOND, READ_TO_EMBEDDED = 30_000.0, 0.3
LIMIT_MB = 200.0


@contextmanager
def served(folder: str) -> Iterator[tuple[str, int]]:
    """Yield the URI of a server and its process id."""
    command = [sys.executable, "-m", "tidings", "server", "--db", f"{folder}/served.db", "--port", "0"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split("listening on ")[1].strip(), process.pid
        finally:
            process.terminate()


def peak_mb(pid: int) -> float:
    """Return the peak of a process's resident memory, in MiB (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("the kernel does not tell the peak of resident memory")


def report(line: str, met: bool) -> bool:
    print(f"  {line} {'ok' if met else 'MISSED'}", flush=True)
    return met


# ---- appending, one after the other ------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    """Return the calls per second."""
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return CALLS / (time.perf_counter() - began)


def appending(uri: str, folder: str) -> bool:
    client = EventStoreDBClient(uri)

    def append() -> None:
        event = NewEvent(type="Measured", data=DATA)
        client.append_to_stream("sequential", current_version=StreamState.ANY, events=event)

    def nothing() -> None:
        with suppress(NotFound):
            client.get_stream("missing")

    with closing(sqlite3.connect(f"{folder}/raw.db", isolation_level=None)) as raw:
        for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "CREATE TABLE log (data)"):
            raw.execute(statement)

        def commit() -> None:
            raw.execute("INSERT INTO log VALUES (?)", (DATA,))

        rates = [(timed(append), timed(nothing), timed(commit)) for _ in range(CALL_ROUNDS + 1)][1:]
    client.close()
    appends, noops, commits = (median(rate[place] for rate in rates) for place in range(3))
    share = median(append * (1 / noop + 1 / commit) for append, noop, commit in rates)
    return report(
        f"sequential appends {appends:>8,.0f}/s  no-op {noops:,.0f}/s  commit {commits:,.0f}/s  {share:.2f} x of both  "
        f"(floor {APPENDS_PER_SECOND:,.0f}/s or {APPENDS_TO_PARTS} x)",
        appends >= APPENDS_PER_SECOND or share >= APPENDS_TO_PARTS,
    )


# ---- reading, and memory -----------------------------------------------------------------


async def fill(store: EventStore, events: int) -> None:
    """Append `count` events, a thousand at a time with eight appends in flight."""
    room = asyncio.Semaphore(IN_FLIGHT)

    async def append(first: int) -> None:
        async with room:
            batch = [EventData("Measured", DATA) for _ in range(min(BATCH, events - first))]
            await store.append(f"measure-{first // BATCH % 97}", batch)

    async with asyncio.TaskGroup() as tasks:
        for first in range(0, events, BATCH):
            tasks.create_task(append(first))


async def read(store: EventStore) -> float:
    """Return the events per second."""
    count, began = 0, time.perf_counter()
    async for _ in store.read_all(limit=READ_EVENTS):
        count += 1
    if count != READ_EVENTS:
        raise AssertionError(f"the log brought {count:,} of {READ_EVENTS:,} events")
    return count / (time.perf_counter() - began)


async def reading(uri: str, folder: str) -> bool:
    store, embedded = await open_eventstoredb(uri), await open_sqlite(f"sqlite:///{folder}/embedded.db")
    try:
        for each in (store, embedded):
            await fill(each, READ_EVENTS)
        rates = [(await read(store), await read(embedded)) for _ in range(READ_ROUNDS + 1)][1:]
    finally:
        await store.close()
        await embedded.close()
    own, direct = (median(pair[place] for pair in rates) for place in (0, 1))
    ratio = median(mine / theirs for mine, theirs in rates)
    return report(
        f"$all by the adapter{own:>8,.0f}/s  embedded{direct:>7,.0f}/s  {ratio:.2f} x  "
        f"(floor {EVENTS_PER_SECOND:,.0f}/s or {READ_TO_EMBEDDED} x)",
        own >= EVENTS_PER_SECOND or ratio >= READ_TO_EMBEDDED,
    )


async def remembering(uri: str, pid: int, events: int) -> bool:
    store = await open_eventstoredb(uri)
    try:
        idle, began = peak_mb(pid), time.perf_counter()
        await fill(store, events)
        written, between = time.perf_counter() - began, peak_mb(pid)
        count, began = 0, time.perf_counter()
        async for item in store.subscribe_all():
            if isinstance(item, RecordedEvent) and item.stream.startswith("measure-"):
                count += 1
                if count == events:
                    break
        caught_up = time.perf_counter() - began
    finally:
        await store.close()
    peak = peak_mb(pid)
    return report(
        f"memory over {events:,} events: {idle:.0f} MiB idle, {between:.0f} after the appends ({written:.0f} s), "
        f"{peak:.0f} after the subscriber ({caught_up:.0f} s)  (limit {LIMIT_MB:.0f})",
        peak < LIMIT_MB,
    )


def main(events: int = EVENTS) -> int:
    """Run the benchmark. Return exit status 1 when a floor or the limit is missed."""
    met = []
    print("tidings server, in a process of its own")
    with tempfile.TemporaryDirectory() as folder, served(folder) as (uri, _):
        met += [appending(uri, folder), asyncio.run(reading(uri, folder))]
    with tempfile.TemporaryDirectory() as folder, served(folder) as (uri, pid):
        met.append(asyncio.run(remembering(uri, pid, events)))
    return int(not all(met))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=EVENTS)
    sys.exit(main(parser.parse_args().events))
