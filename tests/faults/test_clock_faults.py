"""The clock jumps by an hour, forward and back, under relay and service: nothing is lost, nothing happens twice.

A jump reaches the time of day alone. What waits goes by `time.monotonic`, which never jumps; held events are the
exception, because they wait over restarts.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import auditing
from tests.faults.conftest import Recovered
from tests.faults.stage import Process, Stage, now, until
from tidings import open_store
from tidings.stores import EventData

pytestmark = pytest.mark.faults

SOME = 100
HOUR = 3600
JUMPS = (HOUR, 0, -HOUR, 0)
"""Seconds by which the clock is wrong, one after the other."""


class Clock:
    """The clock of the processes from `started`. The test itself keeps the right time."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.arranged = [f"clock-file={file}"]

    def jump(self, seconds: int) -> None:
        self._file.write_text(str(seconds))


def started(stage: Stage) -> tuple[Clock, list[Process]]:
    clock = Clock(stage.folder / "clock")
    return clock, [stage.relay(arranged=clock.arranged), stage.service(arranged=clock.arranged)]


def unmoved(processes: list[Process]) -> None:
    for process in processes:
        assert process.alive
        assert "interrupted" not in process.log
        assert "rejoining" not in process.log


async def test_clock_jumped_while_events_flow(stage: Stage, recovered: Recovered) -> None:
    clock, processes = started(stage)
    seconds = 0.0
    async with stage.traffic():
        await stage.handles(SOME)
        for jump in JUMPS:
            clock.jump(jump)
            seconds = max(seconds, await stage.recovered(now()))
            await stage.handles(SOME)
    unmoved(processes)
    async with open_store(stage.store_url) as store:
        times = [event.ticks async for event in store.read_all() if event.type == "Noted"]
    assert times != sorted(times), "the clock did jump"
    recovered(await stage.keeps_promises(), seconds)


async def test_clock_jumped_while_events_are_held(stage: Stage, recovered: Recovered) -> None:
    """Held events are tried once, neither an hour late nor twice."""
    clock, processes = started(stage)
    seconds = 0.0
    async with stage.traffic() as traffic:
        await stage.handles(SOME)
        for number, jump in enumerate(JUMPS):
            waiting = [await traffic.append("wait", f"held{number}-{n}") for n in range(3)]
            sql = f"SELECT count(*) FROM tidings_held WHERE partition_key LIKE 'held{number}-%'"
            await until(lambda sql=sql: auditing.query(stage.database(), sql) == [(3,)], "three events are held")  # type: ignore[misc]
            clock.jump(jump)
            jumped = now()
            done = set(waiting)
            await until(lambda done=done: done <= {row.number for row in stage.rows()}, "they are handled")  # type: ignore[misc]
            seconds = max(seconds, now() - jumped)
    unmoved(processes)
    recovered(await stage.keeps_promises(), seconds)


async def test_clock_jumped_while_nothing_moves(stage: Stage, recovered: Recovered) -> None:
    """The markers of an idle relay still come. They alone say how far the log goes."""
    clock, processes = started(stage)
    async with stage.traffic():
        await stage.handles(SOME)
    await stage.settled()
    seconds = 0.0
    async with open_store(stage.store_url) as store:
        for jump in JUMPS:
            clock.jump(jump)
            jumped = now()
            quiet = (await store.append("tidings_test", [EventData("tidings_Test", b"{}")])).position
            await until(lambda quiet=quiet: floor_of(stage) >= quiet, "a marker raises the floor")  # type: ignore[misc]
            seconds = max(seconds, now() - jumped)
    unmoved(processes)
    recovered(await stage.keeps_promises(), seconds)


def floor_of(stage: Stage) -> int:
    ((found,),) = auditing.query(stage.database(), "SELECT max(position) FROM tidings_floors")
    return int(found)
