"""What held events cost those that are not: a service with 10,000 held events beside one without, in turns.

    python -m tests.benchmarks.bench_held

Held events are due far away, so that none of them runs: 10,000 of as many partition keys, or 10,000 behind one that
failed. What is measured are events of other keys. They wait in the memory bus, because a broker would cost all sides
alike and hide the difference.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.benchmarks.path import PREFETCH, Measured, fill, handled_from_memory, messages_of, quiet, verdict
from tidings import EventStore, Hold, Retry, Service, open_store
from tidings.database.engine import open_database
from tidings.database.held_events import HeldEvent
from tidings.database.held_rows import HeldRows
from tidings.database.tables import floors
from tidings.modelling.fingerprints import fingerprint
from tidings.protocol.message import Message
from tidings.protocol.position import ALL_BUCKETS, bucket_of, carried
from tidings.stores import RecordedEvent

ROUNDS, FLOOR = 5, 0.9
HELD = 10_000
EVENTS = {"one INSERT": 5_000, "without session": 80_000}
AWAY = 3_600.0
"""Seconds until the held events are due. Less than the longest pause of the service's handlers."""
SIDES = ("none", "of as many keys", "behind one of them")

tables = sa.MetaData()
effects = sa.Table("effects", tables, sa.Column("number", sa.Integer, primary_key=True), sa.Column("key", sa.String))


def service_of(insert: bool) -> Service:
    service = Service("bench", tables=tables, prefetch=PREFETCH)
    retry = Retry(hold=Hold(maximum=2 * AWAY))
    if insert:

        @service.on(Measured, retry=retry)
        async def write(event: Measured, session: AsyncSession) -> None:
            await session.execute(sa.insert(effects).values(number=event.number, key=event.key))

    else:

        @service.on(Measured, retry=retry)
        async def see(event: Measured) -> None:
            pass

    return service


def rows(events: Sequence[RecordedEvent], service: Service, side: str) -> Iterator[HeldEvent]:
    """Return rows that hold the first events of the log, whose keys no other event has, for the service's handler as it
    is: what had failed in other code would be due at once."""
    due = time.time() + AWAY
    (handler,) = service.named.values()
    code = fingerprint(handler.function, handler.events)
    for number, event in enumerate(events):
        alone = side == "of as many keys"
        key = f"held-{number if alone else 0}"
        follows = not alone and number > 0
        attempts, reason = (0, "waits") if follows else (5, "TimeoutError: the gateway does not answer")
        held = HeldEvent(event, bucket_of(key), key, handler.name, attempts, 0, 0.0 if follows else due, reason, None)
        yield held._replace(code=code)


async def prepare(url: str, service: Service, store: EventStore, side: str) -> None:
    """Settle the first events of the log, by holding them if `side` says so."""
    log = await store.log_id()
    first = [event async for event in store.read_all(limit=HELD + 1) if carried(event) is not None][:HELD]
    async with open_database(url, service.tables) as database, database.transaction() as connection:
        await connection.execute(
            floors.insert().values(
                service=service.name, log=str(log), first_bucket=0, last_bucket=255, position=first[-1].position
            )
        )
        if side != "none":
            await HeldRows(service.name, log, ALL_BUCKETS).hold(connection, list(rows(first, service, side)))


async def measure_row(store: EventStore, folder: Path, messages: Sequence[Message], row: str) -> int:
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(ROUNDS + 1):
        for side in SIDES[number % 3 :] + SIDES[: number % 3]:
            service = service_of(row == "one INSERT")
            url = f"sqlite:///{folder}/{row}-{side}-{number}.db"
            await prepare(url, service, store, side)
            found[side].append(await handled_from_memory(service, url, store, messages))
    name = f"{HELD:,} held events {{}} / none, handler {row}"
    return max(
        verdict(name.format(side), found[side][1:], found["none"][1:], FLOOR, len(messages)) for side in SIDES[1:]
    )  # the first round warms up


async def measure(folder: Path) -> int:
    async with open_store(f"sqlite:///{folder}/events.db") as store:
        await fill(store, HELD)
        settled = await store.head()
        await fill(store, max(EVENTS.values()))
        messages = await messages_of(store, after=settled)
        return max([await measure_row(store, folder, messages[: EVENTS[row]], row) for row in EVENTS])


def main() -> int:
    """Run the benchmark. Return exit status 1 when the floor is missed."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(measure(Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
