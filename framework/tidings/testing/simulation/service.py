"""The simulated service: an audit row per event that it handles, handlers of every kind, some of which fail or emit."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from typing import Final

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tidings.modelling.context import Context
from tidings.modelling.events import Event
from tidings.modelling.handlers import Hold, Retry
from tidings.service import Service
from tidings.testing.simulation.loop import PROCESS

__all__ = [
    "ANSWERS",
    "KINDS",
    "LATE",
    "SECOND",
    "Answered",
    "Asked",
    "Called",
    "Counted",
    "Desk",
    "Fragile",
    "Ignored",
    "answers_to",
    "audit",
    "simulated_service",
    "tables",
]

tables = sa.MetaData()
audit = sa.Table(
    "audit",
    tables,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("position", sa.Integer, nullable=False),
    sa.Column("stream", sa.String, nullable=False),
    sa.Column("handler", sa.String, nullable=False),
)
"""Table with one row per effect, in the order in which they were written."""


class _Simulated(Event):
    n: int = 0
    fails: int = 0
    """Number of attempts that fail, in all processes together."""


class Counted(_Simulated, name="Counted"):
    """An event that is handled with a session."""


class Fragile(_Simulated, name="Fragile"):
    """An event that is handled with a session after some failures: it is held, and dead after too many."""


class Asked(_Simulated, name="Asked"):
    """An event that is handled with a session; its handler emits `Answered`."""


class Answered(_Simulated, name="Answered"):
    """An emitted event, which is handled with a session."""


class Called(_Simulated, name="Called"):
    """An event that is handled without a session; its handler emits `Answered`."""


class Ignored(_Simulated, name="Ignored"):
    """An event without a handler."""


SECOND: Final = "second"
"""Name of a second handler of `Counted` and `Fragile`, which takes its session late."""
LATE: Final = "late"
"""Name of a handler of `Counted` and `Asked` that some processes do not have."""

ANSWERS: Final = {"Asked": "answer", "Called": "call"}
"""Wire name of an event to the name of its handler that emits `Answered`."""

KINDS: Final[tuple[type[_Simulated], ...]] = (Counted, Counted, Fragile, Asked, Called, Ignored)


class Desk:
    """State that handlers share with the world, outside all processes and databases."""

    def __init__(self) -> None:
        self.failures: Counter[int] = Counter()
        """Position to number of failed attempts."""
        self.calls: defaultdict[int, int] = defaultdict(int)
        """Position to number of successful attempts of handlers without a session."""
        self.slow = 0.4
        """Seconds that some handlers without a session take."""
        self.heard: set[int] = set()
        """Positions that the second handler without a session has handled."""
        self.mended = False
        """No attempt fails any more."""

    async def work(self, context: Context, event: _Simulated) -> None:
        """Raise `RuntimeError` as often as the event says."""
        if not self.mended and self.failures[context.position] < event.fails:
            self.failures[context.position] += 1
            raise RuntimeError("the simulated handler fails")


def answers_to(n: int) -> str:
    """Return the stream of the answer to the n-th event."""
    return f"answers-{n % 3}"


def simulated_service(name: str = "audit", *, prefetch: int = 20, concurrency: int = 4, late: bool = True) -> Service:
    """Declare the service. With `late` it has a handler that other processes may not have yet, or no longer have."""
    service = Service(name, tables=tables, prefetch=prefetch, concurrency=concurrency)
    retry = Retry(attempts=2, delay=0.05, hold=Hold(attempts=2, delay=0.2), hold_key=True)

    async def note(context: Context, session: AsyncSession) -> None:
        await session.execute(
            audit.insert().values(position=context.position, stream=context.stream, handler=context.handler)
        )

    @service.on(Counted, Answered, retry=retry)
    async def count(event: Counted | Answered, context: Context, session: AsyncSession) -> None:
        await note(context, session)

    @service.on(Fragile, retry=retry)
    async def try_it(event: Fragile, context: Context, session: AsyncSession, desk: Desk) -> None:
        await note(context, session)
        await asyncio.sleep(0.001)
        await desk.work(context, event)

    @service.on(Asked, retry=retry)
    async def answer(event: Asked, context: Context, session: AsyncSession, desk: Desk) -> None:
        await asyncio.sleep(0.0 if event.n % 3 else 0.004)  # before its first statement, beside others
        await desk.work(context, event)
        await note(context, session)
        context.emit(answers_to(event.n), Answered(n=event.n))

    @service.on(Called, retry=retry)
    async def call(event: Called, context: Context, desk: Desk) -> None:
        if (process := PROCESS.get()) is not None:
            process.spring(f"call {event.n}")
        await asyncio.sleep(0.01 if event.n % 3 else desk.slow)
        await desk.work(context, event)
        desk.calls[context.position] += 1
        context.emit(answers_to(event.n), Answered(n=event.n))

    @service.on(Counted, retry=retry)
    async def hear(event: Counted, context: Context, desk: Desk) -> None:
        await asyncio.sleep(0.01 if event.n % 3 else 0.3)
        desk.heard.add(context.position)

    @service.on(Counted, Fragile, name=SECOND, retry=retry)
    async def count_again(event: Counted | Fragile, context: Context) -> None:
        await asyncio.sleep(0.003)
        async with context.session() as session:
            await note(context, session)

    if late:

        @service.on(Counted, Asked, name=LATE, retry=retry, since="start")
        async def count_late(event: Counted | Asked, context: Context, session: AsyncSession) -> None:
            await note(context, session)

    return service
