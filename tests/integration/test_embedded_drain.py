"""Stopping: what runs is finished and committed, nothing new begins, a restart repeats nothing; memory is bounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from structlog.testing import capture_logs

from tests.integration.databases import on_server
from tests.integration.embedded import (
    Happened,
    assert_once_in_order,
    auditing,
    count,
    embedded,
    emitting,
    letters,
    many,
    rows,
    tables,
    until,
)
from tidings import Context, Retry, Service
from tidings.database.tables import staged
from tidings.hosting.running import RunningService
from tidings.relay.checkpoints import read_checkpoint

pytestmark = pytest.mark.postgresql


@pytest.mark.parametrize("kind", ["session", "plain", "thread"])
async def test_leaving_finishes_what_runs_commits_it_and_a_restart_repeats_nothing(tmp_path: Path, kind: str) -> None:
    service, begun, ended = Service("audit", tables=tables, concurrency=4), list[str](), list[str]()
    gate, thread_gate = asyncio.Event(), threading.Event()

    async def plain(event: Happened) -> None:
        begun.append(event.key)
        await gate.wait()
        ended.append(event.key)

    async def with_session(event: Happened, session: AsyncSession) -> None:
        await plain(event)

    def thread(event: Happened) -> None:
        begun.append(event.key)
        thread_gate.wait()
        ended.append(event.key)

    handlers: dict[str, Callable[..., Any]] = {"session": with_session, "plain": plain, "thread": thread}
    service.on(Happened)(handlers[kind])
    expected = 1 if kind == "session" and not on_server() else 4  # on a server, they begin side by side

    async def run() -> None:
        async with embedded(tmp_path, service) as world:
            entered.append(world.running[0])
            await world.append(*many(50, 50))
            await until(lambda: len(begun) == expected)

    entered: list[RunningService] = []
    with capture_logs() as logs:
        leaving = asyncio.create_task(run())
        await until(lambda: bool(entered) and entered[0].stopping.is_set())
        # It leaves once it has ended its look at the database.
        await until(lambda: all(part._left.is_set() for part in entered[0].partitions))
        gate.set()
        thread_gate.set()
        await leaving
    assert [entry["event"] for entry in logs if entry["event"] == "service.drain_incomplete"] == []
    assert len(begun) == expected, "something new was begun"
    assert sorted(ended) == sorted(begun)
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert sorted(ended) == sorted(event.key for event in many(50, 50)), "none lost, none twice"
    called = len(begun)
    with capture_logs() as logs:
        async with embedded(tmp_path, service) as world:
            await world.settled()
            assert len(begun) == called
            assert await letters(service) == []
    assert not [entry for entry in logs if entry["event"] == "service.rejoining"]


async def test_after_a_quiet_stop_everything_is_settled_and_nothing_staged(tmp_path: Path) -> None:
    service = emitting()
    async with embedded(tmp_path, service) as world:
        await world.append(*many(300, 30))

        async def some() -> bool:
            return len(await rows(service)) >= 100

        await until(some)
        engine_rows = count
    async with embedded(tmp_path, service, relay=False) as world:
        assert await engine_rows(service, staged) == 0
        done = len(await rows(service))
        assert world.running[0].floor <= done * 4
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert_once_in_order(await rows(service), many(300, 30))


async def test_a_handler_that_outlasts_the_drain_is_cancelled_and_begun_again_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.running.DRAIN_SECONDS", 0.1)
    waits, begun = True, list[int]()

    async def wait(event: Happened, context: Context, session: AsyncSession) -> None:
        begun.append(context.attempt)
        if waits:
            await asyncio.sleep(60)

    service = auditing(effect=wait)
    with capture_logs() as logs:
        async with embedded(tmp_path, service) as world:
            await world.append(Happened(key="a"))
            await until(lambda: bool(begun))
    assert [entry["handlers"] for entry in logs if entry["event"] == "service.drain_incomplete"] == [["handle"]]
    waits = False
    async with embedded(tmp_path, service) as world:
        await world.settled()
        assert await rows(service) == [("a", 0)]
        assert begun == [1, 1], "being cut off is no failed attempt"


async def test_one_waiting_for_its_next_attempt_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    failed: list[int] = []

    async def fail(event: Happened, context: Context, session: AsyncSession) -> None:
        failed.append(event.n)
        raise ValueError

    service = auditing(effect=fail, retry=Retry(attempts=3, delay=60, maximum=60, hold=None, hold_key=False))
    loop = asyncio.get_running_loop()
    with capture_logs() as logs:
        async with embedded(tmp_path, service) as world:
            await world.append(Happened(key="a"))
            await until(lambda: bool(failed))
            leaving = loop.time()
    assert loop.time() - leaving < 2
    assert not [entry for entry in logs if entry["event"] == "service.drain_incomplete"]


async def test_a_pass_takes_no_more_than_twice_the_prefetch(tmp_path: Path) -> None:
    service, gate, seen, highest = Service("audit", prefetch=200), asyncio.Event(), list[tuple[str, int]](), 0
    events = many(20_000, 300)

    @service.on(Happened)
    async def handle(event: Happened) -> None:
        nonlocal highest
        if event.key == "k0":
            await gate.wait()
        pipeline = running.partitions[0].pipeline
        assert pipeline is not None
        highest = max(highest, pipeline.unsettled)
        seen.append((event.key, event.n))

    async with embedded(tmp_path, Service("first")) as world:
        await world.append(*events)

        async def published() -> bool:
            return await read_checkpoint(world.store, "main") >= 20_000

        await until(published)  # so that the next service hears a marker first, which makes the pass
    async with embedded(tmp_path, service) as world:
        (running,) = world.running
        pipeline = running.partitions[0].pipeline
        assert pipeline is not None
        await until(lambda: highest >= 400)
        for _ in range(50):
            await asyncio.sleep(0)
            assert pipeline.unsettled <= 620, "twice the prefetch of the pass, one of the bus, a few markers"
        gate.set()
        await world.settled()
        assert highest <= 620
        assert_once_in_order(seen, events)
