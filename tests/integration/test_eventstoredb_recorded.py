"""What real servers do rarely, or only newer ones, and what the adapter makes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import tidings.server.subscriptions as subscriptions
from tests.integration.eventstoredb import opened
from tidings.errors import EventTooLarge, StreamNotFound
from tidings.server import EventStoreServer
from tidings.server.log import ServedLog
from tidings.server.protocol import streams
from tidings.stores import CaughtUp, Checkpoint, EventData, Filter
from tidings.stores.eventstoredb.revived import STREAMS, Revived
from tidings.testing.store_conformance import events, read, take


def blind(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """Let the server not find a stream so many times. Return the streams that were looked for."""
    looked: list[str] = []
    view = ServedLog.view

    async def not_found(self: ServedLog, stream: str) -> Any:
        looked.append(stream)
        if len(looked) <= times:
            raise StreamNotFound(stream)
        return await view(self, stream)

    monkeypatch.setattr(ServedLog, "view", not_found)
    return looked


@pytest.mark.parametrize("backwards", [False, True])
async def test_a_stream_that_the_store_has_deleted_and_written_again_is_asked_for_twice(
    monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    async with EventStoreServer() as server, opened(server.port) as store:
        await store.append("s", events(0))
        await store.delete("s")
        await store.append("s", events(1))
        looked = blind(monkeypatch, 1)
        assert await read(store, "s", backwards=backwards) == [(1, 1)]
        assert looked == ["s", "s"]


async def test_a_stream_is_asked_for_twice_once_and_only_when_it_was_written_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with EventStoreServer() as server, opened(server.port) as store:
        for name in ("never", "deleted", "written", "revived"):
            await store.append(name, events(0))
        for name in ("deleted", "revived"):
            await store.delete(name)
        await store.append("revived", [])
        await store.append("revived", events(1))
        looked = blind(monkeypatch, 100)
        for name in ("missing", "deleted", "written", "revived", "revived"):
            with pytest.raises(StreamNotFound):
                await read(store, name)
        assert looked == ["missing", "deleted", "written", "revived", "revived", "revived"]


def test_only_so_many_deleted_streams_are_remembered() -> None:
    revived = Revived()
    for number in range(STREAMS + 1):
        revived.deleted(f"s-{number}")
        revived.appended(f"s-{number}")
    assert not revived.doubts("s-0")
    assert revived.doubts("s-1")
    assert not revived.doubts("s-1")


def caught_up_at(monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    """Let the server say where a subscription has caught up, as KurrentDB does: `position` = 3, commit = 1."""
    number, varint = position, b""
    while number > 0x7F:
        varint += bytes([number & 0x7F | 0x80])
        number >>= 7
    place = b"\x08" + varint + bytes([number])
    said = b"\x1a" + bytes([len(place)]) + place
    answer = streams.ReadResp(caught_up=streams.ReadResp.CaughtUp.FromString(said)).SerializeToString()
    assert said in answer
    monkeypatch.setattr(subscriptions, "_caught_up", lambda: answer)


async def test_the_place_at_which_a_subscription_caught_up_is_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    async with EventStoreServer() as server, opened(server.port) as store:
        head = (await store.append("other", events(0, 1, 2))).position
        caught_up_at(monkeypatch, head)
        source = store.subscribe_all(filter=Filter(stream_prefixes=("s",)))
        async with asyncio.timeout(30):
            got = await take(source, lambda got: bool(got) and isinstance(got[-1], CaughtUp))
        assert got[-2:] == [Checkpoint(head), CaughtUp(head)]


@pytest.mark.parametrize("beyond", [1, 2**40, 2**63, 2**64 - 1])
async def test_a_place_beyond_the_log_is_not_where_a_subscription_caught_up(
    monkeypatch: pytest.MonkeyPatch, beyond: int
) -> None:
    async with EventStoreServer() as server, opened(server.port) as store:
        head = (await store.append("other", events(0))).position
        caught_up_at(monkeypatch, min(head + beyond, 2**64 - 1))
        source = store.subscribe_all(filter=Filter(stream_prefixes=("s",)))
        async with asyncio.timeout(30):
            got = await take(source, lambda got: bool(got) and isinstance(got[-1], CaughtUp))
            assert got[-1].position <= head
            await store.append("s", events(7))
            later = await take(source, lambda got: any(getattr(item, "stream", "") == "s" for item in got))
        assert later


async def test_whose_limit_an_append_is_over_is_said() -> None:
    async with EventStoreServer() as server, opened(server.port) as store:
        with pytest.raises(EventTooLarge, match=r"the server's limit is 1048576;") as refusal:
            await store.append("s", [EventData("Big", b"x" * 2_000_000)])
        assert refusal.value.limit == 1_048_576
        with pytest.raises(EventTooLarge, match=r"Tidings' own limit is 16000000;"):
            await store.append("s", [EventData("Big", b"x" * 16_000_000)])


async def test_as_kurrentdb_the_server_takes_what_eventstoredb_does_not() -> None:
    async with EventStoreServer(release="kurrentdb-26.1") as server, opened(server.port) as store:
        big = EventData("Big", b"x" * 15_000_000)
        assert (await store.append("s", [big])).version == 0
        assert [found.data == big.data async for found in store.read_stream("s")] == [True]
        assert [found.data == big.data async for found in store.read_all(filter=Filter(stream_prefixes=("s",)))] == [
            True
        ]
