"""Three RabbitMQ nodes, of which one dies, or loses the others: nothing is lost, and how soon it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.broker_night import AUDIT
from tests.faults.conftest import Recovered
from tests.faults.stage import Stage, now
from tidings import open_bus
from tidings.testing.brokers import RabbitMQCluster, cluster_for_tests

SOME = 100

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RabbitMQCluster]:
    with cluster_for_tests() as found:
        yield found


async def led_by(cluster: RabbitMQCluster, url: str) -> int:
    """Return the node that leads the queue. All clients are connected to it, because the first node of the URL declared
    it."""
    assert await asyncio.to_thread(cluster.members_of, AUDIT.queue, url) == [1, 2, 3]
    return await asyncio.to_thread(cluster.leader_of, AUDIT.queue, url)


@pytest.mark.rabbitmq4
async def test_the_node_that_leads_the_queue_is_killed(
    tmp_path: Path, cluster: RabbitMQCluster, recovered: Recovered
) -> None:
    async with cluster.isolated() as url:
        async with open_bus(url) as bus:
            await bus.provision(AUDIT)
        with Stage(tmp_path, url) as stage:
            relay, service = stage.relay(), stage.service()
            async with stage.traffic():
                await stage.handles(SOME)
                leader = await led_by(cluster, url)
                await asyncio.to_thread(cluster.kill_node, leader)
                seconds = await stage.recovered(now())
                for process in (relay, service):
                    await process.says("bus.node_unreachable")
            assert await asyncio.to_thread(cluster.leader_of, AUDIT.queue, url) != leader
            recovered(await stage.keeps_promises(), seconds)
            await asyncio.to_thread(cluster.start)


async def test_the_node_that_leads_the_queue_is_cut_off_from_the_others(
    tmp_path: Path, cluster: RabbitMQCluster, recovered: Recovered
) -> None:
    """The node pauses (`pause_minority`) and closes its clients' connections. Later it comes back."""
    async with cluster.isolated() as url:
        async with open_bus(url) as bus:
            await bus.provision(AUDIT)
        with Stage(tmp_path, url) as stage:
            relay, service = stage.relay(), stage.service()
            async with stage.traffic():
                await stage.handles(SOME)
                leader = await led_by(cluster, url)
                await asyncio.to_thread(cluster.cut_off, leader)
                seconds = await stage.recovered(now())
                for process in (relay, service):
                    await process.says("bus.node_unreachable")
                assert await asyncio.to_thread(cluster.leader_of, AUDIT.queue, url) != leader
                await asyncio.to_thread(cluster.let_back)
                assert await asyncio.to_thread(cluster.members_of, AUDIT.queue, url) == [1, 2, 3]
                await stage.recovered(now())
            recovered(await stage.keeps_promises(), seconds)
