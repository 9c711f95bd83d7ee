"""Verify under live traffic: what was there when it was asked must be settled; what came since is only counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.integration.commands import Commands
from tests.integration.databases import database_url
from tests.integration.embedded import Happened, World, auditing, embedded, emitting, until
from tests.integration.processes import until as becomes
from tidings import EventData, Service, open_store
from tidings.database.engine import connected
from tidings.database.presence import present
from tidings.operations.live_verify import verify_live
from tidings.operations.report import Report
from tidings.operations.verify import baseline_of, verify

pytestmark = pytest.mark.timeout(60)


class Gate:
    """A service whose handler waits at each event until the gate is open."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.service = auditing(effect=self._wait)

    async def _wait(self, *_: object) -> None:
        await self.open.wait()


def asked(world: World, service: Service, seconds: float = 20.0) -> asyncio.Task[Report]:
    pairs = [(service, world.running[0].database)]
    return asyncio.create_task(verify_live(world.store, pairs, seconds=seconds))


@asynccontextmanager
async def at_work(folder: Path, gate: Gate) -> AsyncIterator[World]:
    """The service stands before its first event, and operators see its process."""
    async with embedded(folder, gate.service) as world:
        running = world.running[0]

        async def seen() -> bool:
            return bool(await present(running.database, "audit", 0.0))

        await until(seen)
        await world.append(Happened(key="first"))
        await until(lambda: len(running.at_work()) == 1)
        try:
            yield world
        finally:
            gate.open.set()


async def test_what_came_since_is_counted_and_is_no_failure(tmp_path: Path) -> None:
    gate = Gate()
    async with at_work(tmp_path, gate) as world:
        pairs = [(gate.service, world.running[0].database)]
        now = await baseline_of(world.store, pairs)
        found = await verify(world.store, pairs, baseline=now._replace(position=-1))
        assert (found.ok, found.services[0].pending_count, found.services[0].on_the_way) == (True, 0, 1)
        assert "1 came since and are on the way" in str(found)
        for baseline in (now, None):
            found = await verify(world.store, pairs, baseline=baseline)
            assert (found.ok, found.services[0].pending_count, found.services[0].on_the_way) == (False, 1, 0)


async def test_what_was_there_is_waited_for_though_more_comes_all_the_time(tmp_path: Path) -> None:
    gate = Gate()
    async with at_work(tmp_path, gate) as world:
        asking = asked(world, gate.service)
        await asyncio.sleep(0.5)
        assert not asking.done(), "the first event is pending"
        for n in range(3):
            await world.append(Happened(key=f"later-{n}"))
        gate.open.set()
        assert (await asking).ok


async def test_what_stays_pending_is_a_failure(tmp_path: Path) -> None:
    gate = Gate()
    async with at_work(tmp_path, gate) as world:
        await world.append(Happened(key="second"))
        report = await asked(world, gate.service, seconds=0.3)
        assert (report.ok, report.services[0].pending_count) == (False, 2)


async def test_without_a_process_nothing_is_on_its_way(tmp_path: Path) -> None:
    service = auditing()
    async with embedded(tmp_path, service) as world:
        await world.append(Happened(key="first"))
        await world.settled()
    async with embedded(tmp_path, Service("writer")) as world:
        await world.append(Happened(key="second"))
        async with connected(database_url(tmp_path, "audit")) as database:
            asking = verify_live(world.store, [(service, database)], seconds=3600.0)
            report = await asyncio.wait_for(asking, 20)
    assert (report.ok, report.services[0].pending_count) == (False, 1)


async def test_staged_events_that_came_since_are_on_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = emitting()
    async with embedded(tmp_path, service) as world:
        pairs = [(service, world.running[0].database)]
        await world.append(Happened(key="first"))
        await world.settled()
        before = await baseline_of(world.store, pairs)
        with monkeypatch.context() as broken:
            broken.setattr(world.running[0].store, "append", _never)
            async with embedded(tmp_path, Service("writer"), relay=False) as beside:
                await beside.append(Happened(key="second"))

            async def staged() -> bool:
                (part,) = (await verify(world.store, pairs)).services
                return (part.pending_count, part.staged_count) == (0, 1)

            await until(staged)
            found = await verify(world.store, pairs, baseline=before)
            assert (found.ok, found.services[0].staged_count, found.services[0].on_the_way) == (True, 0, 1)
            now = await baseline_of(world.store, pairs)
            found = await verify(world.store, pairs, baseline=now)
            assert (found.ok, found.services[0].staged_count, len(found.services[0].staged)) == (False, 1, 1)


async def _never(*_: object, **__: object) -> None:
    await asyncio.Event().wait()


async def test_the_command_is_0_while_orders_come_and_go(tmp_path: Path) -> None:
    with Commands(tmp_path, {"TIDINGS_SERVICES": "shop:shop"}) as commands:
        service = commands.start("run", "shop")
        await becomes(lambda: "service.connected" in service.err, "it runs")
        writing = asyncio.create_task(_write(commands))
        try:
            await becomes(lambda: len(commands.handled) > 2, "orders come")
            for arguments in ((), ("--deep",), ("--repair",)):
                ended = await commands.run("verify", "--json", *arguments)
                found = json.loads(ended.out)
                assert (ended.process.returncode, found["ok"]) == (0, True), ended.out
            assert found["repaired"] == ["nothing to repair"]
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)


async def _write(commands: Commands) -> None:
    async with open_store(f"sqlite:///{commands.folder}/tidings.db") as store:
        number = 0
        while True:
            number += 1
            await store.append(f"order-{number % 7}", [EventData("Placed", b'{"number": %d}' % number)])
            await asyncio.sleep(0.002)
