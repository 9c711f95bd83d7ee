"""The path over a real RabbitMQ, with each client, between real processes that nobody harms (see `tests/faults`).

Audited on effects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.processes import (
    Workers,
    audit_of,
    proves_every_effect_once_in_order,
    tick,
    until,
)
from tidings import EventStore, open_store

pytestmark = [pytest.mark.served, pytest.mark.rabbitmq4]

EVENTS = 600
HALF = EVENTS // 2


@pytest.fixture
async def workers(tmp_path: Path, bus_url: str) -> AsyncIterator[Workers]:
    with Workers(tmp_path, bus_url) as found:
        yield found


@pytest.fixture
async def store(workers: Workers) -> AsyncIterator[EventStore]:
    async with open_store(workers.store) as opened:
        yield opened


async def all_arrive(workers: Workers, count: int, service: str = "audit", seconds: float = 60) -> None:
    database = workers.database(service)
    await until(lambda: len(audit_of(database)) >= count, f"{count} effects in {service}", seconds)


async def test_every_event_of_the_log_has_one_effect_in_order(workers: Workers, store: EventStore) -> None:
    workers.start("relay")
    service = workers.start("service")
    await tick(store, 0, EVENTS)
    await all_arrive(workers, EVENTS)
    assert await service.stop() == 0
    proves_every_effect_once_in_order(workers.database(), EVENTS)


async def test_subscriber_added_late_reads_all_history_and_joins_the_live_flow(
    workers: Workers, store: EventStore
) -> None:
    workers.start("relay")
    workers.start("service")
    await tick(store, 0, HALF)
    await all_arrive(workers, HALF)
    workers.start("service", "--name=latecomer")
    await tick(store, HALF, HALF)
    for name in ("audit", "latecomer"):
        await all_arrive(workers, EVENTS, name)
        proves_every_effect_once_in_order(workers.database(name), EVENTS)
