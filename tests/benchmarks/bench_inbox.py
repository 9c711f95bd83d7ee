"""What the inbox costs: a service that keeps it beside the same service without it, in turns.

    python -m tests.benchmarks.bench_inbox

Without the inbox nothing of its own is written: no watermark, floor or mark of who is at work, so that what comes twice
would be done twice. All else is the same: lanes, groups, savepoints and commits. The messages wait in the memory bus,
because a broker would cost both sides alike and hide the difference.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, patch

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.benchmarks.path import PREFETCH, Measured, fill, handled_from_memory, messages_of, quiet, verdict
from tidings import EventStore, Service, open_store
from tidings.database.floors import Floor
from tidings.database.notes import Notes
from tidings.database.occupancy import Occupancy
from tidings.database.watermarks import Watermarks
from tidings.protocol.message import Message

ROUNDS, FLOOR = 5, 0.7
EVENTS = {"one INSERT": 5_000, "without session": 20_000}

tables = sa.MetaData()
effects = sa.Table("effects", tables, sa.Column("number", sa.Integer, primary_key=True), sa.Column("key", sa.String))

OWN: dict[type, tuple[str, ...]] = {
    Watermarks: ("move", "fence"),
    Floor: ("raise_to",),
    Occupancy: ("take", "leave"),
    Notes: ("add", "forget", "count"),
}
"""Methods of the inbox that read from or write to the database while a service is at work."""


def service_of(insert: bool) -> Service:
    service = Service("bench", tables=tables, prefetch=PREFETCH)
    if insert:

        @service.on(Measured)
        async def write(event: Measured, session: AsyncSession) -> None:
            await session.execute(sa.insert(effects).values(number=event.number, key=event.key))

    else:

        @service.on(Measured)
        async def see(event: Measured) -> None:
            pass

    return service


@contextmanager
def inbox(on: bool) -> Iterator[None]:
    if on:
        yield
        return
    with ExitStack() as patches:
        for table, names in OWN.items():
            nothing: dict[str, Any] = {name: AsyncMock(return_value=None) for name in names}
            patches.enter_context(patch.multiple(table, **nothing))
        yield


async def measure_row(store: EventStore, folder: Path, messages: Sequence[Message], row: str) -> int:
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(ROUNDS + 1):
        for on in (True, False) if number % 2 else (False, True):
            url = f"sqlite:///{folder}/{row}-{on}-{number}.db"
            with inbox(on):
                seconds = await handled_from_memory(service_of(row == "one INSERT"), url, store, messages)
            found[on].append(seconds)
    return verdict(
        f"inbox on / off, handler {row}", found[True][1:], found[False][1:], FLOOR, len(messages)
    )  # the first round warms up


async def measure(folder: Path) -> int:
    async with open_store(f"sqlite:///{folder}/events.db") as store:
        await fill(store, max(EVENTS.values()))
        messages = await messages_of(store)
        return max([await measure_row(store, folder, messages[: EVENTS[row]], row) for row in EVENTS])


def main() -> int:
    """Run the benchmark. Return exit status 1 when the floor is missed."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(measure(Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
