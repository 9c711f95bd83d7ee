"""The broker dies, restarts, or stands still while events are published: nothing is lost, and how soon it goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.broker_night import answers_again, consumers, first_effect, has_leader
from tests.faults.conftest import Recovered
from tests.faults.stage import Stage, now
from tidings.testing.brokers import RabbitMQNode

SOME = 100
AGAIN = 3.0
"""Seconds from the broker's first answer to the first handled event: a promise."""
STANDSTILL = 40.0
"""Seconds of a pause: four heartbeats, and longer than a relay waits for a confirm."""


async def test_broker_killed_in_the_middle_of_publishing(
    rabbitmq_node: RabbitMQNode, tmp_path: Path, harmed_bus: str, recovered: Recovered
) -> None:
    with Stage(tmp_path, harmed_bus) as harmed:
        await killed_in_the_middle(rabbitmq_node, harmed, recovered)


async def killed_in_the_middle(rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered) -> None:
    relay, service = harmed.relay(), harmed.service()
    async with harmed.traffic(pause=0.01) as traffic:
        await harmed.handles(SOME)
        await has_leader(rabbitmq_node, harmed.bus)
        await asyncio.to_thread(rabbitmq_node.kill)
        await asyncio.gather(relay.says("relay.interrupted"), service.says("bus.lost"), traffic.reached(SOME))
        since = await answers_again(rabbitmq_node)
        seconds = await first_effect(harmed, since)
    assert (relay.alive, service.alive) == (True, True)
    recovered(await harmed.keeps_promises(), seconds)
    assert seconds <= AGAIN


@pytest.mark.faults
@pytest.mark.timed
async def test_broker_restarted_in_good_order(rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered) -> None:
    harmed.relay()
    harmed.service()
    async with harmed.traffic() as traffic:
        await harmed.handles(SOME)
        await asyncio.to_thread(rabbitmq_node.stop)
        await traffic.reached(SOME)
        since = await answers_again(rabbitmq_node)
        seconds = await first_effect(harmed, since)
        await consumers(harmed.bus, 1)
    recovered(await harmed.keeps_promises(), seconds)
    assert seconds <= AGAIN


@pytest.mark.faults
async def test_broker_stands_still_for_40_seconds(
    rabbitmq_node: RabbitMQNode, harmed: Stage, recovered: Recovered
) -> None:
    """The broker is paused: connections stay open, the kernel accepts new ones, and nothing answers."""
    relay, service = harmed.relay(), harmed.service()
    async with harmed.traffic(pause=0.02):
        await harmed.handles(SOME)
        await asyncio.to_thread(rabbitmq_node.pause)
        began = now()
        await relay.says("relay.interrupted", "nothing was heard for")
        await service.says("bus.lost")
        await service.says("bus.unreachable", "did not answer within")
        await asyncio.sleep(began + STANDSTILL - now())
        await asyncio.to_thread(rabbitmq_node.resume)
        since = now()
        seconds = await first_effect(harmed, since)
        await consumers(harmed.bus, 1)
    recovered(await harmed.keeps_promises(), seconds)
