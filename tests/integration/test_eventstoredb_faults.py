"""The EventStoreDB adapter when servers are killed or stopped."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.eventstoredb import Server, many, opened
from tidings.errors import StoreUnavailable
from tidings.stores import (
    ANY,
    NO_STREAM,
    CaughtUp,
    EventStore,
    Filter,
)
from tidings.testing.store_conformance import closing, event, events, numbers, read, take

PATIENCE = 30.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "log.db")
    server.start()
    yield server
    server.kill()


async def test_a_killed_server_that_comes_back_is_nobodys_business(server: Server) -> None:
    async with (
        opened(server.port) as store,
        closing(store.subscribe_all(filter=Filter(stream_prefixes=("s",)))) as source,
    ):
        await store.append("s", events(0, 1))
        await take(source, many(2))
        server.kill()
        waiting = asyncio.ensure_future(store.append("s", events(2), expected=1))
        reading = asyncio.ensure_future(read(store, "s"))
        await asyncio.to_thread(server.start)
        assert (await waiting).version == 2
        assert (await reading)[:2] == [(0, 0), (1, 1)]
        assert numbers(await take(source, many(1))) == [2]


async def test_appends_in_flight_when_the_server_is_killed_happen_once_and_in_order(server: Server) -> None:
    streams, each = 8, 120

    async def versions(store: EventStore, stream: str, begun: asyncio.Event) -> list[int]:
        """Make three kinds of appends without waiting for answers. Return the versions of the answers."""
        waiting = []
        for number in range(each):
            expected = {"any": ANY, "version": number - 1 if number else NO_STREAM}[stream.split("-")[0]]
            waiting.append(asyncio.ensure_future(store.append(stream, [event(number)], expected=expected)))
        await waiting[0]
        begun.set()
        return [(await answer).version for answer in waiting]

    async with opened(server.port, DefaultDeadline=60) as store:
        begun = asyncio.Event()
        names = [f"{kind}-{n}" for n in range(streams) for kind in ("any", "version")]
        answers = [asyncio.ensure_future(versions(store, name, begun)) for name in names]
        await begun.wait()
        server.kill()
        await asyncio.to_thread(server.start)
        for answer in answers:
            assert await answer == list(range(each))
        for name in names:
            assert await read(store, name) == [(n, n) for n in range(each)]


async def test_a_server_that_is_away_for_too_long_is_unavailable(server: Server) -> None:
    async with opened(server.port, DefaultDeadline=1) as store:
        await store.append("s", events(0))
        server.kill()
        for use in (
            lambda: store.append("s", events(1)),
            lambda: store.head(),
            lambda: read(store, "s"),
            lambda: store.log_id(),
            lambda: store.delete("s"),
        ):
            with pytest.raises(StoreUnavailable, match=rf"127\.0\.0\.1:{server.port}|was not there"):
                await use()
        await asyncio.to_thread(server.start)
        assert (await store.append("s", events(1), expected=0)).version == 1


async def test_a_stopped_server_is_noticed_by_appends_and_by_a_quiet_subscription(server: Server) -> None:
    async with opened(server.port, DefaultDeadline=1) as store:
        await store.append("s", events(0))
        source = store.subscribe_all(filter=Filter(stream_prefixes=("s",)))
        await take(source, lambda got: any(isinstance(item, CaughtUp) for item in got))
        server.signal(signal.SIGSTOP)
        appending = asyncio.ensure_future(store.append("s", events(1), expected=0))
        with pytest.raises(StoreUnavailable):
            await take(source, many(1))
        with pytest.raises(StoreUnavailable, match="may or may not"):
            await appending
        server.signal(signal.SIGCONT)
        # Whether the append happened is unknown, so that it may be repeated with its own id only.
        assert (await store.append("s", events(2))).version in (1, 2)


async def test_a_server_that_is_stopped_for_a_moment_is_nobodys_business(server: Server) -> None:
    async with opened(server.port, DefaultDeadline=8, KeepAliveInterval=100, KeepAliveTimeout=100) as store:
        await store.append("s", events(0))
        source = store.subscribe_stream("s")
        await take(source, many(1))
        server.signal(signal.SIGSTOP)
        lost = next(iter(store.connections))
        appending = [asyncio.ensure_future(store.append("s", events(n))) for n in range(1, 20)]
        while lost.lost is None:
            await asyncio.sleep(0.02)
        server.signal(signal.SIGCONT)
        assert [(await answer).version for answer in appending] == list(range(1, 20))
        assert numbers(await take(source, many(19))) == list(range(1, 20))
        assert await read(store, "s") == [(n, n) for n in range(20)]
