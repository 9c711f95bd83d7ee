"""Everybody's first day: relay, service and first append begin in any order, and everything is empty.

On every store and bus; where a store or bus is in memory, all is in this process, as it is here for the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from itertools import permutations
from pathlib import Path
from uuid import uuid4

import pytest

from tests.integration.databases import database_url
from tests.integration.embedded import Happened, auditing, letters, rows, until
from tidings import Relay, Settings, open_bus, open_store
from tidings._support.tasks import supervised
from tidings.hosting.running import RunningService
from tidings.modelling.codec import encode
from tidings.operations.verify import verify
from tidings.server import EventStoreServer

ORDERS = list(permutations(("relay", "service", "append")))


@asynccontextmanager
async def store_url(kind: str, folder: Path) -> AsyncIterator[str]:
    """The URL of a log that nobody has written to."""
    if kind == "server":
        async with EventStoreServer(str(folder / "server.db")) as server:
            yield server.uri
    elif kind == "memory":
        url = f"memory://{uuid4().hex}"
        async with open_store(url):  # it lives as long as somebody has it open
            yield url
    else:
        yield f"sqlite:///{folder}/log.db"


async def first_day(folder: Path, log: AbstractAsyncContextManager[str], bus_url: str, order: tuple[str, ...]) -> None:
    async with log as url, AsyncExitStack() as stack:
        bus = await stack.enter_async_context(open_bus(bus_url))
        stores = {part: await stack.enter_async_context(open_store(url)) for part in order}
        relay = Relay(stores["relay"], bus, marker_seconds=0.2, checkpoint_seconds=0.1)
        service = auditing()
        settings = Settings(store=url, bus=bus_url, database=database_url(folder))
        running: list[RunningService] = []
        begun: set[str] = set()

        async def append(n: int) -> None:
            event = encode(Happened(key="k", n=n), id=uuid4())
            await stores["append"].append("happened-k", [event])

        for part in order:
            if part == "relay":
                await stack.enter_async_context(supervised(relay.run()))
            elif part == "service":
                running.append(
                    await stack.enter_async_context(service.running(settings, store=stores["service"], bus=bus))
                )
            else:
                if begun == {"relay", "service"}:
                    # The relay follows the empty log, and has been told how far it looked.
                    await until(lambda: relay.confirmed >= 0)
                await append(0)
            begun.add(part)
        await append(1)

        async def audited() -> bool:
            return len(await rows(service)) >= 2

        await until(audited)

        async def settled() -> bool:
            return (await verify(stores["append"], [(service, running[0].database)])).ok

        await until(settled)
        assert await rows(service) == [("k", 0), ("k", 1)]
        assert await letters(service) == [], "the service could read all that the relay published"
        assert -1 <= relay.confirmed <= await stores["append"].head()
        assert relay.trouble is None


@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
@pytest.mark.parametrize("kind", ["memory", "file", "server"])
async def test_the_first_events_are_handled_whatever_begins_first(
    tmp_path: Path, kind: str, order: tuple[str, ...]
) -> None:
    await asyncio.wait_for(first_day(tmp_path, store_url(kind, tmp_path), f"memory://{uuid4().hex}", order), 60)


@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
@pytest.mark.parametrize("kind", ["memory", "file", "server"])
async def test_the_first_events_are_handled_over_rabbitmq_whatever_begins_first(
    tmp_path: Path, amqp_url: str, kind: str, order: tuple[str, ...]
) -> None:
    await asyncio.wait_for(first_day(tmp_path, store_url(kind, tmp_path), amqp_url, order), 60)
