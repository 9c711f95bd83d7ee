"""The relay, killed, doubled, paused and cut off: services see every event once and in order, and how soon again."""

from __future__ import annotations

import pytest

from tests.faults.conftest import Recovered
from tests.faults.proxy import Proxy
from tests.faults.stage import Process, Stage, now

SOME = 100
TAKEOVER = 5.0
"""Seconds until a standby leads after the leader has died or lost its connection to the broker."""
TAKEOVER_OF_PAUSED = 15.0
"""Seconds until a standby leads after the leader was paused, which the broker notices only by missing heartbeats."""


async def test_relay_killed_between_publish_and_checkpoint(stage: Stage, recovered: Recovered) -> None:
    stage.service()
    doomed = stage.relay(arranged=["dies-before-checkpoint=50"])
    async with stage.traffic() as traffic:
        await doomed.ended()
        await stage.handled(1)
        await traffic.reached(SOME)
        since = now()
        stage.relay()
        seconds = await stage.recovered(since)
    assert doomed.status == -9
    recovered(await stage.keeps_promises(), seconds)


async def test_two_relays_publish_at_once(stage: Stage, recovered: Recovered) -> None:
    """Relays with two names know nothing of each other: services get everything twice, interleaved."""
    stage.service()
    first = stage.relay()
    async with stage.traffic() as traffic:
        await stage.handles(SOME)
        await stage.relay("rival").says("relay.leading")
        await stage.handles(2 * SOME)
        first.kill()
        since = now()
        seconds = await stage.recovered(since)
        await traffic.reached(SOME)
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
@pytest.mark.timed
async def test_standby_leads_soon_after_the_death_of_the_leader(stage: Stage, recovered: Recovered) -> None:
    stage.service()
    leader, _ = await leader_and_standby(stage)
    async with stage.traffic():
        await stage.handles(SOME)
        leader.kill()
        seconds = await stage.recovered(now())
    recovered(await stage.keeps_promises(), seconds)
    assert seconds <= TAKEOVER


@pytest.mark.faults
@pytest.mark.timed
async def test_standby_leads_soon_after_the_leader_has_lost_its_connection(stage: Stage, recovered: Recovered) -> None:
    stage.service()
    async with Proxy(stage.bus) as proxy:
        leader, standby = await leader_and_standby(stage, bus=proxy.url)
        async with stage.traffic():
            await stage.handles(SOME)
            proxy.black_hole()  # so that it does not come back before the other has noticed
            proxy.cut()
            seconds = await stage.recovered(now())
            await leader.says("relay.interrupted")
            proxy.heal()
            await stage.handles(SOME)
        assert "relay.leading" in standby.log
    recovered(await stage.keeps_promises(), seconds)
    assert seconds <= TAKEOVER


@pytest.mark.faults
@pytest.mark.timed
async def test_standby_leads_when_nothing_is_heard_of_the_leader(stage: Stage, recovered: Recovered) -> None:
    """The leader's connection is a black hole in both directions: neither side learns of its end."""
    stage.service()
    async with Proxy(stage.bus) as proxy:
        _, standby = await leader_and_standby(stage, bus=proxy.url)
        async with stage.traffic():
            await stage.handles(SOME)
            proxy.black_hole()
            seconds = await stage.recovered(now())
            assert "relay.leading" in standby.log
            proxy.heal()
            await stage.handles(SOME)
    recovered(await stage.keeps_promises(), seconds)
    assert seconds <= TAKEOVER_OF_PAUSED


@pytest.mark.faults
@pytest.mark.timed
async def test_relay_paused_past_a_takeover_and_resumed(stage: Stage, recovered: Recovered) -> None:
    stage.service()
    leader, standby = await leader_and_standby(stage)
    async with stage.traffic():
        await stage.handles(SOME)
        leader.pause()
        seconds = await stage.recovered(now())
        assert "relay.leading" in standby.log
        leader.resume()
        await leader.says("relay.interrupted")
        await stage.handles(SOME)
        standby.kill()  # the one that was paused is a standby by now, and a good one
        again = await stage.recovered(now())
    recovered(await stage.keeps_promises(), max(seconds, again))
    assert seconds <= TAKEOVER_OF_PAUSED
    assert again <= TAKEOVER


async def leader_and_standby(stage: Stage, bus: str | None = None) -> tuple[Process, Process]:
    """Start two relays with one name, the leader with another bus URL if one is given."""
    leader = stage.relay(bus=bus)
    await leader.says("relay.leading")
    standby = stage.relay()
    await standby.says("bus.lock_waiting")
    assert "relay.leading" not in standby.log
    return leader, standby
