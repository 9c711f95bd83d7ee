"""The path over a real RabbitMQ, with real processes killed at the worst moment. Every test audits effects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aio_pika
import pytest

from tests.integration.processes import (
    Workers,
    audit_of,
    proves_every_effect_once_in_order,
    tick,
    until,
)
from tidings import EventStore, open_bus, open_store
from tidings.buses import Subscription
from tidings.testing.brokers import RabbitMQNode

EVENTS = 600
HALF = EVENTS // 2


@pytest.fixture
async def workers(tmp_path: Path, amqp_url: str) -> AsyncIterator[Workers]:
    with Workers(tmp_path, amqp_url) as found:
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


async def test_service_killed_between_commit_and_acknowledgement_repeats_no_effect(
    workers: Workers, store: EventStore
) -> None:
    workers.start("relay")
    doomed = workers.start("service", "--die=before-acknowledging", "--after=50")
    await tick(store, 0, EVENTS)
    await until(lambda: doomed.killed, "the service killed itself")
    committed = len(audit_of(workers.database()))
    assert committed > 0, "it died after a commit"
    workers.start("service")
    await all_arrive(workers, EVENTS)
    proves_every_effect_once_in_order(workers.database(), EVENTS)


async def test_service_killed_again_and_again_loses_nothing(workers: Workers, store: EventStore) -> None:
    workers.start("relay")
    feeding = asyncio.create_task(tick(store, 0, EVENTS))
    for share in range(1, 5):
        service = workers.start("service")
        await all_arrive(workers, share * EVENTS // 6)
        service.kill()
    workers.start("service")
    await feeding
    await all_arrive(workers, EVENTS)
    proves_every_effect_once_in_order(workers.database(), EVENTS)


async def test_relay_killed_between_publish_and_checkpoint_repeats_no_effect(
    workers: Workers, store: EventStore
) -> None:
    workers.start("service")
    doomed = workers.start("relay", "--die=before-checkpoint")
    await tick(store, 0, HALF)
    await until(lambda: doomed.killed, "the relay killed itself")
    await until(lambda: len(audit_of(workers.database())) > 0, "it died after publishing")
    workers.start("relay")
    await tick(store, HALF, HALF)
    await all_arrive(workers, EVENTS)
    proves_every_effect_once_in_order(workers.database(), EVENTS)


@pytest.mark.parametrize("names", [("main", "main"), ("main", "rival")], ids=["one_leads", "both_publish"])
async def test_two_relays_at_once_only_repeat_true_things(
    workers: Workers, store: EventStore, names: tuple[str, str]
) -> None:
    workers.start("service")
    first, _ = (workers.start("relay", f"--name={name}") for name in names)
    await tick(store, 0, HALF)
    await all_arrive(workers, HALF)
    first.kill()
    await tick(store, HALF, HALF)
    await all_arrive(workers, EVENTS)
    proves_every_effect_once_in_order(workers.database(), EVENTS)


async def test_deleted_queue_is_made_again_and_healed_from_the_log(workers: Workers, store: EventStore) -> None:
    workers.start("relay")
    service = workers.start("service")
    await tick(store, 0, HALF)
    await all_arrive(workers, HALF)
    service.kill()  # so that the queue fills, and is deleted with events in it
    await tick(store, HALF, HALF)
    connection = await aio_pika.connect(workers.bus)
    async with connection:
        channel = await connection.channel()

        async def waiting() -> int:
            queue = await channel.declare_queue("tidings.audit", passive=True)
            return queue.declaration_result.message_count or 0

        while await waiting() < 1:
            await asyncio.sleep(0.05)
        await channel.queue_delete("tidings.audit")
    workers.start("service")
    await all_arrive(workers, EVENTS)
    proves_every_effect_once_in_order(workers.database(), EVENTS)


async def test_queue_deleted_under_a_running_service_is_healed(workers: Workers, store: EventStore) -> None:
    workers.start("relay")
    workers.start("service")
    feeding = asyncio.create_task(tick(store, 0, EVENTS))
    await all_arrive(workers, 50)
    connection = await aio_pika.connect(workers.bus)
    async with connection:
        channel = await connection.channel()
        await channel.queue_delete("tidings.audit")
    await feeding
    await all_arrive(workers, EVENTS)
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


async def test_second_process_of_a_service_is_a_standby_and_takes_over(workers: Workers, store: EventStore) -> None:
    workers.start("relay")
    first = workers.start("service")
    await tick(store, 0, HALF)
    await all_arrive(workers, HALF)
    workers.start("service")
    first.kill()
    await tick(store, HALF, HALF)
    await all_arrive(workers, EVENTS)
    proves_every_effect_once_in_order(workers.database(), EVENTS)


@pytest.mark.parametrize("how", ["restart", "kill"])
async def test_broker_gone_in_the_middle_and_back_loses_nothing(
    tmp_path: Path, rabbitmq_node: RabbitMQNode, harmed_url: str, how: str
) -> None:
    # A quorum queue that is a second old does not survive SIGKILL (RabbitMQ 3.10 has not written down its name yet, and
    # answers 541 ever after): that is the broker's affair. So the queue is made, and settled by a restart, first.
    async with open_bus(harmed_url) as bus:
        await bus.provision(Subscription("audit"))
    await asyncio.to_thread(rabbitmq_node.restart)
    with Workers(tmp_path, harmed_url) as workers:
        async with open_store(workers.store) as store:
            workers.start("relay")
            workers.start("service")
            feeding = asyncio.create_task(tick(store, 0, EVENTS))
            await all_arrive(workers, 50)
            if how == "restart":
                await asyncio.to_thread(rabbitmq_node.restart)
            else:
                await asyncio.to_thread(rabbitmq_node.kill)
                await asyncio.to_thread(rabbitmq_node.start)
            await feeding
            await tick(store, EVENTS, 50)
            await all_arrive(workers, EVENTS + 50, seconds=90)
        proves_every_effect_once_in_order(workers.database(), EVENTS + 50)
