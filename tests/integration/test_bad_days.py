"""Days on which the wrong code runs, or the right code twice: what is said, and that nothing is lost afterwards."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from structlog.testing import capture_logs

from tests.integration.processes import (
    Worker,
    Workers,
    audit_of,
    proves_every_effect_once_in_order,
    tick,
    until,
)
from tidings import Event, Runtime, Service, Settings, open_store, wire_name
from tidings.database.tables import dead, held

SOME = 100


pytestmark = pytest.mark.faults


async def says(worker: Worker, *words: str, seconds: float = 60) -> str:
    """Wait for a line of its log that has all these words."""

    def found() -> str | None:
        return next((line for line in worker.log.splitlines() if all(word in line for word in words)), None)

    await until(lambda: found() is not None or not worker.alive, f"{words} in a line of the log", seconds)
    line = found()
    assert line is not None, f"it ended, and never said {words}:\n{worker.log[-2000:]}"
    return line


async def all_arrive(workers: Workers, count: int, seconds: float = 60) -> None:
    await until(lambda: len(audit_of(workers.database())) >= count, f"{count} effects", seconds)


# ---- the same service twice ----------------------------------------------------------------------------------------


async def test_an_embedded_service_started_twice_does_everything_once_and_says_so(tmp_path: Path) -> None:
    with Workers(tmp_path, "memory://") as workers:
        async with open_store(workers.store) as store:
            first, second = workers.start("service"), workers.start("service")
            both = (first, second)
            await until(lambda: any("service.standing_by" in each.log for each in both), "one of them stands by")
            await until(lambda: any("service.connected" in each.log for each in both), "the other one is at work")
            at_work = first if "service.standing_by" in second.log else second
            await tick(store, 0, 5 * SOME)
            await all_arrive(workers, 5 * SOME)
            assert (first.alive, second.alive) == (True, True)
            at_work.kill()
            await tick(store, 5 * SOME, SOME)
            await all_arrive(workers, 6 * SOME)
        proves_every_effect_once_in_order(workers.database(), 6 * SOME)


# ---- yesterday's code beside today's -------------------------------------------------------------------------------


class Placed(Event, name="Placed", version=2, oldest=2, key="order_id"):
    order_id: str
    country: str


class Paid(Event, name="Paid", version=2, oldest=2, key="order_id"):
    order_id: str
    pence: int


class Shipped(Event, name="Shipped", key="order_id"):
    order_id: str
    carrier: str
    weight: int


class Insured(Event, name="Insured", key="order_id"):
    order_id: str


class PlacedYesterday(Event, name="Placed", key="order_id"):
    order_id: str


class PaidYesterday(Event, name="Paid", key="order_id"):
    order_id: str
    pounds: int


class ShippedYesterday(Event, name="Shipped", key="order_id"):
    order_id: str


async def test_yesterdays_service_beside_todays_reads_what_fits_and_holds_what_needs_its_next_deploy(
    tmp_path: Path,
) -> None:
    seen: list[str] = []
    today, yesterday = Service("today"), Service("yesterday")

    @today.on(Placed, Shipped, Insured, Paid)
    async def handle(event: Placed | Shipped | Insured | Paid) -> None:
        seen.append(f"today {wire_name(event)} {event.order_id}")

    @yesterday.on(PlacedYesterday, ShippedYesterday, PaidYesterday)
    async def handle_as_yesterday(event: PlacedYesterday | ShippedYesterday | PaidYesterday) -> None:
        seen.append(f"yesterday {wire_name(event)} {event.order_id}")

    settings = Settings(store=f"sqlite:///{tmp_path}/events.db", database=f"sqlite:///{tmp_path}/{{service}}.db")
    with capture_logs() as logs:
        async with Runtime(today, yesterday, settings=settings) as runtime:
            await today.append("order-a", Shipped(order_id="a", carrier="ship", weight=3), Insured(order_id="a"))
            await today.append("order-b", Placed(order_id="b", country="Iceland"))
            await today.append("order-c", Paid(order_id="c", pence=7))

            async def found(table: sa.Table) -> list[sa.Row[Any]]:
                async with runtime.engine(yesterday).connect() as connection:
                    return list(await connection.execute(sa.select(table)))

            async with asyncio.timeout(20):
                while not (rows := await found(held)) or len(seen) < 6:
                    await asyncio.sleep(0.01)
            assert await found(dead) == []
            (row,) = rows
            (line,) = [line for line in logs if line["event"] == "event.held"]
    assert sorted(seen) == [
        "today Insured a", "today Paid c", "today Placed b", "today Shipped a",
        "yesterday Placed b", "yesterday Shipped a",
    ]  # fmt: skip
    said = (
        "schema version 2; service 'yesterday' reads it with PaidYesterday at version 1, which it does not fit: "
        "pounds: Field required. Deploy service 'yesterday' with PaidYesterday at version 2; until then"
    )
    assert (row.service, row.type, row.stream) == ("yesterday", "Paid", "order-c")
    assert said in row.reason
    assert (line["service"], line["reason"]) == ("yesterday", row.reason)


async def test_a_database_of_tomorrows_tidings_ends_the_process_with_the_remedy(tmp_path: Path) -> None:
    with Workers(tmp_path, "memory://") as workers:
        service = workers.start("service")
        await says(service, "service.connected")
        assert await service.stop() == 0
        with closing(sqlite3.connect(workers.database())) as connection, connection:
            connection.execute("UPDATE tidings_schema SET version = version + 1")
        before = workers.database().read_bytes()
        refused = workers.start("service")
        await until(lambda: not refused.alive, "the process ends")
        assert "audit.db has Tidings tables of version" in refused.log
        assert "upgrade it" in refused.log
        assert workers.database().read_bytes() == before
