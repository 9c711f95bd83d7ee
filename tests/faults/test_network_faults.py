"""The network between broker, relay and service misbehaves, at a proxy: nothing is lost, and how soon it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from tests.faults.broker_night import first_effect
from tests.faults.conftest import Recovered
from tests.faults.proxy import Proxy
from tests.faults.stage import Stage, now, until

SOME = 100
HEARTBEAT = 2
"""Seconds of the heartbeat, instead of 10. Both sides give up a connection that is silent for twice as long."""


@pytest.fixture
async def network(stage: Stage) -> AsyncIterator[Proxy]:
    """The proxy between every process of the stage and the broker."""
    async with Proxy(stage.bus, options=f"heartbeat={HEARTBEAT}") as proxy:
        stage.bus = proxy.url
        yield proxy


async def test_black_hole(stage: Stage, network: Proxy, recovered: Recovered) -> None:
    """The packets of connections vanish silently (no RST), as when a firewall has lost its table."""
    relay, service = stage.relay(), stage.service()
    async with stage.traffic(pause=0.02):
        await stage.handles(SOME)
        since = now()
        assert network.forget() == 2
        seconds = await stage.recovered(since)
    assert "nothing was heard for" in await relay.says("relay.interrupted")
    assert "nothing was heard for" in await service.says("bus.lost")
    recovered(await stage.keeps_promises(), seconds)


async def test_confirms_swallowed(stage: Stage, network: Proxy, recovered: Recovered) -> None:
    """Every event arrives, and the relay is told of none: it sends them again and again, and services drop them."""
    relay = stage.relay(arranged=["confirm-seconds=1"])
    stage.service()
    async with stage.traffic() as traffic:
        await stage.handles(SOME)
        network.swallow_confirms = True
        complaint = "was not confirmed within 1 s"  # an event's, or a marker's: whose patience ends first is chance
        await until(lambda: relay.log.count(complaint) >= 2, "the relay gives up waiting, and sends again, twice")
        await traffic.reached(SOME)
        network.swallow_confirms = False
        since = now()
        seconds = await first_effect(stage, since)
        await stage.recovered(since)
    assert network.confirms_swallowed > 1
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_black_hole_for_longer_than_anybody_waits(stage: Stage, network: Proxy, recovered: Recovered) -> None:
    """Nothing gets through until the network works again. Data that was on its way then arrives late."""
    relay, service = stage.relay(), stage.service()
    async with stage.traffic(pause=0.02):
        await stage.handles(SOME)
        network.black_hole()
        await relay.says("relay.interrupted", "did not answer within")
        await service.says("bus.unreachable", "did not answer within")
        network.heal()
        seconds = await first_effect(stage, now())
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_connection_half_open(stage: Stage, network: Proxy, recovered: Recovered) -> None:
    """Relay and service lose their connections at the same moment. The broker keeps its halves, with the relay's lock
    and the place of the active consumer, until it has missed their heartbeats."""
    relay, service = stage.relay(), stage.service()
    async with stage.traffic(pause=0.02):
        await stage.handles(SOME)
        since = now()
        assert network.half_open() == 2
        seconds = await stage.recovered(since)
    assert "the connection broke" in await relay.says("relay.interrupted")
    assert "the connection broke" in await service.says("bus.lost")
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_connection_cut_every_100_messages(stage: Stage, network: Proxy, recovered: Recovered) -> None:
    """Connections break in the middle of a message, ten times: the relay's or the service's, whichever reaches 100
    first. The longest time without an effect is recorded."""
    network.cut_after = 100
    stage.relay()
    stage.service()
    async with stage.traffic():
        await until(lambda: network.cuts >= 10, "ten connections are cut")
        network.cut_after = None
        await stage.recovered(now())
    events = await stage.keeps_promises()
    handled = [row.handled for row in stage.rows()]
    recovered(events, max(after - before for before, after in pairwise(handled)))


@pytest.mark.faults
async def test_one_byte_at_a_time(stage: Stage, network: Proxy, recovered: Recovered) -> None:
    """Data passes in tiny pieces, in both directions, from the first handshake on."""
    stage.relay()
    stage.service()
    async with stage.traffic(pause=0.02):
        await stage.handles(SOME)
        network.piece = 1
        network.cut()
        seconds = await stage.recovered(now())
        await stage.handles(SOME)
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_slow_network(stage: Stage, network: Proxy, recovered: Recovered) -> None:
    """Data is late by a tenth of a second each way, on existing and new connections."""
    stage.relay()
    stage.service()
    async with stage.traffic(pause=0.02):
        await stage.handles(SOME)
        network.delay = 0.1
        network.cut()
        seconds = await stage.recovered(now())
        await stage.handles(SOME)
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_channel_error_406(stage: Stage, network: Proxy, recovered: Recovered) -> None:
    """The broker closes the channels of relay and service, as after an acknowledgement of a message that was never
    delivered."""
    relay, service = stage.relay(), stage.service()
    async with stage.traffic():
        await stage.handles(SOME)
        assert network.spoil_channels() == 2
        await asyncio.gather(
            relay.says("relay.interrupted", "406", "unknown delivery tag"),
            service.says("bus.lost", "406", "unknown delivery tag"),
        )
        seconds = await stage.recovered(now())
    assert network.channels_spoilt == 2
    assert "relay.left_out" not in relay.log, "no event was to blame"
    recovered(await stage.keeps_promises(), seconds)
