"""The health probes answer while others hold connections on which no request is ever whole."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

pytest.importorskip("uvicorn", reason="pip install 'tidings[fastapi]'")

from tidings import Service
from tidings.hosting import slow_clients
from tidings.hosting.gathering import Probe
from tidings.hosting.probes import answering

PATIENCE = 30


async def live(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.close()
    return answer


async def begun(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\nX: ")
    await writer.drain()
    return reader, writer


async def ended(reader: asyncio.StreamReader) -> None:
    """Wait until the server has ended the connection without an answer."""
    with suppress(ConnectionError):
        assert await reader.read() == b""


async def test_slow_connections_make_room_for_who_asks() -> None:
    async with answering(Probe((Service("packing"),)), 0) as address:
        port = int(address.rpartition(":")[2])
        slow = [await begun(port) for _ in range(3 * slow_clients.CONNECTIONS)]
        try:
            assert b"event loop" in await live(port)
            async with asyncio.timeout(PATIENCE):
                # The oldest ones were ended.
                for reader, _ in slow[: 2 * slow_clients.CONNECTIONS]:
                    await ended(reader)
            assert b"event loop" in await live(port)
        finally:
            for _, writer in slow:
                writer.close()


async def test_a_connection_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_clients.limited, "__defaults__", (0.2,))
    async with answering(Probe((Service("packing"),)), 0) as address:
        reader, writer = await begun(int(address.rpartition(":")[2]))
        await asyncio.wait_for(ended(reader), PATIENCE)
        writer.close()
