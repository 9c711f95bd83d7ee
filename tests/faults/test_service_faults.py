"""A service, killed, paused and blocked, with poison and slow handlers: every effect once and in order, and how soon
again."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import pytest

from tests.faults import auditing
from tests.faults.auditing import Row
from tests.faults.conftest import Recovered
from tests.faults.stage import KEYS, Process, Stage, now, until

SOME = 100
QUICK = "?heartbeat=1"
"""Seconds after which the broker gives up a silent consumer and activates the next: two to three heartbeats."""


async def test_service_killed_between_commit_and_acknowledgement(stage: Stage, recovered: Recovered) -> None:
    stage.relay()
    doomed = stage.service(arranged=[f"dies-before-acknowledging={SOME}"])
    async with stage.traffic() as traffic:
        await doomed.ended()
        assert stage.effects() > 0, "it died after a commit"
        await traffic.reached(SOME)
        since = now()
        stage.service()
        seconds = await stage.recovered(since)
    assert doomed.status == -9
    recovered(await stage.keeps_promises(), seconds)


async def test_service_paused_while_another_takes_over_then_resumed(stage: Stage, recovered: Recovered) -> None:
    """The standby does not disturb the active process. The zombie, paused within a handler, is fenced and stands by."""
    stage.relay()
    active = await working(stage, QUICK)
    standby = stage.service(bus=stage.bus + QUICK)
    await standby.says("service.connected")
    async with stage.traffic():
        await stage.handles(2 * SOME)
        assert pids(stage.rows()) == [active.pid], "a standby does nothing"
        assert "rejoining" not in active.log
        await stage.errand("errand", 1.5)
        await active.says("errand.begun")
        await pause_between_commits(stage, active)
        seconds = await stage.recovered(now())
        await standby.says("errand.begun")
        await stage.answers("errand")
        active.resume()
        await active.says("service.rejoining", "another process")
        await stage.handles(SOME)
        assert pids(stage.rows()) == [active.pid, standby.pid], "the zombie has no effect"
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_service_killed_while_a_standby_waits(stage: Stage, recovered: Recovered) -> None:
    stage.relay()
    active = await working(stage)
    standby = stage.service()
    await standby.says("service.connected")
    async with stage.traffic():
        await stage.handles(SOME)
        active.kill()
        seconds = await stage.recovered(now())
        await stage.handles(SOME)
    assert pids(stage.rows()) == [active.pid, standby.pid]
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_service_killed_again_and_again(stage: Stage, recovered: Recovered) -> None:
    stage.relay()
    seconds = 0.0
    async with stage.traffic():
        service = await working(stage)
        for _ in range(5):
            await stage.handles(SOME)
            service.kill()
            since = now()
            service.start()
            seconds = max(seconds, await stage.recovered(since))
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_poison_event_then_its_neighbours(stage: Stage, recovered: Recovered) -> None:
    """While the event is tried, other keys go on and its own waits. In the end it is dead, and its key goes on, too."""
    stage.relay()
    await working(stage)
    async with stage.traffic() as traffic:
        await stage.handles(SOME)
        since = now()
        poison = traffic.position(await traffic.append("fail", "key0"))
        await until(lambda: held(stage, poison), "the poison is held")
        keys = {f"key{number}" for number in range(1, KEYS)}
        await until(lambda: keys == {row.key for row in stage.rows() if row.appended > since}, "the other keys go on")
        assert held(stage, poison), "and did so while it was held"
        await until(lambda: dead(stage, poison), "the poison is dead")
        seconds = await stage.recovered(since, key="key0")
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_slow_handler_delays_nobody_else(stage: Stage, recovered: Recovered) -> None:
    stage.relay()
    service = await working(stage)
    async with stage.traffic():
        await stage.handles(SOME)
        await stage.errand("errand", 8.0)
        await service.says("errand.begun")
        since = now()
        seconds = await stage.recovered(since)
        await until(lambda: len({row.key for row in stage.rows() if row.appended > since}) == KEYS, "every key goes on")
        assert not await stage.answered("errand"), "all that happened while it was at work"
        await stage.answers("errand")
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_blocked_event_loop(stage: Stage, recovered: Recovered) -> None:
    """The loop is blocked for longer than the broker waits for a heartbeat. Without a standby, waiting events are
    handled afterwards."""
    stage.relay()
    service = await working(stage, QUICK)
    async with stage.traffic():
        await stage.handles(SOME)
        await stage.errand("errand", 8.0, blocks=service.pid)
        await service.says("errand.begun")
        since = now()
        seconds = await stage.recovered(since)
    assert seconds > 5, "the loop was blocked"
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_blocked_event_loop_while_another_takes_over(stage: Stage, recovered: Recovered) -> None:
    """The standby handles the events of the blocked process, which is fenced when its loop goes on."""
    stage.relay()
    active = await working(stage, QUICK)
    standby = stage.service(bus=stage.bus + QUICK)
    await standby.says("service.connected")
    async with stage.traffic():
        await stage.handles(SOME)
        await stage.errand("errand", 8.0, blocks=active.pid)
        await active.says("errand.begun")
        since = now()
        seconds = await stage.recovered(since)
        await stage.answers("errand")
        await active.says("service.rejoining", "another process")
        assert pids(stage.rows()) == [active.pid, standby.pid]
    recovered(await stage.keeps_promises(), seconds)


async def working(stage: Stage, options: str = "") -> Process:
    """Start a process of the service and wait until it consumes. `options` are those of its bus URL."""
    service = stage.service(bus=stage.bus + options)
    await service.says("service.connected")
    return service


async def pause_between_commits(stage: Stage, process: Process) -> None:
    """A process that is paused within a transaction keeps SQLite's only writer. No other process can take over until it
    goes on or is killed."""
    while True:
        process.pause()
        with closing(sqlite3.connect(stage.database(), isolation_level=None, timeout=0)) as tool:
            try:
                tool.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                process.resume()
            else:
                tool.execute("ROLLBACK")
                return
        await asyncio.sleep(0.01)


def pids(rows: list[Row]) -> list[int]:
    """Return the processes that had effects, one after the other. A process may come more than once."""
    found: list[int] = []
    for row in rows:
        if found[-1:] != [row.pid]:
            found.append(row.pid)
    return found


def held(stage: Stage, position: int) -> bool:
    return bool(auditing.query(stage.database(), "SELECT 1 FROM tidings_held WHERE position = ?", position))


def dead(stage: Stage, position: int) -> bool:
    return bool(auditing.query(stage.database(), "SELECT 1 FROM tidings_dead WHERE position = ?", position))
