"""`verify` names exactly what is missing, and says so in words."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.databases import database_url
from tidings import Context, Event, Runtime, Service, Settings
from tidings.database.engine import open_database
from tidings.modelling.handlers import Retry
from tidings.operations.verify import Report, verify

pytestmark = [pytest.mark.served, pytest.mark.postgresql]


class Ordered(Event):
    order_id: str


class Ignored(Event):
    pass


def shop() -> Service:
    service = Service("shop")

    @service.on(Ordered, retry=Retry(attempts=2, delay=0.001, hold=None))
    async def take(event: Ordered, context: Context) -> None:
        if event.order_id == "poison":
            raise ValueError("it cannot be taken")
        context.emit(f"taken-{event.order_id}", Ignored())

    return service


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        store=f"sqlite:///{tmp_path}/events.db",
        bus=f"memory://{uuid4()}",
        database=database_url(tmp_path),
    )


async def look(settings: Settings, runtime: Runtime, service: Service) -> Report:
    async with open_database(settings.database_of(service.name)) as database:
        return await verify(runtime.store, [(service, database)])


async def test_all_is_settled_when_every_event_was_handled(settings: Settings) -> None:
    service = shop()
    async with Runtime(service, settings=settings) as runtime:
        await service.append("order-1", Ordered(order_id="1"))
        report = await runtime.settled()
    assert report.ok
    assert report.position > 0
    assert "all settled" in str(report)
    assert [part.dead_count for part in report.services] == [0]


async def test_events_that_a_stopped_service_has_not_handled_are_pending_by_name(settings: Settings) -> None:
    service = shop()
    async with Runtime(service, settings=settings) as runtime:
        await service.append("order-1", Ordered(order_id="1"))
        await runtime.settled()
    other = Service("other")
    async with Runtime(other, settings=settings) as runtime:
        missing = await other.append("order-2", Ordered(order_id="2"))
        await other.append("noise-1", Ignored())
        report = await look(settings, runtime, service)
    (part,) = report.services
    assert not report.ok
    assert part.pending_count == 1
    assert part.pending[0].position == missing.position
    assert part.pending[0].stream == "order-2"
    assert f"pending Ordered {part.pending[0].event_id} at order-2@0" in str(report)
    assert "NOT all settled" in str(report)


async def test_a_dead_event_is_settled_and_listed_with_its_reason(settings: Settings) -> None:
    service = shop()
    async with Runtime(service, settings=settings) as runtime:
        await service.append("order-x", Ordered(order_id="poison"))
        report = await runtime.settled()
    (part,) = report.services
    assert report.ok
    assert part.dead_count == 1
    assert part.dead[0].attempts == 2
    assert "ValueError: it cannot be taken" in str(report)


async def test_a_service_that_never_ran_has_everything_pending(settings: Settings) -> None:
    other, never = Service("other"), shop()
    async with Runtime(other, settings=settings) as runtime:
        for number in range(30):
            await other.append(f"order-{number}", Ordered(order_id=str(number)))
        report = await look(settings, runtime, never)
    (part,) = report.services
    assert (part.pending_count, len(part.pending)) == (30, 20)
    assert "and 10 more pending" in str(report)


async def test_what_a_report_quotes_cannot_move_a_cursor(settings: Settings) -> None:
    service = Service("shop")

    @service.on(Ordered, retry=Retry(attempts=1, hold=None))
    async def take(event: Ordered) -> None:
        raise ValueError("\x1b[2J\u202eall is well")

    async with Runtime(service, settings=settings) as runtime:
        await service.append("order-1", Ordered(order_id="1"))
        text = str(await runtime.settled())
    assert "ValueError: \\x1b[2J\\u202eall is well" in text
    assert all(line.isprintable() for line in text.split("\n"))
