"""The broker loses what it was given, or takes nothing: queue, exchange, binding, rights, room. Nothing is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from tests.faults.auditing import Counted
from tests.faults.broker_night import (
    User,
    answers_again,
    configured,
    delete_exchange,
    delete_queue,
    first_effect,
    messages,
    starved,
    unbind,
    user,
    vhost,
)
from tests.faults.conftest import Recovered
from tests.faults.stage import Stage, now
from tidings import open_store
from tidings.modelling.codec import encode
from tidings.testing.brokers import RabbitMQNode

SOME = 100

# ---- what the broker was given is gone -----------------------------------------------------------------------------


@pytest.mark.rabbitmq4
async def test_queue_deleted(stage: Stage, recovered: Recovered) -> None:
    """The queue is deleted under a running service, and again with events in it, which only the log has then."""
    stage.relay()
    service = stage.service()
    async with stage.traffic() as traffic:
        await stage.handles(SOME)
        await delete_queue(stage.bus)
        seconds = await stage.recovered(now())
        service.kill()
        await traffic.reached(SOME)
        while await messages(stage.bus) < SOME // 2:
            await asyncio.sleep(0.05)
        assert await delete_queue(stage.bus) >= SOME // 2
        service.start()
        await stage.handles(SOME)
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_exchange_deleted(stage: Stage, recovered: Recovered) -> None:
    """The relay creates the exchange again, without the binding of a service that has not noticed."""
    stage.relay()
    stage.service()
    async with stage.traffic(pause=0.02):
        await stage.handles(SOME)
        await delete_exchange(stage.bus)
        seconds = await stage.recovered(now())
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_no_binding(stage: Stage, recovered: Recovered) -> None:
    """The only queue loses its binding: nothing can be routed, and the relay says for which service it waits."""
    relay = stage.relay()
    stage.service()
    async with stage.traffic(pause=0.02):
        await stage.handles(SOME)
        await unbind(stage.bus)
        since = now()
        await relay.says("relay.waiting_for_services")
        seconds = await stage.recovered(since)
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_no_binding_of_one_service_of_two(stage: Stage, recovered: Recovered) -> None:
    """The other queue takes every event, so the relay cannot notice."""
    relay = stage.relay()
    stage.service()
    stage.service("second")
    async with stage.traffic(pause=0.02):
        await asyncio.gather(stage.handles(SOME), stage.handles(SOME, "second"))
        await unbind(stage.bus)
        seconds = await stage.recovered(now())
    assert "relay.interrupted" not in relay.log
    recovered(await stage.keeps_promises(), seconds)


# ---- the broker does not let us in -----------------------------------------------------------------------------------


@asynccontextmanager
async def an_account(stage: Stage, node: RabbitMQNode) -> AsyncIterator[User]:
    """Start processes of the stage as this user from now on."""
    host = stage.bus.rpartition("@")[2]
    async with user(node, stage.bus, "r%ght") as found:
        stage.bus = f"amqp://{found.name}:r%25ght@{host}"
        yield found


@pytest.mark.faults
async def test_password_changed_while_running(rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered) -> None:
    async with an_account(harmed, rabbitmq_node) as account:
        relay, service = harmed.relay(), harmed.service()
        async with harmed.traffic(pause=0.02):
            await harmed.handles(SOME)
            await account.change_password("another")
            await account.cut_off("password changed")
            for process, event in ((service, "bus.unreachable"), (relay, "relay.interrupted")):
                line = await process.says(event, "403", f"user '{account.name}'")
                assert "Check user and password in TIDINGS_BUS" in line
                assert "r%25ght" not in process.log
                assert "r%ght" not in process.log
            since = now()
            await account.change_password("r%ght")
            seconds = await first_effect(harmed, since)
        recovered(await harmed.keeps_promises(), seconds)
        assert [await service.stop(), relay.alive] == [0, True]


@pytest.mark.faults
async def test_permissions_revoked_while_running(
    rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered
) -> None:
    async with an_account(harmed, rabbitmq_node) as account:
        relay, service = harmed.relay(), harmed.service()
        async with harmed.traffic(pause=0.02):
            await harmed.handles(SOME)
            await account.permit("^$")
            await account.cut_off("permissions changed")
            for process, event in ((service, "bus.unreachable"), (relay, "relay.interrupted")):
                line = await process.says(event, "403", "access to")
                assert f"rabbitmqctl set_permissions --vhost {vhost(harmed.bus)} {account.name}" in line
            since = now()
            await account.permit(".*")
            seconds = await first_effect(harmed, since)
        recovered(await harmed.keeps_promises(), seconds)


@pytest.mark.faults
async def test_broker_away_at_the_start(rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered) -> None:
    await asyncio.to_thread(rabbitmq_node.stop)
    relay, service = harmed.relay(), harmed.service()
    place = urlsplit(harmed.bus)
    async with harmed.traffic(pause=0.02):
        for process, event in ((service, "bus.unreachable"), (relay, "relay.interrupted")):
            line = await process.says(event)
            assert f"RabbitMQ at {place.hostname}:{place.port}" in line
            assert "check host and port in TIDINGS_BUS" in line
            assert str(place.password) not in process.log
        since = await answers_again(rabbitmq_node)
        seconds = await first_effect(harmed, since)
    recovered(await harmed.keeps_promises(), seconds)


# ---- the broker takes nothing ----------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.rabbitmq4
@pytest.mark.parametrize("what", ["memory", "disk"])
async def test_alarm_blocks_publishers(
    rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered, what: Literal["memory", "disk"]
) -> None:
    relay, service = harmed.relay(), harmed.service()
    async with harmed.traffic() as traffic:
        await harmed.handles(SOME)
        async with starved(rabbitmq_node, what):
            assert what in await relay.says("bus.blocked")
            await traffic.reached(SOME)
            since = now()
        seconds = await first_effect(harmed, since)
        await relay.says("bus.unblocked")
    assert "bus.lost" not in service.log, "who consumes is not blocked"
    recovered(await harmed.keeps_promises(), seconds)


@pytest.mark.faults
@pytest.mark.parametrize("what", ["memory", "disk"])
async def test_alarm_outlasts_the_relays_patience(
    rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered, what: Literal["memory", "disk"]
) -> None:
    """The relay gives up its connection, which a blocked broker does not read, and keeps the lock in the meantime."""
    relay = harmed.relay(arranged=["confirm-seconds=2"])
    harmed.service()
    async with harmed.traffic(pause=0.02) as traffic:
        await harmed.handles(SOME)
        async with starved(rabbitmq_node, what):
            await relay.says("relay.interrupted", "was not confirmed within 2 s", "out of memory or disk")
            await relay.says("bus.lock_waiting")
            await traffic.reached(SOME)
            since = now()
        seconds = await harmed.recovered(since)
    recovered(await harmed.keeps_promises(), seconds)


@pytest.mark.faults
@pytest.mark.rabbitmq4
async def test_message_over_the_limit(rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered) -> None:
    """The relay leaves the event out and says so; the service reads it from the log, in its place."""
    number, limit = 10**9, 65_536
    async with configured(rabbitmq_node, max_message_size=limit):
        relay = harmed.relay()
        harmed.service()
        async with harmed.traffic(pause=0.02):
            await harmed.handles(SOME)
            since = now()
            async with open_store(harmed.store_url) as store:
                large = Counted(key="key0", number=number, at=since, padding="x" * limit)
                await store.append("large", [encode(large, id=uuid4())])
            await relay.says("relay.left_out", "every service reads it from the log")
            seconds = await harmed.recovered(now())
        recovered(await harmed.keeps_promises(), seconds)
    assert [row.number for row in harmed.rows()].count(number) == 1


@pytest.mark.faults
@pytest.mark.rabbitmq4
async def test_consumer_timeout(rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered) -> None:
    """A handler takes longer than the broker waits for an acknowledgement. Other keys go on in the meantime."""
    async with configured(rabbitmq_node, consumer_timeout=2_000, channel_tick_interval=500):  # milliseconds
        harmed.relay()
        service = harmed.service()
        async with harmed.traffic(pause=0.02):
            await harmed.handles(SOME)
            await harmed.errand("slow", 6.0)
            await service.says("bus.lost", "406", "timed out")
            seconds = await first_effect(harmed, now())
            await harmed.handles(SOME)
        recovered(await harmed.keeps_promises(), seconds)
