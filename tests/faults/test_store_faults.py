"""The event store, killed, paused, away and full: what it acknowledged has its effects once, in order, and how soon."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing, suppress

import pytest

from tests.faults.conftest import Recovered
from tests.faults.disk import SmallDisk
from tests.faults.stage import Process, Stage, now, until
from tidings import open_store
from tidings.errors import StoreUnavailable

pytestmark = pytest.mark.faults

SOME = 100
AWAY = 12.0
"""Seconds of a pause: longer than a call to the store waits for an answer."""


async def served(stage: Stage) -> Process:
    """Start `tidings server` as the event store of a relay and two services, and wait until all work."""
    server = await stage.server()
    stage.relay()
    for name in ("audit", "second"):
        await stage.service(name).says("service.connected")
    return server


async def test_store_killed(stage: Stage, recovered: Recovered) -> None:
    server = await served(stage)
    async with stage.traffic() as traffic:
        await stage.handles(SOME)
        server.kill()
        server.start()
        seconds = await stage.recovered(now())
        await traffic.reached(SOME)
    recovered(await stage.keeps_promises(), seconds)


async def test_store_killed_again_and_again(stage: Stage, recovered: Recovered) -> None:
    server = await served(stage)
    seconds = 0.0
    async with stage.traffic() as traffic:
        for _ in range(5):
            await traffic.reached(SOME // 2)
            server.kill()
            server.start()
            seconds = max(seconds, await stage.recovered(now()))
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.parametrize("away", [1.0, AWAY], ids=["a_moment", "long"])
async def test_store_paused(stage: Stage, recovered: Recovered, away: float) -> None:
    server = await served(stage)
    async with stage.traffic() as traffic:
        await stage.handles(SOME)
        server.pause()
        await asyncio.sleep(away)  # so long is the fault
        server.resume()
        seconds = await stage.recovered(now())
        await traffic.reached(SOME)
    recovered(await stage.keeps_promises(), seconds)


async def test_store_gone_and_back(stage: Stage, recovered: Recovered) -> None:
    server = await served(stage)
    async with stage.traffic() as traffic:
        await stage.handles(SOME)
        server.kill()
        await asyncio.sleep(AWAY)  # so long is the fault
        server.start()
        seconds = await stage.recovered(now())
        await traffic.reached(SOME)
    assert traffic.refused, "appends were refused meanwhile"
    recovered(await stage.keeps_promises(), seconds)


async def test_store_away_when_relay_and_services_start(stage: Stage, recovered: Recovered) -> None:
    server = await stage.server()
    async with stage.traffic() as traffic:
        await traffic.reached(SOME)
    server.kill()
    relay, service = stage.relay(), stage.service()
    await relay.says("relay.interrupted", "was not there", "TIDINGS_STORE")
    await service.says("service.rejoining", "was not there", "TIDINGS_STORE")
    server.start()
    since = now()
    await stage.handled(SOME)
    recovered(await stage.keeps_promises(), stage.rows()[0].handled - since)
    assert (relay.alive, service.alive) == (True, True)


async def test_store_file_locked_by_another_process(stage: Stage, recovered: Recovered) -> None:
    """Another tool has opened the log and left a transaction open."""
    stage.relay()
    await stage.service().says("service.connected")
    async with stage.traffic() as traffic:
        await stage.handles(SOME)
        with closing(sqlite3.connect(stage.folder / "events.db", isolation_level=None)) as tool:
            tool.execute("BEGIN IMMEDIATE")
            await until(lambda: traffic.refused > 0, "an append is refused")
            tool.execute("ROLLBACK")
        seconds = await stage.recovered(now())
        await traffic.reached(SOME)
    recovered(await stage.keeps_promises(), seconds)


async def test_store_on_a_full_disk(stage: Stage, small_disk: SmallDisk, recovered: Recovered) -> None:
    """The store refuses appends and the relay's checkpoint. When there is room again, everything goes on by itself."""
    stage.store_url = f"sqlite:///{small_disk.place}/events.db"
    relay, service = stage.relay(), stage.service()
    async with stage.traffic() as traffic:
        while "relay.interrupted" not in relay.log:
            # A relay that has noted everything writes nothing, so it meets a full disk only on its way.
            await stage.handles(SOME)
            small_disk.fill()
            refused = traffic.refused
            await until(lambda before=refused: traffic.refused > before, "an append is refused")  # type: ignore[misc]
            with suppress(AssertionError):
                await relay.says("relay.interrupted", seconds=5)
            if "relay.interrupted" not in relay.log:
                small_disk.free()
        await relay.says("relay.interrupted", "full", "free some")
        with pytest.raises(StoreUnavailable, match=r"events\.db failed: .*full.*free some and try again"):
            await stage.errand("refused", 0.0)
        small_disk.free()
        seconds = await stage.recovered(now())
    assert (relay.alive, service.alive) == (True, True)
    recovered(await stage.keeps_promises(), seconds)


async def test_store_opened_on_a_full_disk_says_why_not(small_disk: SmallDisk) -> None:
    url = f"sqlite:///{small_disk.place}/events.db"
    small_disk.fill()
    with pytest.raises(StoreUnavailable, match="full"):
        async with open_store(url):
            pass
    small_disk.free()
    async with open_store(url) as store:
        assert await store.head() >= 0
