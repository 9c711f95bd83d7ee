"""The services of the fault tests, and the promises, checked on effects: what the log asks for against what was done.

`tidings run tests.faults.auditing:audit` runs one of the services, as a user would. Each writes a row per handled event
into its own database, where nothing forbids a second one, and emits an event of its own for every fifth.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from tests.faults.reader import reader
from tidings import Context, Event, EventStore, Service
from tidings.modelling.codec import CAUSATION, read_metadata
from tidings.modelling.handlers import Hold, Retry

__all__ = ["Asked", "Counted", "Errand", "Noted", "Row", "asked_of", "audit", "broken_promises", "rows_of", "second"]

log = structlog.get_logger(__name__)

EVERY: Final = 5
"""Every n-th event is answered with an event."""

tables = sa.MetaData()
effects = sa.Table(
    "audit",
    tables,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("event_id", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("appended", sa.Float, nullable=False),
    sa.Column("handled", sa.Float, nullable=False, index=True),
    sa.Column("pid", sa.Integer, nullable=False),
    comment="one row per effect; nothing here forbids a second one",
)

Fate = Literal["note", "fail", "wait"]


class Counted(Event, key="key"):
    """An event of the traffic. `number` counts up over all keys; `at` is the machine's monotonic clock, in seconds."""

    key: str
    number: int
    at: float
    fate: Fate = "note"
    """An event whose handler fails: `fail` at every attempt, `wait` at the first, so that it is held and handled
    later."""
    padding: str = ""


class Errand(Event, key="key"):
    """An event that is handled outside any transaction, for some seconds. With `blocks`, a process id, it blocks the
    whole event loop of that process; every other process handles it at once."""

    key: str
    seconds: float
    blocks: int | None = None


class Noted(Event, key="key"):
    """The event with which a service answers every fifth event and every errand."""

    key: str
    service: str
    number: int


def _audited(name: str) -> Service:
    service = Service(name, tables=tables)
    quick = Retry(attempts=1, delay=0.05, hold=Hold(attempts=3, delay=2.0, factor=1.0), hold_key=False)

    @service.on(Counted, retry=quick)
    async def note(event: Counted, context: Context, session: AsyncSession) -> None:
        if event.fate == "fail" or (event.fate == "wait" and context.attempt == 1):
            raise ValueError(f"number {event.number} is not to be handled now")
        await session.execute(
            effects.insert().values(
                position=context.position,
                event_id=str(context.event.id),
                key=event.key,
                number=event.number,
                appended=event.at,
                handled=time.monotonic(),
                pid=os.getpid(),
            )
        )
        if event.number % EVERY == 0:
            context.emit(f"noted-{name}-{event.key}", Noted(key=event.key, service=name, number=event.number))

    @service.on(Errand)
    async def run_errand(event: Errand, context: Context) -> None:
        log.info("errand.begun", key=event.key)
        if event.blocks is None:
            await asyncio.sleep(event.seconds)
        elif event.blocks == os.getpid():
            time.sleep(event.seconds)  # noqa: ASYNC251 - this is the fault
        context.emit(f"noted-{name}-{event.key}", Noted(key=event.key, service=name, number=-1))

    return service


audit = _audited("audit")
second = _audited("second")


# ---- what was done -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One effect. Effects are listed in the order in which they became durable."""

    position: int
    event_id: str
    key: str
    number: int
    appended: float
    handled: float
    pid: int


