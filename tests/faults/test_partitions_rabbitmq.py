"""A divided service of real processes on a real RabbitMQ: they come and go, and it is resized, under traffic."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing

import pytest

from tests.faults.conftest import Recovered
from tests.faults.stage import Process, Stage, now, until
from tidings import open_bus
from tidings.buses import Subscription

SOME = 100
TARGET = "tests.faults.auditing:audit"


async def resize(stage: Stage, to: int) -> None:
    """Resize the service as an operator does."""
    assert await stage.start(f"resize-{to}", "partitions", TARGET, "--resize", str(to)).ended() == 0


async def divided(stage: Stage, count: int, processes: int = 2) -> list[Process]:
    """Start a relay and some processes of the service with this many partitions, under traffic."""
    stage.relay()
    first = stage.service()
    await stage.handles(1)
    await resize(stage, count)
    await first.says("service.consuming", f"tidings.audit.{count - 1}")
    return [first, *(stage.service() for _ in range(processes - 1))]


def shares(stage: Stage) -> list[int]:
    """Return how many partitions each process has; empty while a partition has no process at work."""
    with closing(sqlite3.connect(f"file:{stage.database()}?mode=ro", uri=True, timeout=5)) as connection:
        active = [process for (process,) in connection.execute("SELECT active FROM tidings_floors")]
    return [] if None in active else sorted(Counter(active).values())


async def becomes(stage: Stage, count: int) -> None:
    await until(lambda: laid_out(stage) == (count, True), f"somebody has made the queues of {count} partitions")


def says(process: Process, words: tuple[str, ...]) -> int:
    """Return how often a process has logged one of these events."""
    return sum(process.log.count(word) for word in words)


def laid_out(stage: Stage) -> tuple[int, bool]:
    """Return the number of partitions, and whether their queues exist."""
    with closing(sqlite3.connect(f"file:{stage.database()}?mode=ro", uri=True, timeout=5)) as connection:
        count, epoch, rebound = connection.execute("SELECT count, epoch, rebound FROM tidings_partitions").fetchone()
    return count, epoch == rebound


async def queues(stage: Stage) -> set[str]:
    async with open_bus(stage.bus) as bus:
        parts = [Subscription("audit"), *(Subscription("audit", index, 256) for index in range(8))]
        return {found.name for found in await bus.inspect(parts) if found.kind == "queue" and found.state == "fits"}


@pytest.mark.faults
async def test_service_resized_under_traffic_and_shared_among_processes(stage: Stage, recovered: Recovered) -> None:
    """1 partition, then 4 shared by 2 processes, of which one is killed and another stopped, then 1 again."""
    async with stage.traffic():
        first, second = await divided(stage, 4)
        await until(lambda: shares(stage) == [2, 2], "each process has two of four partitions")
        await stage.handles(SOME)
        assert {row.pid for row in stage.rows()[-SOME:]} == {first.pid, second.pid}, "both are at work"
        first.kill()
        since = now()
        await until(lambda: shares(stage) == [4], "the other process has all")
        seconds = now() - since
        third = stage.service()
        await until(lambda: shares(stage) == [2, 2], "and shares them with the next")
        assert await second.stop() == 0
        await until(lambda: shares(stage) == [4], "who gets the rest when it goes")
        await resize(stage, 1)
        await becomes(stage, 1)
        await stage.handles(SOME)
    events = await stage.keeps_promises()
    assert third.alive
    assert await queues(stage) == {"tidings.audit"}
    recovered(events, seconds)


@pytest.mark.faults
async def test_service_of_partitions_whose_processes_come_and_go(stage: Stage, recovered: Recovered) -> None:
    seconds = 0.0
    async with stage.traffic():
        processes = await divided(stage, 6, processes=3)
        for turn in range(4):
            await until(lambda: shares(stage) == [2, 2, 2], "each of three processes has two of six partitions")
            await stage.handles(SOME)
            since = now()
            if turn % 3 == 0:
                processes[turn % 3].kill()
            else:
                assert await processes[turn % 3].stop() == 0
            processes[turn % 3] = stage.service()
            seconds = max(seconds, await stage.recovered(since))
    recovered(await stage.keeps_promises(), seconds)


@pytest.mark.faults
async def test_service_resized_again_and_again_while_its_processes_are_killed(
    stage: Stage, recovered: Recovered
) -> None:
    """Each time, one of the two processes is killed while it adapts to the new number, wherever the other one is by
    then."""
    stage.relay()
    stage.service()
    seconds = 0.0
    async with stage.traffic():
        await stage.handles(SOME)
        # Where the other one hears of it first, this one may be given the queues as they were, and be fenced in each:
        # then there is none that it could end in order.
        left = ("service.stopped", "service.rejoining")
        turns = ((4, ("service.resized",)), (2, left), (5, ("service.resized",)), (1, ("service.joined",)))
        for to, words in turns:
            doomed = stage.service()
            await doomed.says("service.joined")
            said = says(doomed, words)
            await resize(stage, to)
            await until(lambda: says(doomed, words) > said, f"it says {words}")  # noqa: B023
            doomed.kill()
            seconds = max(seconds, await stage.recovered(now()))
            await becomes(stage, to)
            await stage.handles(SOME)
    events = await stage.keeps_promises()
    assert await queues(stage) == {"tidings.audit"}
    recovered(events, seconds)


@pytest.mark.faults
async def test_service_resized_while_nobody_runs_and_its_queues_deleted(stage: Stage, recovered: Recovered) -> None:
    async with stage.traffic() as traffic:
        (only,) = await divided(stage, 3, processes=1)
        await stage.handles(SOME)
        assert await only.stop() == 0
        await resize(stage, 2)
        async with open_bus(stage.bus) as bus:
            await bus.delete([Subscription("audit", 1, 3)])
        await traffic.reached(SOME)
        since = now()
        only.start()
        seconds = await stage.recovered(since)
    events = await stage.keeps_promises()
    assert await queues(stage) == {"tidings.audit.0", "tidings.audit.1"}
    recovered(events, seconds)