def query(database: Path | str, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """Query a service's database, a file or a URL. Returns nothing while its tables do not exist yet."""
    if isinstance(database, str):
        return reader.ask(database, sql, *values)
    if not database.exists():
        return []
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
        try:
            return connection.execute(sql, values).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            return []


def rows_of(database: Path | str) -> list[Row]:
    """Return every effect of a service."""
    columns = ", ".join(Row.__slots__)
    return [Row(*row) for row in query(database, f"SELECT {columns} FROM audit ORDER BY id")]


def dead_of(database: Path | str) -> list[tuple[int, str]]:
    """Return position and reason of a service's dead letters."""
    return [(position, reason) for position, reason in query(database, "SELECT position, reason FROM tidings_dead")]


# ---- what the log asks for -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Asked:
    """The log, read once: which effects must exist, and which answers there are."""

    counted: dict[int, tuple[str, Counted]] = field(default_factory=dict)
    """Position to event id and event."""
    errands: dict[int, str] = field(default_factory=dict)
    """Position to event id."""
    noted: list[tuple[str, str]] = field(default_factory=list)
    """Service and id of the event that it answered, in the order of the log."""

    def expected(self) -> list[int]:
        """Return the positions of events that must have an effect."""
        return [position for position, (_, event) in self.counted.items() if event.fate != "fail"]

    def answers(self) -> list[str]:
        """Return the ids of events that each service must have answered."""
        counted = [self.counted[position] for position in self.expected()]
        return [id_ for id_, event in counted if event.number % EVERY == 0] + list(self.errands.values())


async def asked_of(store: EventStore) -> Asked:
    """Read the whole log."""
    found = Asked()
    async for event in store.read_all():
        match event.type:
            case "Counted":
                found.counted[event.position] = str(event.id), Counted.model_validate_json(event.data)
            case "Errand":
                found.errands[event.position] = str(event.id)
            case "Noted":
                said = Noted.model_validate_json(event.data)
                found.noted.append((said.service, str(read_metadata(event)[CAUSATION])))
    return found


def broken_promises(asked: Asked, acknowledged: Mapping[int, int], databases: Mapping[str, Path | str]) -> list[str]:
    """Return every broken promise in words: nothing lost, each effect once, in order per key. `acknowledged` is what
    the producer was told, number to position; `databases` are those of the services, by name."""
    broken = []
    in_log = {event.number: position for position, (_, event) in asked.counted.items()}
    wrong = {number: position for number, position in acknowledged.items() if in_log.get(number) != position}
    broken += [
        f"acknowledged at {position}, not there in the log: number {number}" for number, position in wrong.items()
    ]
    if len(in_log) != len(asked.counted):
        broken.append(f"{len(asked.counted) - len(in_log)} numbers are twice in the log")
    for name, database in databases.items():
        broken += [f"{name}: {what}" for what in _broken_in(asked, rows_of(database), dead_of(database))]
        said = [cause for service, cause in asked.noted if service == name]
        broken += [f"{name}: {what}" for what in _once("answer", asked.answers(), said)]
    return broken


def _broken_in(asked: Asked, rows: list[Row], dead: list[tuple[int, str]]) -> list[str]:
    broken = _once("effect", asked.expected(), [row.position for row in rows])
    by_key: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        by_key[row.key].append(row.position)
    # What is given up gives up its own place only; what waited was held with its key, so it keeps order too.
    broken += [f"{key} out of order: {found}" for key, found in by_key.items() if found != sorted(found)]
    doomed = [position for position, (_, event) in asked.counted.items() if event.fate == "fail"]
    broken += _once("dead letter", doomed, [position for position, _ in dead])
    broken += [f"dead at {position}: {reason}" for position, reason in dead if position not in doomed]
    return broken


def _once(what: str, expected: Iterable[Any], found: Iterable[Any]) -> list[str]:
    wanted, counts = set(expected), Counter(found)
    lost, twice, strange = (
        sorted(wanted - counts.keys()),
        sorted(n for n in counts if counts[n] > 1),
        counts.keys() - wanted,
    )
    broken = []
    if lost:
        broken.append(f"lost: no {what} of {len(lost)} of {len(wanted)} events, the first: {lost[:5]}")
    if twice:
        broken.append(f"twice: more than one {what} of {len(twice)} events, the first: {twice[:5]}")
    if strange:
        broken.append(f"strange: {what} of what nobody asked for: {sorted(strange)[:5]}")
    return broken
